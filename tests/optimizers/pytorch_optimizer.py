"""The optimizers of the package `pytorch-optimizer`: construction, oracles, and one row for each.

What a captured optimizer is compared with is its own eager ``step`` on an equal model: θ_T after
five steps, and finite differences of the validation loss over whole eager runs. Optimizers that
draw random numbers are given the program's noise.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import pytorch_optimizer
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import unrollc
from tests.oracles import finite
from tests.oracles.compare import relative_error
from unrollc.capture.noise import as_noise
from unrollc.errors import UnrollcError
from unrollc.runtime.load import load
from unrollc.step import Role

STEPS = 5
EQUAL = 1e-10
#: Over the differences' own error (1e-9 where nothing is near a kink), far under any wrong term.
DIFFERENCES = 1e-5

Build = Callable[[Any, nn.Module], torch.optim.Optimizer]
Draws = list[dict[int, Tensor]]


class Small(nn.Module):
    """One matrix and one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Matrices(nn.Module):
    """Two matrices, for optimizers that take nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Convolution(nn.Module):
    """A convolution's weight besides a matrix and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 2)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.conv(x.unsqueeze(1))).flatten(1))


def _default(kind: Any, model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return kind(model.parameters(), **settings)


def _of_model(kind: Any, model: nn.Module) -> torch.optim.Optimizer:
    return kind(model)


def _by_shape(kind: Any, model: nn.Module) -> torch.optim.Optimizer:
    """Matrices by Muon's rule, the rest by AdamW's, as the package's examples do."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    return kind([{"params": matrices, "use_muon": True}, {"params": rest, "use_muon": False}])


@dataclass(frozen=True)
class Setup:
    """How an optimizer is constructed.

    Attributes:
        build: From its class and the model.
        model: The model's class.
        note: Why it is not constructed by its defaults, for the page.
        step: The largest step of the finite differences.
        singular: Why its gradients are NaN.
        narrow: Whether a number that depends on data is computed in less than float64.
    """

    build: Build = _default
    model: type[nn.Module] = Small
    note: str = ""
    step: float = 1e-4
    singular: str = ""
    narrow: bool = False


def _with(note: str, **settings: Any) -> Setup:
    return Setup(functools.partial(_default, **settings), note=note)


_FUSED = "parameters change inside the backward pass (`fused_backward`), there is no `step`"
_MOMENTUM = "`momentum_dtype=torch.float64`"

#: Everything that is not ``kind(model.parameters())``.
SETUPS: dict[str, Setup] = {
    **dict.fromkeys(
        ("adago", "adamuon", "distributedmuon", "muon", "muonclip", "normuon"), Setup(_by_shape)
    ),
    "adammini": Setup(_of_model),
    **dict.fromkeys(("adalomo", "lomo"), Setup(_of_model, note=_FUSED)),
    **dict.fromkeys(("nero", "sm3", "lars", "scalableshampoo"), Setup(model=Convolution)),
    # G of Small has rank 2, so that GᵀG has a double eigenvalue and no eigenbasis of its own.
    **dict.fromkeys(("soap", "splus", "conda", "lorarite"), Setup(model=Matrices)),
    "spectralsphere": Setup(model=Matrices),
    "flashadamw": Setup(step=1e-8),  # its state is rounded to 8 bits: between two jumps
    "a2grad": Setup(singular="`a2grad.py:187` takes the root of what is zero in any first step"),
    "magma": Setup(narrow=True),  # cosines and their averages
    "demo": Setup(model=Matrices),
    "bsam": _with("", num_data=8),
    "ranger21": _with("", num_iterations=2 * STEPS),
    "fadam": _with(_MOMENTUM, momentum_dtype=torch.float64),
    "adafactor": _with(_MOMENTUM, momentum_dtype=torch.float64),
    "adashift": _with("`keep_num=2`: by default it starts at step 10", keep_num=2),
    "radam": _with(
        "`degenerated_to_sgd=True`: by default it starts at step 6", degenerated_to_sgd=True
    ),
}


def setup_of(name: str) -> Setup:
    return SETUPS.get(name, Setup())


def build(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model in float64 and its optimizer, the same at every call."""
    torch.manual_seed(0)
    setup = setup_of(name)
    model = setup.model().double()
    kind = pytorch_optimizer.load_optimizer(name)
    return model, setup.build(kind, model)


def batches() -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """Training batches of all steps and the validation batch."""
    generator = torch.Generator().manual_seed(1)

    def batch() -> tuple[Tensor, Tensor]:
        inputs = torch.randn(5, 4, generator=generator, dtype=torch.float64)
        return inputs, torch.randint(3, (5,), generator=generator)

    return [batch() for _ in range(STEPS)], batch()


# -- the oracle -------------------------------------------------------------------------------


class _Noise(TorchDispatchMode):
    """Gives prescribed draws to the random ops of one step, in their order."""

    def __init__(self, draws: dict[int, Tensor]) -> None:
        super().__init__()
        self._draws, self._count = draws, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return result
        index, self._count = self._count, self._count + 1
        if index not in self._draws:
            return result
        found = as_noise(_PURE.get(func, func), args, kwargs, result)
        assert found is not None, func
        value = found[1](self._draws[index])
        return result.copy_(value) if func in _PURE else value


aten = torch.ops.aten
_PURE = {
    aten.normal_.default: aten.normal_functional.default,
    aten.uniform_.default: aten.uniform.default,
    aten.exponential_.default: aten.exponential.default,
    aten.bernoulli_.float: aten.bernoulli.p,
}


def train_eagerly(
    name: str, draws: Draws, *, flat: Tensor | None = None, scale: float | None = None
) -> tuple[dict[str, Tensor], float]:
    """θ_T and the validation loss after the optimizer's own steps.

    Args:
        name: The optimizer.
        draws: The noise of each step, by the number of the random op.
        flat: θ_0 as one vector; the model's own where it is left out.
        scale: Factor of the learning rates; they stay as they are where it is left out.
    """
    model, opt = build(name)
    if flat is not None:
        torch.nn.utils.vector_to_parameters(flat.clone(), model.parameters())
    if scale is not None:
        for group in opt.param_groups:
            group["lr"] *= scale
    train, (inputs, target) = batches()
    for index, (x, y) in enumerate(train):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        with _Noise(draws[index]) if draws[index] else contextlib.nullcontext():
            opt.step()
    with torch.no_grad():
        loss = F.cross_entropy(model(inputs), target).item()
    return {name: p.detach() for name, p in model.named_parameters()}, loss


_NARROW = (torch.bfloat16, torch.float16, torch.float32)


class _Float64:
    """`torch`, in which every floating dtype is float64."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        return torch.float64 if value in _NARROW else value


class _WideMethods(TorchFunctionMode):
    """``x.float()`` is ``x.double()``, which a traced tensor says as ``x.to(dtype=...)``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in _NARROW:
            kwargs["dtype"] = torch.float64
        narrow = (Tensor.float, Tensor.half, Tensor.bfloat16)
        return (Tensor.double if func in narrow else func)(*args, **kwargs)


@contextlib.contextmanager
def _in_float64() -> Iterator[None]:
    """Let the package compute in float64 where it says bfloat16 or float32.

    In a narrow dtype a loss is piecewise constant at the scale of any finite difference.
    """
    modules = [m for name, m in list(sys.modules.items()) if name.startswith("pytorch_optimizer.")]
    functions = {f for m in modules for f in vars(m).values() if isinstance(f, FunctionType)}
    narrow = {f: f.__defaults__ for f in functions if torch.bfloat16 in (f.__defaults__ or ())}
    named = [module for module in modules if vars(module).get("torch") is torch]
    for function, defaults in narrow.items():
        function.__defaults__ = tuple(
            torch.float64 if value is torch.bfloat16 else value for value in defaults or ()
        )
    for module in named:
        vars(module)["torch"] = _Float64()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _WideMethods():
            yield
    finally:
        torch.set_default_dtype(default)
        for function, defaults in narrow.items():
            function.__defaults__ = defaults
        for module in named:
            vars(module)["torch"] = torch


# -- one row ----------------------------------------------------------------------------------


@dataclass
class Row:
    """What the page says of one optimizer.

    Attributes:
        name: As `pytorch_optimizer.load_optimizer` takes it.
        captured: Whether it is.
        reason: Why not.
        equal: Whether θ_T is its own, and to what accuracy.
        distinct: How many of the five steps are programs of their own.
        theta, lr: Meta-gradients.
        scale: Factor of the learning rates at which they are taken; None where there is none.
    """

    name: str
    captured: bool = False
    reason: str = ""
    equal: str = ""
    distinct: int = 0
    theta: str = ""
    lr: str = ""
    scale: float | None = None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.captured:
            return f"| {self.name} | {self.reason} |"
        cells = (self.name, self.equal, str(self.distinct), self.theta, self.lr)
        return "| " + " | ".join((*cells, "; ".join(self.notes))) + " |"


CHECKED = "= differences"


def row_of(name: str) -> Row:
    """Everything about one optimizer, by running it."""
    row = Row(name)
    try:
        model, opt = build(name)
    except Exception as error:
        row.reason = f"its construction raises {_one_line(error)}"
        return row
    train, val = batches()
    program = unrollc.compile(model, opt, F.cross_entropy)
    try:
        with torch.no_grad():
            lowered = program.lower(train, val)
            draws, result = _run(program, lowered, train, val)
    except unrollc.CaptureError as error:
        note = setup_of(name).note
        row.reason = f"{note}; {_explained(error)}" if note else _explained(error)
        return row
    row.captured, row.distinct = True, len(lowered.loop.steps)
    row.equal = _equal(name, draws, result)
    row.notes += [note] if (note := setup_of(name).note) else []
    nodes = [node for step in lowered.loop.steps for node in step.graph.nodes]
    narrow = setup_of(name).narrow or any(map(_is_narrow, nodes))
    with _in_float64() if narrow else contextlib.nullcontext():
        result, draws = _gradients(name, row)
        if narrow:
            row.notes.append(f"{'gradients' if row.equal else 'all'}: narrower dtypes as float64")
            row.equal = row.equal or _equal(name, draws, result, row.scale)
    return row


def _gradients(name: str, row: Row) -> tuple[Any, Draws]:
    """Compare the meta-gradients of θ_0 and of ``lr``; write them into the row."""
    model, opt = build(name)
    parameters, rates = list(model.parameters()), []
    defaults = [group.get("lr") for group in opt.param_groups]
    row.lr = f"`lr` is {defaults[0]}"
    if all(isinstance(default, float) for default in defaults):
        row.scale = 0.7  # away from defaults that other numbers are compared with
        for group in opt.param_groups:
            rate = torch.tensor(row.scale * group["lr"], dtype=torch.float64, requires_grad=True)
            rates.append(rate)
            group["lr"] = rate
    train, val = batches()
    program = unrollc.compile(model, opt, F.cross_entropy, meta=[*parameters, *rates])
    try:
        lowered = program.lower(train, val)
    except UnrollcError as error:
        assert rates, error
        row.lr, row.scale, rates = _explained(error), None, []
        model, opt = build(name)
        parameters = list(model.parameters())
        program = unrollc.compile(model, opt, F.cross_entropy, meta=parameters)
        lowered = program.lower(train, val)
    draws, result = _run(program, lowered, train, val)
    gradients = torch.autograd.grad(result.loss, [*parameters, *rates])
    flat = torch.nn.utils.parameters_to_vector(parameters).detach().clone()
    slope = torch.cat([g.flatten() for g in gradients[: len(parameters)]])
    row.theta = _compared(
        name, lambda: train_eagerly(name, draws, flat=flat, scale=row.scale)[1], flat, slope
    )
    if rates:
        moving = torch.tensor(row.scale, dtype=torch.float64)
        slopes = zip(gradients[len(parameters) :], defaults, strict=True)
        row.lr = _compared(
            name,
            lambda: train_eagerly(name, draws, scale=moving.item())[1],
            moving,
            torch.stack([gradient * default for gradient, default in slopes]).sum(),
            100.0,
        )
    return result, draws


def _equal(name: str, draws: Draws, result: Any, scale: float | None = None) -> str:
    """The class of accuracy to which θ_T is that of the optimizer's own steps."""
    expected, _ = train_eagerly(name, draws, scale=scale)
    start = dict(build(name)[0].named_parameters())
    assert any(not torch.equal(start[key], value) for key, value in expected.items()), "idle"
    worst = max(relative_error(result.params[key], value) for key, value in expected.items())
    return "≤ 1e-10" if worst <= EQUAL else ""


def _is_narrow(node: Any) -> bool:
    """Whether a value with more than one element is computed in less than float64."""
    value = node.meta.get("val")
    return getattr(value, "dtype", None) in _NARROW and value.numel() > 1


def _run(program: Any, lowered: Any, train: Any, val: Any) -> tuple[Draws, Any]:
    """A result, and the noise that it was computed with."""
    torch.manual_seed(7)
    seed = int(torch.randint(2**62, (), dtype=torch.int64))
    torch.manual_seed(7)
    result = program(train, val)
    module = load(lowered.generated)
    draws: Draws = []
    for step, index in enumerate(lowered.pieces.sequence):
        noises = lowered.pieces.steps[index].inputs_with(Role.NOISE)
        numbers = [int(value.label.removeprefix("noise ")) for value, _ in noises]
        drawn = getattr(module, f"noise_step_{index}")(seed, step) if noises else ()
        draws.append(dict(zip(numbers, drawn, strict=True)))
    return draws, result


def _compared(
    name: str, loss: Callable[[], float], tensor: Tensor, gradient: Tensor, steps: float = 1.0
) -> str:
    step = steps * setup_of(name).step
    if bool(gradient.isnan().any()):
        return f"NaN: {setup_of(name).singular}"
    (found,) = finite.compare(loss, tensor, gradient, directions=1, step=step)
    if found.agrees(DIFFERENCES):
        return CHECKED
    return f"{found.claimed:.6g}, differences give {found.estimate.value:.6g}"


def _explained(error: UnrollcError) -> str:
    """An error as one cell of a table."""
    where = getattr(error.where, "short", error.where)
    cell = error.what + (f": {error.why}" if error.why else "") + (f" (`{where}`)" if where else "")
    return " ".join(cell.split()).replace("|", "\\|")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".replace("|", "\\|")
