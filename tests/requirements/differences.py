"""A program of the grammar at a point: its objects, eager training and finite differences.

Training here is written out anew, with the real optimizer and the inner gradient by
``torch.autograd.grad``. What stop-gradients hold still, finite differences hold still as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.requirements.grammar import Phi, Program

#: Elements of a parameter, of a prediction and of a batch.
SIZE = 3

# --- stop-gradients ---------------------------------------------------------------------------


class Memory:
    """What ``stop``, ``untracked`` and ``read`` returned, in the order of their calls."""

    def __init__(self) -> None:
        self._values: list[Any] | None = None
        self._replay: Iterator[Any] | None = None

    @property
    def active(self) -> bool:
        return self._values is not None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Remember what a run returns; replays follow until the next recording."""
        self._values, self._replay = [], None
        yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        assert self._values is not None
        self._replay = iter(self._values)
        yield
        assert next(self._replay, None) is None, "the run stopped fewer gradients than its base"

    def forget(self) -> None:
        self._values = self._replay = None

    def keep(self, value: Any) -> Any:
        if self._replay is not None:
            return next(self._replay)
        assert self._values is not None
        self._values.append(value)
        return value


MEMORY = Memory()


def stop(x: Tensor) -> Tensor:
    return MEMORY.keep(x.detach().clone()) if MEMORY.active else x.detach()


