"""Hoisting: a prologue and steps that read it compute what the steps computed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, fx

from tests.plan.graphs import Sketch, random_graphs, targets
from unrollc.optimize import hoist as hoisting
from unrollc.optimize.hoist import hoist, moved_by
from unrollc.optimize.packed_loop import PackedLoop, Packing
from unrollc.step import Role, StepGraph, Value, verify

aten = torch.ops.aten

T = 3
NONE: frozenset[str] = frozenset()


def loop_of(*steps: StepGraph, sequence: tuple[int, ...] | None = None) -> PackedLoop:
    order = sequence or (0,) * T
    return PackedLoop(steps, order, tuple(range(len(steps))), steps[0], None, Packing())


def run(loop: PackedLoop, given: dict[str, Tensor]) -> list[Tensor]:
    """Every output of every step, the state handed on by label."""
    known = dict(given)
    if loop.prologue is not None:
        args = [known[value.label] for value in loop.prologue.inputs]
        results = loop.prologue.module(*args)
        known.update(zip((v.label for v in loop.prologue.outputs), results, strict=True))
    found = []
    for index in loop.sequence:
        step = loop.steps[index]
        args = [known[value.label] for value in step.inputs]
        results = [result.clone() for result in step.module(*args)]
        found += results
        state = [v.role is Role.THETA for v in step.outputs]
        pairs = zip(step.outputs, results, state, strict=True)
        known.update((value.label, result) for value, result, is_state in pairs if is_state)
    return found


def agree(first: PackedLoop, second: PackedLoop, given: dict[str, Tensor]) -> bool:
    pairs = zip(run(first, given), run(second, given), strict=True)
    return all(torch.allclose(a, b, rtol=1e-12, atol=1e-12, equal_nan=True) for a, b in pairs)


def as_step(graph: StepGraph) -> StepGraph:
    """A random graph as a step that changes `x` and leaves `y` alone; its first result is new x."""
    roles = {"x": Role.THETA, "y": Role.BATCH}
    inputs = tuple(replace(value, role=roles[value.label]) for value in graph.inputs)
    outputs = (Value(Role.THETA, "x", "x_new"), *graph.outputs[1:])
    return replace(graph, inputs=inputs, outputs=outputs)


def numbers() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(3, 3, generator=generator, dtype=torch.float64) / 2 for name in ("x", "y")
    }


@given(random_graphs())
@settings(max_examples=200, deadline=None)
def test_random_steps_keep_their_values(graph: StepGraph) -> None:
    before = loop_of(as_step(graph))
    after = hoist(before, NONE, frozenset(), deep=True)
    for step in (*after.steps, *filter(None, [after.prologue])):
        verify(step)
    assert agree(before, after, numbers())


class Parts:
    """A step ``x' = x * tanh(y)`` in the making."""

    def __init__(self, *, number: float = 1.0) -> None:
        self.sketch = Sketch()
        self.x = self.sketch.input("x", 3, 3, role=Role.THETA)
        self.y = self.sketch.input("y", 3, 3)
        scaled = self.sketch.call(aten.mul.Scalar, self.x, number)
        self.fixed = self.sketch.call(aten.tanh.default, self.y)
        self.new = self.sketch.call(aten.mul.Tensor, scaled, self.fixed)

    def step(self, *more: fx.Node) -> StepGraph:
        return as_step(self.sketch.returning(self.new, *more))


def test_what_both_steps_compute_is_computed_once() -> None:
    before = loop_of(Parts(number=0.5).step(), Parts().step(), sequence=(0, 1, 1))
    after = hoist(before, NONE, frozenset(), deep=True)
    assert after.prologue is not None and targets(after.prologue) == [aten.tanh.default]
    assert all(aten.tanh.default not in targets(step) for step in after.steps)
    assert agree(before, after, numbers())


def test_another_value_of_another_step_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Parts()
    other.fixed.target = aten.sin.default
    before = loop_of(other.step(), Parts().step(), sequence=(0, 1, 1))
    assert agree(before, hoist(before, NONE, frozenset(), deep=True), numbers())
    right = hoisting.numbered  # the broken twin counts every step from one
    monkeypatch.setattr(hoisting, "numbered", lambda step, same, numbers: right(step, same))
    assert not agree(before, hoist(before, NONE, frozenset(), deep=True), numbers())


@pytest.mark.parametrize("sequence", [(0,), (0, 1)], ids=["one step", "each step another"])
def test_what_runs_once_is_left_alone(sequence: tuple[int, ...]) -> None:
    before = loop_of(Parts().step(), Parts(number=2.0).step(), sequence=sequence)
    assert hoist(before, NONE, frozenset(), deep=True) is before


def test_what_has_an_entry_a_step_stays() -> None:
    before = loop_of(Parts().step())
    assert hoist(before, frozenset({"y"}), frozenset(), deep=True) is before


def test_what_a_step_returns_stays_with_what_it_is_a_view_of() -> None:
    parts = Parts()
    flat = parts.sketch.call(aten.view.default, parts.fixed, [9])
    before = loop_of(parts.step(flat))
    assert hoist(before, NONE, frozenset(), deep=True) is before


def test_what_an_inner_gradient_is_read_for_stays() -> None:
    """A first-order gradient stops there, where a prologue would go on."""
    sketch = Sketch()
    x, y = sketch.input("x", 3, 3, role=Role.THETA), sketch.input("y", 3, 3)
    gradient = sketch.call(aten.tanh.default, y)
    moved = sketch.call(aten.sub.Tensor, x, sketch.call(aten.sin.default, gradient))
    step = as_step(sketch.returning(moved, gradient))
    assert hoist(loop_of(step), NONE, frozenset(), deep=True).prologue is not None
    typed = (step.outputs[0], Value(Role.GRADIENT, "x", "grad_x", Role.THETA))
    before = loop_of(replace(step, outputs=typed))
    assert hoist(before, NONE, frozenset(), deep=True) is before


def test_views_are_made_anew() -> None:
    sketch = Sketch()
    x, y = sketch.input("x", 3, 3, role=Role.THETA), sketch.input("y", 3, 3)
    turned = sketch.call(aten.t.default, sketch.call(aten.tanh.default, y))
    before = loop_of(as_step(sketch.returning(sketch.call(aten.mm.default, x, turned))))
    after = hoist(before, NONE, frozenset(), deep=True)
    assert targets(after.steps[0]) == [aten.t.default, aten.mm.default]
    assert agree(before, after, numbers())


def test_numbers_stay() -> None:
    """A number of numbers is made on the way, and so is a vector of one number."""
    sketch = Sketch()
    x, rate = sketch.input("x", 3, 3, role=Role.THETA), sketch.input("rate", role=Role.HYPER)
    spread = sketch.call(aten.clone.default, sketch.call(aten.expand.default, rate, [3, 3]))
    twice = sketch.call(aten.mul.Scalar, rate, 2.0)
    new = sketch.call(aten.mul.Tensor, sketch.call(aten.mul.Tensor, x, spread), twice)
    step = sketch.returning(new)
    before = loop_of(replace(step, outputs=(Value(Role.THETA, "x", "x_new"),)))
    assert hoist(before, NONE, frozenset(), deep=True) is before


@pytest.mark.parametrize("deep", [False, True])
def test_meta_parameters(deep: bool) -> None:
    before = loop_of(Parts().step())
    wanted = frozenset({(Role.BATCH, "y")})
    after = hoist(before, NONE, wanted, deep=deep)
    assert (after.prologue is not None) == deep
    assert bool(moved_by(after.prologue, wanted)) == deep
    assert not moved_by(after.prologue, frozenset({(Role.CONTEXT, "z")}))
