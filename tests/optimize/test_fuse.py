"""Each fusion before and after, what it must leave alone, and all of them on random graphs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from tests.oracles.compare import relative_error
from tests.plan.graphs import Sketch, targets
from unrollc.optimize.fuse import (
    FUSIONS,
    add_multiple,
    add_product,
    add_transposed,
    expand_late,
    split_once,
    sum_once,
    sum_without_axis,
    unbind_once,
)
from unrollc.optimize.simplify import remove_dead, simplify
from unrollc.step import Phase, StepGraph, verify

aten = torch.ops.aten
ADJOINT = Phase.ADJOINT

Pass = Callable[[fx.Graph], bool]


def values_of(step: StepGraph) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    given_ = [
        torch.randn(node.meta["val"].shape, generator=generator, dtype=torch.float64)
        for node in step.placeholders
    ]
    step.module.recompile()
    return step.module(*given_)


def assert_becomes(step: StepGraph, rewrite: Pass, *expected: Any) -> None:
    """The pass leaves these ops, equal values, right metadata, and nothing more to do."""
    before = values_of(step)
    assert rewrite(step.graph)
    remove_dead(step.graph)
    verify(step)
    assert [t for t in targets(step) if isinstance(t, torch._ops.OpOverload)] == list(expected)
    for node, one, other in zip(step.results, before, values_of(step), strict=True):
        assert node is not None
        assert node.meta["val"].shape == other.shape
        assert relative_error(other, one) < 1e-13
    assert not rewrite(step.graph)


def assert_stays(step: StepGraph, rewrite: Pass) -> None:
    before = targets(step)
    assert not rewrite(step.graph)
    assert targets(step) == before


def made(*shapes: tuple[int, ...]) -> tuple[Sketch, list[fx.Node]]:
    sketch = Sketch()
    return sketch, [sketch.input(f"x{i}", *shape) for i, shape in enumerate(shapes)]


def test_a_sum_need_not_keep_an_axis() -> None:
    sketch, (x,) = made((4, 3))
    total = sketch.call(aten.sum.dim_IntList, x, [0], True)
    step = sketch.returning(sketch.call(aten.reshape.default, total, [3]))
    assert_becomes(step, sum_without_axis, aten.sum.dim_IntList)


def test_a_sum_in_another_shape_stays() -> None:
    sketch, (x,) = made((4, 6))
    total = sketch.call(aten.sum.dim_IntList, x, [0], True)
    assert_stays(
        sketch.returning(sketch.call(aten.reshape.default, total, [3, 2])), sum_without_axis
    )


@pytest.mark.parametrize("keep", [True, False])
def test_sums_over_several_axes_are_one(keep: bool) -> None:
    sketch, (x,) = made((2, 3, 4, 5))
    first = sketch.call(aten.sum.dim_IntList, x, [0], keep, phase=ADJOINT)
    second = sketch.call(aten.sum.dim_IntList, first, [-1], keep, phase=ADJOINT)
    third = sketch.call(aten.sum.dim_IntList, second, [2 if keep else 1], keep, phase=ADJOINT)
    assert_becomes(sketch.returning(third), repeated(sum_once), aten.sum.dim_IntList)


def repeated(rewrite: Pass) -> Pass:
    def until_done(graph: fx.Graph) -> bool:
        changed = False
        while rewrite(graph):
            changed = True
        return changed

    return until_done


def test_a_sum_that_others_read_stays() -> None:
    sketch, (x,) = made((2, 3))
    first = sketch.call(aten.sum.dim_IntList, x, [0], True, phase=ADJOINT)
    second = sketch.call(aten.sum.dim_IntList, first, [1], True, phase=ADJOINT)
    assert_stays(sketch.returning(first, second), sum_once)


def test_transposed_terms_are_transposed_once() -> None:
    sketch, (x, y) = made((2, 3), (2, 3))
    turned = [sketch.call(aten.t.default, each) for each in (x, y)]
    step = sketch.returning(sketch.call(aten.add.Tensor, *turned, alpha=2))
    assert_becomes(step, add_transposed, aten.add.Tensor, aten.t.default)


def test_a_transposed_vector_stays_a_row() -> None:
    sketch, (x, y) = made((3,), (3, 3))
    turned = [sketch.call(aten.t.default, each) for each in (x, y)]
    assert_stays(sketch.returning(sketch.call(aten.add.Tensor, *turned)), add_transposed)


def product(sketch: Sketch, phase: Phase = ADJOINT) -> fx.Node:
    x, y = sketch.input("a", 4, 2), sketch.input("b", 2, 3)
    return sketch.call(aten.mm.default, x, y, phase=phase)


@pytest.mark.parametrize("turned", [False, True])
def test_a_product_is_added_as_it_is_made(turned: bool) -> None:
    sketch, (x,) = made((4, 3))
    pair = (x, product(sketch))
    step = sketch.returning(
        sketch.call(aten.add.Tensor, *(reversed(pair) if turned else pair), phase=ADJOINT)
    )
    assert_becomes(step, add_product, aten.addmm.default)


def test_a_row_is_added_without_repeating_it() -> None:
    sketch, (row,) = made((3,))
    flat = sketch.call(aten.reshape.default, row, [1, 3], phase=ADJOINT)
    rows = sketch.call(aten.expand.default, flat, [4, 3], phase=ADJOINT)
    step = sketch.returning(sketch.call(aten.add.Tensor, rows, product(sketch), phase=ADJOINT))
    assert_becomes(step, add_product, aten.addmm.default)
    (call,) = (node for node in step.graph.nodes if node.op == "call_function")
    assert call.args[0] is row


@pytest.mark.parametrize("case", ["of the step", "read twice", "scaled", "added to itself", "wide"])
def test_these_products_stay(case: str) -> None:
    sketch, (x,) = made((2, 4, 3) if case == "wide" else (4, 3))
    phase = Phase.GRADIENT if case == "of the step" else ADJOINT
    made_ = product(sketch, phase)
    other = made_ if case == "added to itself" else x
    scale = {"alpha": 2} if case == "scaled" else {}
    total = sketch.call(aten.add.Tensor, other, made_, phase=phase, **scale)
    results = (total, made_) if case == "read twice" else (total,)
    assert_stays(sketch.returning(*results), add_product)


def test_a_multiple_is_added_at_once() -> None:
    sketch, (x, y) = made((3,), (3,))
    scaled = sketch.call(aten.mul.Scalar, y, 0.5, phase=ADJOINT)
    step = sketch.returning(sketch.call(aten.add.Tensor, x, scaled, phase=ADJOINT))
    assert_becomes(step, add_multiple, aten.add.Tensor)


def test_a_multiple_of_another_shape_or_type_stays() -> None:
    sketch, (x, y) = made((2, 3), (3,))
    scaled = sketch.call(aten.mul.Scalar, y, 0.5, phase=ADJOINT)
    assert_stays(
        sketch.returning(sketch.call(aten.add.Tensor, x, scaled, phase=ADJOINT)), add_multiple
    )
    sketch = Sketch()
    whole = sketch.input("n", 3, dtype=torch.int64)
    half = sketch.call(aten.mul.Scalar, whole, 0.5, phase=ADJOINT)
    other = sketch.input("x", 3, dtype=torch.float32)
    assert_stays(
        sketch.returning(sketch.call(aten.add.Tensor, other, half, phase=ADJOINT)), add_multiple
    )


def slices(*bounds: tuple[int, int], axis: int = 0) -> StepGraph:
    sketch, (x,) = made((10, 10))
    return sketch.returning(
        *(sketch.call(aten.slice.Tensor, x, axis, start, end) for start, end in bounds)
    )


def test_slices_side_by_side_are_one_split() -> None:
    assert_becomes(slices((0, 3), (3, 4), (4, 10)), split_once, aten.split_with_sizes.default)
    assert_becomes(slices((6, 9), (1, 3), (3, 5)), split_once, aten.split_with_sizes.default)


def test_these_slices_stay() -> None:
    assert_stays(slices((0, 5), (3, 8), (8, 10)), split_once)  # two overlap
    assert_stays(slices((0, 5), (5, 10)), split_once)  # no fewer ops
    assert_stays(slices((0, 3), (3, 4), (4, 10), axis=1), split_once)


def test_elements_are_unbound_at_once() -> None:
    sketch, (x,) = made((3,))
    step = sketch.returning(*(sketch.call(aten.select.int, x, 0, i) for i in (0, -1, 1)))
    assert_becomes(step, unbind_once, aten.unbind.int)


def test_few_of_many_elements_stay() -> None:
    sketch, (x,) = made((30,))
    assert_stays(
        sketch.returning(*(sketch.call(aten.select.int, x, 0, i) for i in range(3))), unbind_once
    )


def test_an_op_runs_before_its_operands_are_repeated() -> None:
    sketch, (x, y) = made((1, 3), (4, 3))
    rows = sketch.call(aten.expand.default, x, [4, 3], phase=ADJOINT)
    scaled = sketch.call(aten.mul.Scalar, rows, 2.0, phase=ADJOINT)
    step = sketch.returning(sketch.call(aten.add.Tensor, scaled, y, phase=ADJOINT))
    assert_becomes(step, expand_late, aten.mul.Scalar, aten.expand.default, aten.add.Tensor)


_KINDS = ("t", "mm", "mm", "add", "add", "scale", "row", "sum", "slices", "expand", "elements")


@st.composite
def derivatives(draw: st.DrawFn) -> StepGraph:
    """Random graphs of what derivatives are made of, on square matrices."""
    n = 3
    sketch, known = made((n, n), (n, n))
    phases = st.sampled_from([ADJOINT, ADJOINT, ADJOINT, Phase.GRADIENT])
    for _ in range(draw(st.integers(1, 12))):
        phase, kind = draw(phases), draw(st.sampled_from(_KINDS))
        x, y = (draw(st.sampled_from(known)) for _ in range(2))

        def call(op: Any, *args: Any, phase: Phase = phase, **kwargs: Any) -> fx.Node:
            return sketch.call(op, *args, phase=phase, **kwargs)

        if kind == "t":
            known.append(call(aten.t.default, x))
        elif kind == "mm":
            known.append(call(aten.mm.default, x, y))
        elif kind == "add":
            known.append(call(aten.add.Tensor, x, y, alpha=draw(st.sampled_from([1, 2]))))
        elif kind == "scale":
            known.append(call(aten.mul.Scalar, x, 0.5))
        elif kind == "row":
            total = call(aten.sum.dim_IntList, x, [draw(st.integers(0, 1))], True)
            flat = call(aten.reshape.default, total, [n])
            row = call(aten.reshape.default, flat, [1, n])
            known.append(call(aten.expand.default, row, [n, n]))
        elif kind == "sum":
            total = call(aten.sum.dim_IntList, x, [0], True)
            known.append(call(aten.add.Tensor, y, call(aten.sum.dim_IntList, total, [1], True)))
        elif kind == "slices":
            parts = [call(aten.slice.Tensor, x, 0, i, i + 1) for i in range(n)]
            known.append(call(aten.cat.default, parts[::-1]))
        elif kind == "expand":
            row = call(aten.expand.default, call(aten.sum.dim_IntList, x, [0], True), [n, n])
            known.append(call(aten.mul.Tensor, row, row))
        else:
            rows = [call(aten.select.int, x, 0, i) for i in range(n)]
            known.append(call(aten.stack.default, rows[::-1]))
    count = draw(st.integers(1, 3))
    return sketch.returning(*(draw(st.sampled_from(known)) for _ in range(count)))


@settings(max_examples=150, deadline=None)
@given(derivatives())
def test_all_passes_leave_the_values_of_a_random_graph(step: StepGraph) -> None:
    for expected, found in zip(values_of(step), values_of(simplify(step)), strict=True):
        assert relative_error(found, expected) < 1e-12


@settings(max_examples=60, deadline=None)
@given(derivatives(), st.sampled_from(FUSIONS))
def test_each_pass_leaves_the_values_of_a_random_graph(step: StepGraph, rewrite: Pass) -> None:
    before = values_of(step)
    rewrite(step.graph)
    verify(step)
    for expected, found in zip(before, values_of(step), strict=True):
        assert relative_error(found, expected) < 1e-12