def untracked(f: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        value = f()
    return MEMORY.keep(value.detach().clone()) if MEMORY.active else value


def read(x: Tensor) -> float:
    return MEMORY.keep(x.item()) if MEMORY.active else x.item()


#: Names that sources use besides torch's.
CONSTANTS = {
    "C": torch.tensor([0.9, -0.7, 1.3], dtype=torch.float64),
    "D": torch.tensor([1.1, 0.6, 0.8], dtype=torch.float64),
    "MIX": torch.tensor(
        [[0.8, -0.5, 0.3], [0.4, 0.9, -0.6], [-0.7, 0.2, 1.1]], dtype=torch.float64
    ),
    "MASK": torch.tensor([True, False, True]),
    "INDEX": torch.tensor([2, 0, 1]),
    "EYE": torch.eye(SIZE, dtype=torch.float64),
}


# --- a program at a point -----------------------------------------------------------------------


class Instance:
    """A program with values: the objects that ``unrollc.check`` takes, and training by eager ops.

    Attributes:
        model, loss, val_loss, train, val: As ``unrollc.check`` takes them.
        metas: The meta-parameters by name.
        whole: The integer tensor that is listed as well.

    Args:
        program: The program.
        learned: Another number gives other learned parameters and hyperparameters.
        data: Another number gives other weights and other data.
    """

    def __init__(self, program: Program, learned: int = 0, data: int = 0) -> None:
        self.program = program
        values = _Values(program.point, learned, data)
        self._start: dict[str, Tensor] = {}
        for phi in program.phis:
            shape = (SIZE,) if phi.shape == "v" else ()
            self._start[phi.name] = values.learned(shape) * (0.0 if phi.zero else 1.0)
        self._start |= {"w": values.data((SIZE,)), "b": values.data((SIZE,))}
        closures = {
            phi.name: self._start[phi.name].clone().requires_grad_()
            for phi in program.phis
            if phi.owner == "closure"
        }
        names = {"torch": torch, "nn": nn, "F": F, "START": self._start, "math": math}
        names |= {"COUNT": torch.tensor(2)}
        names |= {"stop": stop, "untracked": untracked, "read": read, **CONSTANTS, **closures}
        exec(program.code, names)
        self._names: dict[str, Any] = names
        self.model: nn.Module = names["Model"]()
        self.loss = names["Loss"]() if program.form == "module" else names["loss"]
        self.val_loss = names["val_loss"]
        self.train = (
            values.data((program.steps, SIZE)),
            values.data((program.steps, SIZE)),
        )
        self.val = (values.data((SIZE,)), values.data((SIZE,)))
        self.train[0].requires_grad_(program.inputs)
        self._hyper = {
            key: (torch.tensor(value) * values.factor()).requires_grad_()
            for key, value in program.hyper.items()
        }
        self.metas: dict[str, Tensor] = {
            "w": self.model.w,
            "b": self.model.b,
            **{phi.name: self._phi(phi, closures) for phi in program.phis},
            **self._hyper,
            **({"inputs": self.train[0]} if program.inputs else {}),
        }
        self.whole: Tensor | None = names["COUNT"] if program.whole else None

    def _phi(self, phi: Phi, closures: dict[str, Tensor]) -> Tensor:
        if phi.owner == "closure":
            return closures[phi.name]
        return getattr(self.model if phi.owner == "model" else self.loss, phi.name)  # type: ignore[no-any-return]

    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer with its meta-parameters."""
        return self._with(self._hyper)

    def _with(self, hyper: dict[str, Any]) -> torch.optim.Optimizer:
        """The optimizer; values are set afterwards, for differences may make them negative."""
        given = {**self.program.numbers, **self.program.hyper}
        opt = self._names["make_optimizer"]([self.model.w, self.model.b], given)
        for key, value in hyper.items():
            if not key.startswith("beta"):
                opt.param_groups[0][key] = value
        if "beta1" in hyper:
            opt.param_groups[0]["betas"] = (hyper["beta1"], hyper["beta2"])
        return opt  # type: ignore[no-any-return]

    def validation(self) -> float:
        """The validation loss after ordinary training by eager ops."""
        plain = "torch" in self.program.traits
        hyper = {k: t.item() if plain else t.detach() for k, t in self._hyper.items()}
        params = [self.model.w, self.model.b]
        before = [param.detach().clone() for param in params]
        opt = self._with(hyper)
        try:
            for x, y in zip(*self.train, strict=True):
                loss = self._inner((x, y))
                grads: tuple[Tensor | None, ...] = (None, None)
                if loss.requires_grad:
                    grads = torch.autograd.grad(loss, params, allow_unused=True)
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad
                opt.step()
            with torch.no_grad():
                return float(self.val_loss(self.model(self.val[0]), self.val[1]))
        finally:
            with torch.no_grad():
                for param, old in zip(params, before, strict=True):
                    param.copy_(old)
                    param.grad = None

    def _inner(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        if self.program.form == "objective":
            return self.loss(self.model, batch)  # type: ignore[no-any-return]
        return self.loss(self.model(batch[0]), batch[1])  # type: ignore[no-any-return]


class _Values:
    """Random values; those of a learned parameter stay away from zero."""

    def __init__(self, point: int, learned: int, data: int) -> None:
        self._learned = torch.Generator().manual_seed(1_000_003 * learned + point)
        self._data = torch.Generator().manual_seed(1_000_003 * data + point + 17)

    def learned(self, shape: tuple[int, ...]) -> Tensor:
        size = 0.4 + 1.2 * torch.rand(shape, generator=self._learned, dtype=torch.float64)
        signs = torch.randint(0, 4, shape, generator=self._learned)
        return torch.where(signs == 0, -size, size)

    def factor(self) -> float:
        return 0.8 + 0.4 * float(torch.rand((), generator=self._learned))

    def data(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self._data, dtype=torch.float64)


# --- finite differences ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Slope:
    """A directional derivative by finite differences.

    Attributes:
        value: The extrapolated estimate.
        error: What the extrapolation sees of its own error.
        usable: Whether the estimates agree: no kink nearby, no jump, finite.
        scale: The size of the function's value.
    """

    value: float
    error: float
    usable: bool
    scale: float

    @property
    def vanishes(self) -> bool:
        return abs(self.value) <= 1e-9 * max(1.0, self.scale) + 2 * self.error


@dataclass
class Differences:
    """Finite differences of a program's validation loss, stop-gradients held still.

    Attributes:
        instance: The program at a point.
        base: The loss there.
    """

    instance: Instance
    base: float = field(init=False)

    def __post_init__(self) -> None:
        with MEMORY.recording():
            self.base = self.instance.validation()
        self._values = MEMORY._values

    @property
    def finite(self) -> bool:
        """Whether training did not diverge."""
        return math.isfinite(self.base) and abs(self.base) < 1e6

    def slope(self, directions: dict[str, Tensor]) -> Slope:
        """The derivative as meta-parameters move along `directions`, all at once."""
        first = self._pair(directions, 1e-3)
        second = self._pair(directions, 5e-4)
        found = self._estimate(first, second, 1e-3)
        if not found.usable:  # perhaps a kink between the two
            third, fourth = self._pair(directions, 1e-5), self._pair(directions, 5e-6)
            found = self._estimate(third, fourth, 1e-5)
        return found

    def moves(self, directions: dict[str, Tensor]) -> bool:
        """Whether the value visibly changes along `directions`."""
        above, below = self._pair(directions, 1e-2)
        return abs(above - below) > 2e-2 * 1e-10 * max(1.0, abs(self.base))

    def _estimate(self, first: tuple[float, float], second: tuple[float, float], h: float) -> Slope:
        coarse, fine = (first[0] - first[1]) / (2 * h), (second[0] - second[1]) / h
        value = (4 * fine - coarse) / 3
        size = max(1.0, abs(self.base))
        error = abs(value - fine)
        bends = [abs(up - 2 * self.base + down) for up, down in (first, second)]
        # A kink at the point itself: the one-sided slopes differ, however small the step.
        kink = bends[1] > 0.4 * bends[0] and bends[1] > 1e-6 * h + 1e-12 * size
        usable = error <= 1e-3 * abs(value) + 1e-5 * size * (1e-3 / h) ** 0.5 * 0.1 and not kink
        return Slope(value, error + 1e-15 * size / h * 10, usable, abs(self.base))

    def _pair(self, directions: dict[str, Tensor], h: float) -> tuple[float, float]:
        return self._moved(directions, h), self._moved(directions, -h)

    def _moved(self, directions: dict[str, Tensor], h: float) -> float:
        metas = self.instance.metas
        before = {name: metas[name].detach().clone() for name in directions}
        with torch.no_grad():
            for name, direction in directions.items():
                metas[name].add_(h * direction)
        MEMORY._values = self._values
        try:
            with MEMORY.replaying():
                return self.instance.validation()
        finally:
            MEMORY.forget()
            with torch.no_grad():
                for name, old in before.items():
                    metas[name].copy_(old)


def directions(instance: Instance, names: list[str], seed: int) -> dict[str, Tensor]:
    """A random direction for each of the named meta-parameters."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(instance.metas[name].shape, generator=generator, dtype=torch.float64)
        for name in names
    }
