"""The passes over a loop, each alone and all together, on random optimizers' loops."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from tests.plan.graphs import Sketch
from unrollc.optimize import packed_step
from unrollc.optimize.congruence import Key, key_of
from unrollc.optimize.hoist import hoist
from unrollc.optimize.packed_loop import PackedLoop, Packing
from unrollc.optimize.packing import PASSES, LoopPass, pack_alike
from unrollc.step import STATE_ROLES, Phase, Role, StepGraph, Value, verify

aten = torch.ops.aten

T = 4
SHAPES = ((2, 3), (4,), (1, 2), (3,), ())


def hoist_all(loop: PackedLoop) -> PackedLoop:
    return hoist(loop, frozenset(), frozenset(), deep=True)


EVERY: tuple[LoopPass, ...] = (*PASSES, hoist_all)

#: One op of an update: what it does, and the places of its operands among the values so far.
Op = tuple[Any, tuple[int, ...]]

UNARY = (aten.tanh.default, aten.sigmoid.default, aten.neg.default)
BINARY = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor)


@dataclass(frozen=True)
class Rule:
    """A random elementwise update, the same for all parameters but those that scale otherwise.

    Attributes:
        ops: Ops on ``[θ, gradient, memory, rate, count]`` and on their own results.
        scales: A number for each parameter, by which the last result is multiplied.
    """

    ops: tuple[Op, ...]
    scales: tuple[float, ...]


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    ops: list[Op] = []
    for count in range(5, 5 + draw(st.integers(2, 9))):
        places = st.integers(0, count - 1)
        if draw(st.booleans()):
            ops.append((draw(st.sampled_from(UNARY)), (draw(places),)))
        else:
            ops.append((draw(st.sampled_from(BINARY)), (draw(places), draw(places))))
    scales = tuple(draw(st.sampled_from([0.5, 0.5, 0.5, 0.25])) for _ in SHAPES)
    return Rule(tuple(ops), scales)


def step_of(rule: Rule, *, first: bool = False) -> StepGraph:
    """One step: a loss of parameters and batch, its gradients, the update with its counters, which
    the first step makes.
    """
    sketch = Sketch()
    theta = [sketch.input(f"p{i}", *shape, role=Role.THETA) for i, shape in enumerate(SHAPES)]
    memory = [sketch.input(f"m{i}", *shape, role=Role.OPT_STATE) for i, shape in enumerate(SHAPES)]
    counts = [sketch.input(f"c{i}", role=Role.OPT_STATE) for i in range(len(SHAPES))]
    rate, x = sketch.input("rate", role=Role.HYPER), sketch.input("x", 5)
    level = sketch.call(aten.mean.default, sketch.call(aten.tanh.default, x))
    parts = [sketch.call(aten.sum.default, sketch.call(aten.mul.Tensor, p, level)) for p in theta]
    loss = parts[0]
    for part in parts[1:]:
        loss = sketch.call(aten.add.Tensor, loss, part)
    gradients = [
        sketch.call(
            aten.mul.Tensor,
            sketch.call(aten.sin.default, p, phase=Phase.GRADIENT),
            level,
            phase=Phase.GRADIENT,
        )
        for p in theta
    ]
    results: list[tuple[Value, fx.Node]] = []

    def update(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return sketch.call(target, *args, phase=Phase.UPDATE, **kwargs)

    for i, p in enumerate(theta):
        before = update(aten.zeros.default, [], dtype=torch.float64) if first else counts[i]
        count = update(aten.add.Tensor, before, 1)
        known = [p, gradients[i], memory[i], rate, count]
        for target, places in rule.ops:
            known.append(update(target, *(known[place] for place in places)))
        last = update(aten.mul.Scalar, known[-1], rule.scales[i])
        moved = update(aten.sub.Tensor, p, last)
        kept = update(aten.add.Tensor, update(aten.mul.Scalar, memory[i], 0.5), gradients[i])
        for role, name, node in (
            (Role.THETA, f"p{i}", moved),
            (Role.OPT_STATE, f"m{i}", kept),
            (Role.OPT_STATE, f"c{i}", count),
        ):
            results.append((Value(role, name, name), node))
    results.append((Value(Role.LOSS, "loss", "loss"), loss))
    for i, gradient in enumerate(gradients):
        results.append((Value(Role.GRADIENT, f"p{i}", f"g{i}", Role.THETA), gradient))
    step = sketch.returning(*(node for _, node in results))
    return replace(step, outputs=tuple(value for value, _ in results))


def validation() -> StepGraph:
    sketch = Sketch()
    parts = [
        sketch.call(aten.sum.default, sketch.input(f"p{i}", *shape, role=Role.THETA))
        for i, shape in enumerate(SHAPES)
    ]
    loss = parts[0]
    for part in parts[1:]:
        loss = sketch.call(aten.add.Tensor, sketch.call(aten.tanh.default, loss), part)
    return sketch.returning(loss)


def loop_of(rule: Rule) -> PackedLoop:
    steps = (step_of(rule, first=True), step_of(rule))
    return PackedLoop(steps, (0, *[1] * (T - 1)), (0, 1), validation(), None, Packing())


def outcome(loop: PackedLoop) -> dict[Key, Tensor]:
    """Inner losses, the validation loss and the last state as the user knows it."""
    generator = torch.Generator().manual_seed(0)
    first = loop.steps[loop.sequence[0]]
    known: dict[Key, Tensor] = {
        key_of(value): torch.randn(node.meta["val"].shape, generator=generator, dtype=torch.float64)
        for value, node in zip(first.inputs, first.placeholders, strict=True)
        if value.role is not Role.INVARIANT
    }
    if loop.prologue is not None:
        fixed = loop.prologue.module(*(known[key_of(value)] for value in loop.prologue.inputs))
        known.update(zip(map(key_of, loop.prologue.outputs), fixed, strict=True))
    found: dict[Key, Tensor] = {}
    for number, index in enumerate(loop.sequence):
        step = loop.steps[index]
        results = step.module(*(known[key_of(value)] for value in step.inputs))
        for value, result in zip(step.outputs, results, strict=True):
            if value.role is Role.LOSS:
                found[Role.LOSS, str(number)] = result
        pairs = list(zip(step.outputs, results, strict=True))
        known.update((key_of(v), result) for v, result in pairs if v.role in STATE_ROLES)
    (loss,) = loop.val.module(*(known[key_of(value)] for value in loop.val.inputs))
    last = [value for value, _ in loop.steps[loop.sequence[-1]].outputs_with(*STATE_ROLES)]
    state = loop.packing.unpacked(last, [known[key_of(value)] for value in last])
    return {**found, (Role.LOSS, "val"): loss, **state}


def agree(first: PackedLoop, second: PackedLoop) -> bool:
    one, other = outcome(first), outcome(second)
    assert one.keys() == other.keys()
    return all(torch.allclose(one[k], other[k], rtol=1e-12, atol=1e-12) for k in one)


@given(rules(), st.sampled_from(EVERY))
@settings(max_examples=40, deadline=None)
def test_each_pass_alone(rule: Rule, rewrite: LoopPass) -> None:
    before = loop_of(rule)
    after = rewrite(before)
    for graph in (*after.steps, after.val):
        verify(graph)
    assert agree(before, after)


@given(rules())
@settings(max_examples=25, deadline=None)
def test_all_passes_together(rule: Rule) -> None:
    before = after = loop_of(rule)
    for rewrite in EVERY:
        after = rewrite(after)
    assert agree(before, after)


RULE = Rule(
    (
        (aten.mul.Tensor, (1, 3)),
        (aten.tanh.default, (5,)),
        (aten.add.Tensor, (6, 2)),
        (aten.sigmoid.default, (7,)),
        (aten.mul.Tensor, (8, 1)),
    ),
    (0.5, 0.5, 0.5, 0.25, 0.5),
)


def test_the_passes_have_work() -> None:
    after = loop_of(RULE)
    for rewrite in EVERY:
        after = rewrite(after)
    (group,) = after.packing.groups
    assert [key[1] for key in group.packs[0].members] == ["p0", "p1", "p2"]
    assert after.packing.same and after.prologue is not None


def test_a_wrong_part_of_a_vector_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = packed_step._Writer._part

    def wrong(self: Any, nodes: Any, index: int, *, inner: bool) -> fx.Node:
        return right(self, nodes, 2 if index == 0 and inner else index, inner=inner)

    same = Rule(RULE.ops, (0.5,) * len(SHAPES))
    before = loop_of(same)
    assert agree(before, pack_alike(before))
    monkeypatch.setattr(packed_step._Writer, "_part", wrong)
    with pytest.raises((AssertionError, RuntimeError)):
        assert agree(before, pack_alike(before))
