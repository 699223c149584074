"""Every derivative of every elementwise optimizer against differences of the real optimizer."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from tests.requirements.updates import derived, evaluated, number
from unrollc.requirements.calculus.derivation import Derivation

# ASGD keeps its rate in a tensor of the default dtype.
pytestmark = pytest.mark.usefixtures("float64")

#: Name, class, settings, step count before the step.
OPTIMIZERS: tuple[tuple[str, Any, dict[str, Any], int], ...] = (
    ("SGD", optim.SGD, {"lr": 0.1, "weight_decay": 0.1}, 3),
    ("momentum", optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2}, 3),
    ("Nesterov", optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, 3),
    ("Adagrad", optim.Adagrad, {"lr_decay": 0.1, "weight_decay": 0.1}, 3),
    ("Adam", optim.Adam, {"weight_decay": 0.1}, 3),
    ("AMSGrad", optim.Adam, {"amsgrad": True}, 3),
    ("AdamW", optim.AdamW, {}, 3),
    ("RMSprop", optim.RMSprop, {"weight_decay": 0.1}, 3),
    ("RMSprop with momentum", optim.RMSprop, {"momentum": 0.9}, 3),
    ("centred RMSprop", optim.RMSprop, {"centered": True}, 3),
    ("Adadelta", optim.Adadelta, {}, 3),
    ("Adamax", optim.Adamax, {}, 3),
    ("NAdam", optim.NAdam, {}, 3),
    ("NAdamW", optim.NAdam, {"decoupled_weight_decay": True, "weight_decay": 0.1}, 3),
    ("RAdam, plain", optim.RAdam, {}, 3),
    ("RAdam, rectified", optim.RAdam, {}, 9),
    ("ASGD", optim.ASGD, {"weight_decay": 0.1}, 3),
    ("Rprop", optim.Rprop, {}, 3),
)

#: Ranges from which values are drawn; anything else comes from [0.1, 0.9].
SPANS = {
    "theta": (-1.0, 1.0),
    "grad": (-1.0, 1.0),
    "exp_avg": (-1.0, 1.0),
    "momentum_buffer": (-1.0, 1.0),
    "prev": (-1.0, 1.0),
    "grad_avg": (-0.1, 0.1),
    "square_avg": (0.2, 1.0),
    "betas[0]": (0.8, 0.95),
    "betas[1]": (0.95, 0.999),
    "etas[1]": (1.1, 1.3),
    "step_sizes[0]": (1e-4, 1e-3),
    "mu_product": (0.1, 0.3),
    "t0": (1e6, 1e6),
}


def derivation_of(optimizer: Any, settings: dict[str, Any], count: int) -> Derivation:
    """The derivation of the step that follows `count` steps (RAdam's two branches differ)."""
    rectified = optimizer is optim.RAdam and count > 5
    which = -2 if optimizer is optim.RAdam and not rectified else -1
    steps = 9 if optimizer is optim.RAdam else 3
    return derived(optimizer, steps=steps, which=which, **settings)


def drawn(derivation: Derivation, count: int, seed: int) -> dict[str, float]:
    generator = random.Random(seed)
    values = {k: generator.uniform(*SPANS.get(k, (0.1, 0.9))) for k in derivation.inputs}
    return values | {"step": float(count)}


def real_step(
    optimizer: Any, settings: dict[str, Any], derivation: Derivation, values: dict[str, float]
) -> dict[str, float]:
    """θ' and the new state of one step of the real optimizer at `values`."""
    parameter = nn.Parameter(torch.tensor([values["theta"]], dtype=torch.float64))
    opt = optimizer([parameter], **settings)
    group = opt.param_groups[0]
    for key, value in values.items():
        name, _, place = key.partition("[")
        if name in group and place:
            index = int(place.rstrip("]"))
            group[name] = (*group[name][:index], value, *group[name][index + 1 :])
        elif name in group:
            group[name] = value
    scalars = ("step", "mu_product", "eta", "mu")
    state: dict[str, Tensor] = {"mu": torch.ones(())} if optimizer is optim.ASGD else {}
    for key in (*values, *derivation.results):
        if key not in group and key not in ("theta", "grad"):
            shape = () if key in scalars else (1,)
            start = values.get(key, 1.0)
            state[key] = torch.full(shape, start, dtype=torch.float64)
    opt.state[parameter] = state
    parameter.grad = torch.tensor([values["grad"]], dtype=torch.float64)
    opt.step()
    new = opt.state[parameter]
    return {
        key: parameter.item() if key == "theta" else new[key].item() for key in derivation.results
    }


def slope(
    optimizer: Any,
    settings: dict[str, Any],
    derivation: Derivation,
    values: dict[str, float],
    by: str,
    *,
    ends: tuple[float, float],
) -> dict[str, float]:
    """Difference quotients between `values` with `by` moved by each of two amounts."""
    low, high = (
        real_step(optimizer, settings, derivation, values | {by: values[by] + end}) for end in ends
    )
    return {key: (high[key] - low[key]) / (ends[1] - ends[0]) for key in high}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case[0])
