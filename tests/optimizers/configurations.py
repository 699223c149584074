"""Every configuration of every optimizer of `torch.optim`, and what is verified of it.

The configurations are those on which PyTorch tests its optimizers (`optim_db`), with a few more in
which a hyperparameter takes part that otherwise does not. One configuration makes one `Row` of
docs/optimizers.md: its numbers are computed and judged here, and the page holds the outcome.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import functional as F
from torch.testing._internal.common_optimizers import optim_db

import unrollc
from tests.oracles import finite, ordinary
from tests.oracles.compare import assert_close, flattened, relative_error
from tests.oracles.differentiable import eager_gradients
from tests.oracles.objectives import unstack
from unrollc.requirements.verdict import Verdict

STEPS = 5

#: What `optim_db` leaves at values under which a hyperparameter does not take part. "steps" is the
#: number of inner steps.
MORE: dict[str, dict[str, dict[str, Any]]] = {
    "ASGD": {"averaging, large lambd": {"lr": 0.2, "lambd": 0.1, "alpha": 0.6, "t0": 1.5}},
    "Adafactor": {
        "eps for small weights": {"lr": 0.1, "d": 1.7, "eps": (None, 2.0)},
        "relative steps": {"lr": 3.0, "d": 1.02, "eps": (1e-4, 1e-3)},
    },
    "Adam": {"decoupled": {"decoupled_weight_decay": True, "weight_decay": 0.1}},
    "NAdam": {"large momentum_decay": {"lr": 0.05, "betas": (0.8, 0.95), "momentum_decay": 0.3}},
    "RAdam": {"rectified from step 6 of 8 on": {"lr": 0.05, "betas": (0.9, 0.9), "steps": 8}},
    "Rprop": {"active bounds": {"lr": 0.03, "etas": (0.4, 1.3), "step_sizes": (0.02, 50)}},
    "SGD": {"dampening, weight_decay": {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1}},
}


@dataclass(frozen=True)
class Configuration:
    """One optimizer with its arguments."""

    kind: type[torch.optim.Optimizer]
    description: str
    arguments: dict[str, Any]
    steps: int = STEPS

    @property
    def name(self) -> str:
        return f"{self.kind.__name__}, {self.description}"


def configurations(device: str = "cpu") -> list[Configuration]:
    """Those of `optim_db` for a device, and `MORE`."""
    found = []
    for info in optim_db:
        kind = info.optim_cls
        for given in info.optim_inputs_func(device=device):
            found.append(Configuration(kind, given.desc or "default", given.kwargs))
        for description, arguments in MORE.get(kind.__name__, {}).items():
            options = {k: v for k, v in arguments.items() if k != "steps"}
            steps = arguments.get("steps", STEPS)
            found.append(Configuration(kind, description, options, steps))
    return found


class Setting:
    """A small net in float64 with its optimizer, five batches and a validation batch."""

    def __init__(self, configuration: Configuration, device: str = "cpu") -> None:
        matrices = configuration.kind is torch.optim.Muon  # it takes nothing else
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 3, bias=not matrices), nn.Tanh())
        self.model.to(device, torch.float64)
        arguments = {  # tensors of float32 would be rounded where numbers are not
            key: value.double() if isinstance(value, Tensor) else value
            for key, value in configuration.arguments.items()
        }
        self.opt = configuration.kind(self.model.parameters(), **arguments)
        steps, generator = configuration.steps, torch.Generator().manual_seed(1)
        drawn = [
            torch.randn(*size, generator=generator, dtype=torch.float64).to(device)
            for size in ((steps, 6, 4), (steps, 6, 3), (6, 4), (6, 3))
        ]
        self.train, self.val = (drawn[0], drawn[1]), (drawn[2], drawn[3])

    def trained(self, **options: Any) -> ordinary.Trained:
        """Ordinary training by the real optimizer."""
        return ordinary.train(
            self.model, self.opt, F.mse_loss, unstack(self.train), self.val, **options
        )

    def program(self, meta: list[Any] | None = None) -> unrollc.Program:
        return unrollc.compile(self.model, self.opt, F.mse_loss, meta=meta)


def tensor_hyperparameters(group: dict[str, Any]) -> dict[str, Tensor]:
    """Put a tensor that requires grad in the place of every number of a param group.

    Returns:
        The tensors by name, e.g. ``betas[1]``. Truth values stay, and so does an integer whose
        annotation makes it a count (``ns_steps``, ``t0`` is a float).
    """
    found: dict[str, Tensor] = {}

    def tensor(name: str, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
            return value
        number = torch.as_tensor(value, dtype=torch.float64).detach().clone()
        found[name] = number.requires_grad_()
        return found[name]

    for key, value in list(group.items()):
        if isinstance(value, tuple):
            group[key] = tuple(tensor(f"{key}[{i}]", item) for i, item in enumerate(value))
        elif key not in ("params", "ns_steps"):
            group[key] = tensor(key, value)
    return found


@dataclass(frozen=True)
class Row:
    """What is verified of one configuration.

    Attributes:
        name: The configuration.
        steps: How many distinct steps were captured, or why none could be.
        differences: What has a meta-gradient equal to finite differences of the real optimizer.
        eager: What of that eager PyTorch differentiates to the same numbers.
        eager_differs: Where eager PyTorch gives other numbers than the differences.
        failed: Hyperparameters without meta-gradient, with the reason.
    """

    name: str
    steps: str
    differences: tuple[str, ...] = ()
    eager: tuple[str, ...] = ()
    eager_differs: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()

    def cells(self) -> tuple[str, ...]:
        """The row of docs/optimizers.md, under `COLUMNS`."""
        lists = (self.differences, self.eager, self.eager_differs, self.failed)
        return (self.name, self.steps, *(", ".join(names) or "–" for names in lists))


COLUMNS = ("configuration", "steps", "= differences", "= eager", "eager differs", "no gradient")


def evaluate(configuration: Configuration) -> Row:
    """Capture, run and differentiate one configuration, and hold it against its oracles.

    Raises:
        AssertionError: If a number is off.
    """
    setting = Setting(configuration)
    try:
        distinct = check_adaptation(setting)
    except unrollc.CaptureError as error:
        return Row(configuration.description, f"refused: {error.what}")
    with exact_casts(configuration):
        return _differentiated(configuration, distinct)


def check_adaptation(setting: Setting) -> int:
    """Five captured steps are five steps of the real optimizer; the number of distinct ones."""
    program = setting.program()
    with torch.no_grad():
        result = program(setting.train, setting.val)
    trained = setting.trained()
    assert_close(result.params, trained.params, rtol=1e-10)
    assert_close(flattened(result.opt_state), flattened(trained.opt_state), rtol=1e-10)
    with torch.no_grad():
        return len(program.lower(setting.train, setting.val).loop.steps)


def _differentiated(configuration: Configuration, distinct: int) -> Row:
    setting = Setting(configuration)
    hyper = tensor_hyperparameters(setting.opt.param_groups[0])
    meta = {**dict(setting.model.named_parameters()), **hyper}
    failed: dict[str, Verdict] = {}
    try:
        result = setting.program()(setting.train, setting.val)
    except unrollc.RequirementError:
        failed = _failed(setting, hyper)
        meta = {name: tensor for name, tensor in meta.items() if name not in failed}
        result = setting.program(list(meta.values()))(setting.train, setting.val)
    assert_close(result.params, setting.trained().params, rtol=1e-10)
    found = dict(zip(meta, torch.autograd.grad(result.loss, list(meta.values())), strict=True))
    for name, gradient in found.items():
        check_differences(setting, name, meta[name], gradient)
    for name, verdict in failed.items():
        if verdict.status == "zero":
            check_no_effect(setting, name, hyper[name])
    present = {name: tensor for name, tensor in hyper.items() if name not in failed}
    same, other = _compared_with_eager(setting, present, found)
    return Row(
        configuration.description,
        str(distinct),
        ("θ_0", *present),
        same,
        other,
        tuple(f"{name}: {v.status}, {v.reason.partition(' (')[0]}" for name, v in failed.items()),
    )


def _failed(setting: Setting, hyper: dict[str, Tensor]) -> dict[str, Verdict]:
    """Hyperparameters without meta-gradient; those that have no effect are numbers again.

    Dampening has none without momentum. As a tensor it might get a value with the next call, so
    that a momentum of zero were no smooth point of both.
    """
    group, failed = setting.opt.param_groups[0], {}
    verdicts = setting.program().check(setting.train, setting.val)
    for wanted in ("zero", "undefined"):
        if failed:  # those that have no effect are numbers by now
            verdicts = setting.program().check(setting.train, setting.val)
        for name in hyper.keys() - failed.keys():
            if verdicts[_label(name)].status == wanted:
                failed[name] = verdicts[_label(name)]
        group.update({name: hyper[name].item() for name in failed if name in group})
    return {name: failed[name] for name in hyper if name in failed}


def _label(name: str) -> str:
    key, bracket, rest = name.partition("[")
    return f'param_groups[0]["{key}"]{bracket}{rest}'


def check_differences(
    setting: Setting, name: str, tensor: Tensor, gradient: Tensor, **options: Any
) -> None:
    """The meta-gradient is the real optimizer's finite difference, along a random direction."""

    def loss() -> Tensor:
        found = setting.trained(**options).loss
        assert found is not None
        return found

    comparisons = (
        finite.compare(loss, tensor, gradient, directions=1, step=step, one_sided=not tensor.any())[
            0
        ]
        for step in _steps(tensor)
    )
    found = next(comparisons)
    for other in comparisons:
        if not found.estimate.error <= 1e-6 * abs(found.estimate.value):
            found = other
    off = abs(found.claimed - found.estimate.value)
    rounding = 10 * torch.finfo(torch.float64).eps * loss().abs().item() / min(_steps(tensor))
    assert off <= 1e-5 * found.scale + rounding, (
        f"{name}: the gradient gives {found.claimed:.12g}, differences {found.estimate.value:.12g} "
        f"± {found.estimate.error:.1g}"
    )


