"""Roots of updates: removable where the limit exists, refused in the broken twins; and kinks."""

from __future__ import annotations

import linecache
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, optim

from tests.requirements.updates import captured, derived
from unrollc.requirements.calculus.derive import derive
from unrollc.requirements.calculus.singular import NEVER, removable, root_verdicts

#: Class, settings, how many of each step's roots there are.
REMOVABLE: tuple[tuple[Any, dict[str, Any], int], ...] = (
    (optim.Adam, {}, 1),
    (optim.Adam, {"amsgrad": True, "weight_decay": 0.1}, 1),
    (optim.AdamW, {}, 1),
    (optim.AdamW, {"amsgrad": True}, 1),
    (optim.NAdam, {}, 1),
    (optim.RAdam, {}, 1),
    (optim.RMSprop, {}, 1),
    (optim.RMSprop, {"centered": True}, 1),
    (optim.RMSprop, {"momentum": 0.9}, 1),
    (optim.RMSprop, {"centered": True, "momentum": 0.9}, 1),
    (optim.Adagrad, {}, 1),
    (optim.Adadelta, {}, 2),
)


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize(("optimizer", "settings", "count"), REMOVABLE)
def test_the_roots_of_torch_are_removable(
    optimizer: Any, settings: dict[str, Any], count: int, symbolic: bool
) -> None:
    steps = captured(optimizer, steps=9, symbolic=symbolic, **settings)
    for step in steps:
        verdicts = root_verdicts(step)
        elementwise = {n: v for n, v in verdicts.items() if n.meta["val"].dim()}
        # RAdam takes no root while its moving average is short.
        plain = optimizer is optim.RAdam and step is not steps[-1]
        assert len(elementwise) == (0 if plain else count)
        assert all(verdict.removable for verdict in elementwise.values())
        assert elementwise.keys() <= removable(step).keys()
        if optimizer is optim.Adadelta:  # its ε stands under the root
            assert all(verdict.reason.startswith(NEVER) for verdict in elementwise.values())


@pytest.mark.parametrize(("optimizer", "settings", "count"), REMOVABLE)
def test_without_an_epsilon_none_is(optimizer: Any, settings: dict[str, Any], count: int) -> None:
    """The update itself is 0/0 there."""
    for step in captured(optimizer, steps=9, symbolic=False, **settings, eps=0.0):
        assert removable(step) == {}


