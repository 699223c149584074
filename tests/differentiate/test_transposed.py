"""⟨u, J v⟩ = ⟨Jᵀ u, v⟩: a step's forward mode against its reverse mode, on random vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from tests.differentiate.steps import captured
from tests.differentiate.test_guarded import DROPPED, Rows, linear
from tests.differentiate.test_symmetry import PROVED
from tests.oracles.models import CLASSES
from unrollc.differentiate.adjoint import Key, StepAdjoint
from unrollc.differentiate.reverse import reverse_adjoint
from unrollc.differentiate.tangent import Direction, step_tangent, tangent_obstacle
from unrollc.optimize.simplify import simplify
from unrollc.step import Role, StepGraph

pytestmark = pytest.mark.usefixtures("float64", "short_loops_too")


def moving_state(step: StepGraph) -> frozenset[Key]:
    """What one step hands to the next, counters left out."""
    read = {v.label: n for v, n in step.inputs_with(Role.THETA, Role.OPT_STATE)}
    return frozenset(
        (v.role, v.label)
        for v, n in step.outputs_with(Role.THETA, Role.OPT_STATE)
        if n is not None and not read[v.label].meta.get("counter")
    )


def products(
    step: StepGraph, given: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Random vectors u and v with Jᵀu and Jv, by label of the state."""
    generator = torch.Generator().manual_seed(5)
    live = moving_state(step)
    adjoint: StepAdjoint = reverse_adjoint(step, frozenset(), live)
    nowhere = Direction((Role.HYPER, "nothing"), ())
    tangent = step_tangent(step, [nowhere], frozenset((0, key) for key in live))
    vectors: dict[tuple[Role, str], Tensor] = {}

    def run(graph: StepGraph) -> dict[tuple[Role, str], Tensor]:
        values = []
        for value, node in zip(graph.inputs, graph.placeholders, strict=True):
            like = node.meta["val"]
            if value.role is Role.CONSTANT:
                values.append(graph.constants[value.name])
            elif value.role in (Role.TANGENT, Role.COTANGENT):
                drawn = torch.randn(like.shape, generator=generator)
                values.append(vectors.setdefault((value.role, value.label), drawn))
            else:
                values.append(given[value.label])
        with torch.no_grad():
            results = graph.module(*values)
        pairs = zip(graph.outputs, results, strict=True)
        return {(v.role, v.label): r for v, r in pairs if r is not None}

    pulled, pushed = run(simplify(adjoint.graph)), run(simplify(tangent))
    return (
        {label: t for (role, label), t in vectors.items() if role is Role.COTANGENT},
        {label: t for (role, label), t in pushed.items() if role is Role.TANGENT},
        {label: t for (role, label), t in pulled.items() if role is Role.COTANGENT},
        {label: t for (role, label), t in vectors.items() if role is Role.TANGENT},
    )


def dot(first: dict[str, Tensor], second: dict[str, Tensor]) -> Tensor:
    """Labels that one side lacks are structural zeros there."""
    terms = [(first[label] * second[label]).sum() for label in first.keys() & second.keys()]
    return torch.stack(terms).sum()


def assert_transposed(step: StepGraph, given: dict[str, Tensor], rtol: float = 1e-12) -> None:
    u, pushed, pulled, v = products(step, given)
    forward, reverse = dot(u, pushed), dot(pulled, v)
    scale = sum(t.norm() for t in u.values()) * sum(t.norm() for t in pushed.values())
    assert forward.isfinite() and abs(forward - reverse) <= rtol * scale


def near_start(step: StepGraph, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """θ_0, classes, a state that a few steps may have left."""
    generator = torch.Generator().manual_seed(9)
    theta = {name: p.detach() for name, p in model.named_parameters()}
    given = {}
    for value, node in zip(step.inputs, step.placeholders, strict=True):
        like = node.meta["val"]
        if value.role is Role.THETA:
            given[value.label] = theta[value.label]
        elif value.label == "train.inputs":
            given[value.label] = x
        elif value.role is Role.BATCH:
            given[value.label] = torch.arange(like.numel()).reshape(like.shape) % CLASSES
        elif value.label.endswith('["step"]'):
            given[value.label] = torch.tensor(3.0)
        else:
            drawn = torch.rand(like.shape, generator=generator) + 0.1
            given[value.label] = drawn.to(like.dtype)
    return given


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.8),
    "adam": lambda params: torch.optim.Adam(params, lr=0.1, eps=1e-2),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", PROVED)
def test_ordinary_models(name: str, optimizer: str) -> None:
    build, data = PROVED[name]
    torch.manual_seed(3)
    model, x = build(), data()
    opt = OPTIMIZERS[optimizer](model.parameters())
    step = captured(model, opt, F.cross_entropy, (x, torch.arange(len(x)) % CLASSES))
    assert tangent_obstacle(step) is None
    assert_transposed(step, near_start(step, model, x))


@pytest.mark.parametrize("name", DROPPED)
def test_what_a_selection_drops(name: str) -> None:
    """Forward mode needs no guard where reverse mode needs one."""
    torch.manual_seed(3)
    model, x = Rows(DROPPED[name]), torch.randn(4, 3)
    opt = torch.optim.SGD([model.w], lr=0.1)
    step = captured(model, opt, linear, (x, torch.zeros(())))
    given = {"w": model.w.detach(), "scale": model.scale.detach(), "train.inputs": x}
    assert_transposed(step, {**near_start(step, model, x), **given})


class Rounded(Function):
    """A straight-through ``round``, twice as steep as its declared derivative says."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 0.5 * cotangent


class Straight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 6)
        self.output = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(torch.tanh(Rounded.apply(self.hidden(x))).square())


def test_a_declared_derivative_is_the_same_in_both_modes() -> None:
    torch.manual_seed(3)
    model, x = Straight(), torch.randn(5, 4)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8)
    step = captured(model, opt, F.cross_entropy, (x, torch.arange(5) % CLASSES))
    assert tangent_obstacle(step) is None
    assert_transposed(step, near_start(step, model, x))


def test_the_padding_row_is_a_real_difference() -> None:
    """The broken twin: without the obstacle the two modes would disagree."""
    torch.manual_seed(3)
    build, data = PROVED["embedding"]
    model, x = build(padding_idx=0), data()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    step = captured(model, opt, F.cross_entropy, (x, torch.arange(len(x)) % CLASSES))
    assert tangent_obstacle(step) is not None
    with pytest.raises(AssertionError):
        assert_transposed(step, near_start(step, model, x), rtol=1e-6)
