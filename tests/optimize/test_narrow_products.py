"""Narrow products with a shared operand: one product, the same numbers."""

import pytest
import torch
from hypothesis import given, settings
from torch import fx

from tests.plan.graphs import Sketch, random_graphs, targets, values_for
from unrollc.optimize import narrow_products
from unrollc.optimize.narrow_products import merge_narrow_products
from unrollc.step import Phase, StepGraph, verify

aten = torch.ops.aten


def agree(first: StepGraph, second: StepGraph) -> bool:
    given = values_for(first)
    pairs = zip(first.module(*given), second.module(*given), strict=True)
    return all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in pairs)


def products(step: StepGraph) -> int:
    return sum(target in (aten.mm.default, aten.addmm.default) for target in targets(step))


def tall() -> tuple[Sketch, fx.Node]:
    """A matrix that is read by what the tests add."""
    sketch = Sketch()
    return sketch, sketch.input("a", 200, 8)


def test_columns_are_put_side_by_side() -> None:
    sketch, a = tall()
    parts = [sketch.input(f"b{n}", 8, n) for n in (1, 3, 2)]
    before = sketch.returning(*(sketch.call(aten.mm.default, a, b) for b in parts))
    after = merge_narrow_products(before)
    assert products(after) == 1
    assert agree(before, after)
    assert products(before) == 3, "the graph that was given is left as it is"


def test_primal_and_tangent_are_put_one_below_the_other() -> None:
    """``[g; ġ] @ W``, with the bias that the primal alone has."""
    sketch = Sketch()
    g, tangent, bias = sketch.input("g", 2, 9), sketch.input("t", 2, 9), sketch.input("bias", 7)
    w = sketch.call(aten.t.default, sketch.input("w", 70, 9))
    wide = sketch.input("wide", 70)
    primal = sketch.call(aten.addmm.default, wide, g, w)
    moved = sketch.call(
        aten.mm.default, sketch.call(aten.mul.Tensor, tangent, g), w, phase=Phase.ADJOINT
    )
    out = sketch.call(aten.mul.Tensor, primal, moved)
    before = sketch.returning(out, sketch.call(aten.neg.default, bias))
    after = merge_narrow_products(before)
    assert products(after) == 1
    assert agree(before, after)
    assert merge_narrow_products(before, primal=False) is before


def test_an_operand_that_comes_later_is_waited_for() -> None:
    sketch, a = tall()
    first = sketch.call(aten.mm.default, a, sketch.input("b", 8, 2))
    used = sketch.call(aten.tanh.default, first)
    late = sketch.call(aten.neg.default, sketch.input("c", 8, 2))
    before = sketch.returning(used, sketch.call(aten.mm.default, a, late))
    after = merge_narrow_products(before)
    verify(after)
    assert products(after) == 1
    assert agree(before, after)


def test_a_product_that_needs_the_other_stays() -> None:
    sketch, a = tall()
    first = sketch.call(aten.mm.default, a, sketch.input("b", 8, 2))
    cut = sketch.call(aten.slice.Tensor, first, 0, 0, 8)
    third = sketch.call(aten.mm.default, a, sketch.input("d", 8, 2))
    before = sketch.returning(sketch.call(aten.mm.default, a, cut), third)
    after = merge_narrow_products(before)
    assert products(after) == 2
    assert agree(before, after)


@pytest.mark.parametrize(
    ("rows", "inner", "columns"), [(200, 8, 40), (20, 8, 4)], ids=["wide", "small"]
)
def test_what_gains_nothing_stays(rows: int, inner: int, columns: int) -> None:
    """Wide products fill the processor; where little is shared the copy costs as much."""
    sketch = Sketch()
    a = sketch.input("a", rows, inner)
    parts = [sketch.input(name, inner, columns) for name in ("b", "c")]
    before = sketch.returning(*(sketch.call(aten.mm.default, a, b) for b in parts))
    assert merge_narrow_products(before) is before


def test_a_scaled_sum_stays() -> None:
    sketch, a = tall()
    b, c, bias = sketch.input("b", 8, 2), sketch.input("c", 8, 2), sketch.input("bias", 2)
    half = sketch.call(aten.addmm.default, bias, a, b, beta=0.5)
    before = sketch.returning(half, sketch.call(aten.mm.default, a, c))
    assert merge_narrow_products(before) is before


@given(random_graphs())
@settings(max_examples=150, deadline=None)
def test_random_graphs_keep_their_values(step: StepGraph) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(narrow_products, "_LARGER", 0)
        after = merge_narrow_products(step)
    verify(after)
    assert agree(step, after)


def test_parts_in_the_wrong_order_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    sketch, a = tall()
    parts = [sketch.input(name, 8, 2) for name in ("b", "c")]
    before = sketch.returning(*(sketch.call(aten.mm.default, a, b) for b in parts))
    right = narrow_products._merge

    def wrong(graph: fx.Graph, side: str, group: list[narrow_products._Product]) -> None:
        right(graph, side, group)
        cat = next(node for node in graph.nodes if node.target is aten.cat.default)
        cat.args = (list(reversed(cat.args[0])), *cat.args[1:])  # type: ignore[call-overload]

    monkeypatch.setattr(narrow_products, "_merge", wrong)
    assert not agree(before, merge_narrow_products(before))
