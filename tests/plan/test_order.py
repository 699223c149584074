"""The order of ops: the same bits, and never a higher peak."""

import pytest
import torch
from hypothesis import given, settings

from tests.plan.graphs import Sketch, random_graphs, values_for
from unrollc.plan import order
from unrollc.plan.order import RULES, in_lean_order
from unrollc.step import Phase, StepGraph, iterate_calls, verify

aten = torch.ops.aten


def late_readers(layers: int, *, side: int = 128) -> StepGraph:
    """A chain whose every value is squared, the squares all made before the first is read."""
    sketch = Sketch()
    value = sketch.input("x", side, side)
    squares = []
    for _ in range(layers):
        value = sketch.call(aten.tanh.default, value)
    for n in range(layers):
        squares.append(sketch.call(aten.mul.Scalar, value, n + 2.0, phase=Phase.GRADIENT))
    total = sketch.call(aten.sum.default, value, phase=Phase.ADJOINT)
    for square in squares:
        part = sketch.call(aten.sum.default, square, phase=Phase.ADJOINT)
        total = sketch.call(aten.add.Tensor, total, part, phase=Phase.ADJOINT)
    return sketch.returning(total)


def test_what_one_reader_needs_is_made_right_before_it() -> None:
    step = late_readers(8)
    size = 128 * 128 * 8
    assert order._peak(step) >= 8 * size
    lean = in_lean_order(step)
    verify(lean)
    assert order._peak(lean) <= 3 * size
    x = torch.randn(128, 128, dtype=torch.float64)
    assert torch.equal(step.module(x)[0], lean.module(x)[0])


def test_an_order_that_gains_nothing_is_left() -> None:
    sketch = Sketch()
    value = sketch.input("x", 128, 128)
    for _ in range(4):
        value = sketch.call(aten.tanh.default, value)
    step = sketch.returning(value)
    assert in_lean_order(step) is step


@settings(max_examples=150, deadline=None)
@given(random_graphs())
def test_random_graphs_compute_the_same_bits_in_no_more_memory(step: StepGraph) -> None:
    given_values = values_for(step)
    expected = step.module(*given_values)
    for rule in RULES:
        placed = order._placed(step, rule)
        verify(placed)
        assert len(list(iterate_calls(placed))) == len(list(iterate_calls(step)))
        for a, b in zip(expected, placed.module(*given_values), strict=True):
            assert torch.equal(a, b)
    assert order._peak(in_lean_order(step)) <= order._peak(step)


def test_an_order_that_forgets_an_operand_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "_op_of", lambda node: None)
    with pytest.raises(RuntimeError, match="used before it has been defined"):
        in_lean_order(late_readers(4))