def _steps(tensor: Tensor) -> tuple[float, ...]:
    """How far to move a value for differences, the better one first.

    A decay rate must stay below one. A tiny eps beside far larger roots bears a larger move than
    its own size, which rounding would drown; where it stands under the root itself, it does not.
    """
    size = tensor.detach().abs().max().item() or 0.1
    if tensor.dim() == 0 and size < 1:
        size = min(size, 1 - size)
    return (1e-5, 1e-2 * size) if size < 1e-5 else (1e-2 * size,)


def check_no_effect(setting: Setting, name: str, tensor: Tensor) -> None:
    """A hyperparameter whose gradient is said to be zero does not change the loss."""
    start = setting.trained().loss
    with finite.moved(tensor, torch.full_like(tensor, 1e-4 * tensor.abs().item() or 1e-4)):
        assert setting.trained().loss == start, name


def _compared_with_eager(
    setting: Setting, hyper: dict[str, Tensor], found: dict[str, Tensor]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What eager PyTorch (``differentiable=True``) differentiates alike, and otherwise."""
    expected = eager_gradients(
        setting.model, setting.opt, F.mse_loss, unstack(setting.train), setting.val, found, hyper
    )
    theta = [name for name, _ in setting.model.named_parameters()]
    same, other = [], []
    for name, tensors in {"θ_0": theta, **{k: [k] for k in hyper}}.items():
        pairs = [(found[key], expected.get(key)) for key in tensors]
        if all(gradient is not None for _, gradient in pairs):
            agree = all(relative_error(ours, theirs) <= 1e-10 for ours, theirs in pairs)
            (same if agree else other).append(name)
    return tuple(same), tuple(other)


@contextmanager
def exact_casts(configuration: Configuration) -> Iterator[None]:
    """Muon iterates in bfloat16, whose rounding hides a derivative from differences.

    Here, for both sides, the cast goes to float64.
    """
    if configuration.kind is not torch.optim.Muon:
        yield
        return
    kinds = (Tensor, FunctionalTensor)  # ordinary training, and capture
    before = [kind.bfloat16 for kind in kinds]
    for kind in kinds:
        kind.bfloat16 = kind.double
    try:
        yield
    finally:
        for kind, cast in zip(kinds, before, strict=True):
            kind.bfloat16 = cast