def test_derivatives_agree_with_central_differences(case: Any, seed: int) -> None:
    _, optimizer, settings, count = case
    derivation = derivation_of(optimizer, settings, count)
    values = drawn(derivation, count, seed)
    known = evaluated(derivation, values)
    real = real_step(optimizer, settings, derivation, values)
    for key, symbol in derivation.results.items():
        assert math.isclose(known[symbol], real[key], rel_tol=1e-10, abs_tol=1e-12), key
    for by in derivation.inputs:
        if by == "step":
            continue
        # The truncation of a central difference, and rounding divided by the step.
        width = 1e-5
        quotients = slope(optimizer, settings, derivation, values, by, ends=(-width, width))
        for key, quotient in quotients.items():
            claimed = number(derivation.derivatives.get((key, by), 0), known)
            assert math.isclose(claimed, quotient, rel_tol=2e-6, abs_tol=1e-8), (key, by)


#: Updates with a removable singularity, and their inputs that are zero there.
SINGULAR: dict[str, tuple[str, ...]] = {
    "Adagrad": ("sum",),
    "Adam": ("exp_avg", "exp_avg_sq"),
    "AMSGrad": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "AdamW": ("exp_avg", "exp_avg_sq"),
    "RMSprop": ("square_avg",),
    "RMSprop with momentum": ("square_avg",),
    "centred RMSprop": ("square_avg", "grad_avg"),
    "NAdam": ("exp_avg", "exp_avg_sq"),
    "RAdam, rectified": ("exp_avg", "exp_avg_sq"),
}


@pytest.mark.parametrize("name", SINGULAR)
def test_limits_at_singular_points_agree_with_one_sided_differences(name: str) -> None:
    _, optimizer, settings, count = next(case for case in OPTIMIZERS if case[0] == name)
    derivation = derivation_of(optimizer, settings, count)
    (point,) = (point for point in derivation.points if point.kind == "root")
    assert point.removable and point.limits
    values = drawn(derivation, count, 0) | dict.fromkeys(SINGULAR[name], 0.0)
    # Where G is corrected for weight decay, the corrected gradient is what vanishes.
    decay = 0.0 if optimizer is optim.AdamW else values.get("weight_decay", 0.0)
    values["grad"] = -decay * values["theta"]
    known = evaluated(derivation, values)
    for result, by in point.limits:
        limit = number(point.limits[result, by], known)
        for side in (1e-8, -1e-8):
            # A second moment is not negative, nor less than the square of the mean.
            if by == "grad_avg" or (side < 0 and by in (*SINGULAR[name], "betas[1]", "alpha")):
                continue
            quotients = slope(optimizer, settings, derivation, values, by, ends=(0.0, side))
            assert math.isclose(limit, quotients[result], rel_tol=1e-5, abs_tol=1e-6), (result, by)


def test_a_wrong_derivative_is_found() -> None:
    """The broken twin: with Adam's ε inside the root, differences say so."""
    derivation = derivation_of(optim.Adam, {}, 3)
    values = drawn(derivation, 3, 0)
    known = evaluated(derivation, values)
    quotients = slope(optim.Adam, {}, derivation, values, "eps", ends=(-1e-5, 1e-5))
    right = number(derivation.derivatives["theta", "eps"], known)
    m, v, h = (next(s for s in known if str(s) == name) for name in ("m′", "v′", "h"))
    wrong = right / (2 * known[h])
    assert known[m] and known[v] and math.isclose(right, quotients["theta"], rel_tol=2e-6)
    assert not math.isclose(wrong, quotients["theta"], rel_tol=1e-3)