class Handmade(optim.Optimizer):
    """An update written as a function of θ, G and a state s, which returns the new θ and s."""

    def __init__(self, params: Any, rule: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__(params, {"lr": 0.1})
        self.rule = rule

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            state.setdefault("s", torch.zeros_like(param))
            new, s = self.rule(param, param.grad, state["s"])
            state["s"] = s
            param.copy_(new)


Rule = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

REFUSED: dict[str, Rule] = {
    "the root alone": lambda x, g, s: (x - (s + g * g).sqrt(), s + g * g),
    "a root that is squared": lambda x, g, s: (x - g * (s + g).sqrt().square(), s),
    "the square of a root": lambda x, g, s: (x - (s + g * g).sqrt() ** 2, s + g * g),
    "two equal roots": lambda x, g, s: (x - g.sqrt() * g.pow(0.5), s),
    "a square beside a product": lambda x, g, s: (
        x - g * (root := (s + g * g).sqrt()) - root.square(),
        s + g * g,
    ),
    "a factor that jumps": lambda x, g, s: (x - g.sign() * (s + g * g).sqrt(), s + g * g),
    "a factor with a pole": lambda x, g, s: (
        x - g / (s + g * g) * (s + g * g).sqrt(),
        s + g * g,
    ),
    "a factor that is a root": lambda x, g, s: (x - s.abs().sqrt() * g.abs().sqrt(), s),
    "an inverse root": lambda x, g, s: (x - g * (s + g * g).rsqrt(), s + g * g),
    "a root as state": lambda x, g, s: (x - g / ((root := (s + g * g).sqrt()) + 1e-8), root),
    "neighbours": lambda x, g, s: (x - g * (s + g * g).sqrt().roll(1), s + g * g),
    "a case on the root": lambda x, g, s: (
        x - torch.where(g.abs().sqrt() > 0, g.abs().sqrt(), g),
        s,
    ),
}

PASSED: dict[str, Rule] = {
    "a factor": lambda x, g, s: (x - g * (s + g * g).sqrt(), s + g * g),
    "two factors": lambda x, g, s: (
        x - g * g * (root := (s + g * g).sqrt()) / (root + 1e-3),
        s + g * g,
    ),
    "a cube root": lambda x, g, s: (x - g / ((s + g * g) ** (1 / 3) + 1e-8), s + g * g),
    "ε under the root": lambda x, g, s: (x - (s + g * g + 1e-8).sqrt(), s + g * g),
    "an inverse root of ε": lambda x, g, s: (x - g * (s + g * g + 1e-8).rsqrt(), s + g * g),
    "a clamped rate": lambda x, g, s: (
        x - g * (0.1 / ((s + g * g).sqrt() + 1e-8)).clamp(0.01, 1.0),
        s + g * g,
    ),
    "a clipped norm": lambda x, g, s: (
        x - g * (1.0 / ((g * g).sum().sqrt() + 1e-6)).clamp(max=1.0),
        s,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_limit_is_refused(name: str) -> None:
    step = captured(Handmade, rule=REFUSED[name])[-1]
    verdicts = root_verdicts(step)
    assert verdicts and not any(verdict.removable for verdict in verdicts.values())
    assert removable(step) == {}


@pytest.mark.parametrize("name", PASSED)
def test_what_has_a_limit_passes(name: str) -> None:
    step = captured(Handmade, rule=PASSED[name])[-1]
    verdicts = root_verdicts(step)
    assert verdicts and removable(step).keys() == verdicts.keys()


def test_state_that_can_turn_negative_is_not_taken_as_positive() -> None:
    """A mean of gradients has any sign, so ε does not keep the root away from zero."""

    def rule(x: Tensor, g: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return x - (s + 1e-3).sqrt(), 0.9 * s + 0.1 * g

    assert removable(captured(Handmade, rule=rule)[-1]) == {}


# --- kinks, jumps and poles -------------------------------------------------------------------


def line_of(source: Any) -> str:
    return linecache.getline(source.file, source.line)


@pytest.mark.parametrize(
    ("optimizer", "settings", "kind", "op", "text"),
    [
        (optim.Adamax, {}, "kink", "abs", "grad.abs()"),
        (optim.Adamax, {}, "kink", "maximum", "torch.maximum("),
        (optim.Adam, {"amsgrad": True}, "kink", "maximum", "torch.maximum("),
        (optim.Rprop, {}, "jump", "sign", "sign()"),
        (optim.Rprop, {}, "kink", "clamp", "clamp_(step_size_min, step_size_max)"),
        (optim.Rprop, {}, "jump", "gt", "sign.gt(0)"),
        (optim.Adam, {}, "root", "sqrt", "exp_avg_sq.sqrt()"),
        (optim.Muon, {}, "kink", "clamp", "clamp"),
    ],
)
def test_what_is_not_smooth_is_named_with_its_line(
    optimizer: Any, settings: dict[str, Any], kind: str, op: str, text: str
) -> None:
    derivation = derived(optimizer, **settings)
    found = [p for p in derivation.points if (p.kind, p.op) == (kind, op)]
    assert found
    assert any(text in line_of(point.source) for point in found)
    assert all(Path(point.source.file).parent.name == "optim" for point in found)


def clipped(x: Tensor, g: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    return x - 0.1 * g.clamp(-1.0, 1.0), s  # the clip


def test_a_clip_has_a_kink_at_both_bounds() -> None:
    (derivation,) = derive(captured(Handmade, rule=clipped)[-1])
    assert [point.kind for point in derivation.points] == ["kink", "kink"]
    assert all("the clip" in line_of(point.source) for point in derivation.points)
    G = derivation.inputs["grad"]
    assert {point.equations for point in derivation.points} == {(G + 1,), (G - 1,)}
    slope = derivation.derivative("theta", "grad")
    assert [float(slope.subs(G, value)) for value in (-2, 0, 2)] == [0, -0.1, 0]
    assert derivation.points_of("theta", "grad") == derivation.points
    assert derivation.points_of("theta", "theta") == ()


def test_a_sign_has_derivative_zero() -> None:
    (derivation,) = derive(captured(Handmade, rule=lambda x, g, s: (x - 0.1 * g.sign(), s))[-1])
    assert derivation.derivatives.keys() == {("theta", "theta"), ("s", "s")}
    (point,) = derivation.points
    assert point.kind == "jump" and point.equations == (derivation.inputs["grad"],)


def test_a_smooth_update_has_no_points() -> None:
    assert derived(optim.SGD, lr=0.1, momentum=0.9).points == ()
    assert derived(optim.Adadelta).points == ()


# --- op level, sharing and printing -----------------------------------------------------------


@pytest.mark.parametrize("optimizer", [optim.Muon, optim.Adafactor])
def test_what_mixes_elements_is_decided_at_op_level(optimizer: Any) -> None:
    derivation = derived(optimizer)
    assert derivation.obstacle is not None and derivation.obstacle.source is not None
    assert "is not elementwise" in str(derivation)
    assert "decided at op level" in derivation.text
    assert not derivation.derivatives


class Coupled(optim.Optimizer):
    """Each parameter steps by the first one's gradient."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        params = self.param_groups[0]["params"]
        for param in params:
            param.sub_(param.grad * params[0].grad)


class Pair(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Parameter(torch.ones(2))
        self.second = torch.nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return ((self.first + self.second) * x).sum()


def test_parameters_with_one_update_share_a_derivation() -> None:
    (derivation,) = derive(captured(optim.Adam, model=Pair())[-1])
    assert derivation.parameters == ("first", "second")


def test_an_update_that_reads_another_parameter_is_no_elementwise_one() -> None:
    first, second = derive(captured(Coupled, model=Pair())[-1])
    assert first.obstacle is None
    assert second.obstacle is not None and "first" in second.obstacle.reason


def test_a_derivation_prints() -> None:
    derivation = derived(optim.RMSprop)
    assert "s′ = G^2*(1 - α) + s*α" in derivation.text.splitlines()[2]
    assert "  removable singularity where s = 0 and G = 0" in derivation.text
    assert r"\theta' &= - \frac{G \eta}{h} + \theta \\" in derivation.latex
