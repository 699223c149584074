"""Frames of small graphs against bytes counted by hand, and of random ones against the meter."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from tests.oracles import memory
from tests.plan.graphs import Sketch, random_graphs, values_for
from unrollc.codegen.function import render_function
from unrollc.codegen.names import alias_of
from unrollc.optimize.simplify import simplify
from unrollc.plan.liveness import Frame, Owned, frame_of, last_uses
from unrollc.step import Role, StepGraph, iterate_calls

aten = torch.ops.aten
MATRIX = 4 * 8 * 8  # bytes of an f64[4, 8]


def generated(step: StepGraph) -> Callable[..., Any]:
    """The graph as the function that programs contain."""
    reserved = {alias_of(node.target): node.target for node in iterate_calls(step)}
    space: dict[str, Any] = {"torch": torch, **reserved}
    exec(render_function("run", step, ["One graph."], {}, reserved), space)
    function: Callable[..., Any] = space["run"]
    return function


def measured(step: StepGraph) -> int:
    run = generated(step)
    used = [
        tensor
        for node, tensor in zip(step.placeholders, values_for(step), strict=True)
        if node.users or node in step.results
    ]
    return memory.measure(lambda: run(*used)).peak


def test_a_chain_frees_its_argument_after_the_result_is_there() -> None:
    sketch = Sketch()
    chain = [sketch.input("x", 4, 8)]
    for _ in range(4):
        chain.append(sketch.call(aten.tanh.default, chain[-1]))
    step = sketch.returning(chain[-1])
    frame = frame_of(step)
    assert frame.peak == 2 * MATRIX
    assert frame.peak_node == chain[2].name
    assert frame.results == (3,)
    assert frame.sizes == dict.fromkeys(range(4), MATRIX)
    assert measured(step) == frame.peak


def test_views_share_the_storage_of_their_base() -> None:
    sketch = Sketch()
    x = sketch.input("x", 4, 8)
    a = sketch.call(aten.tanh.default, x)
    b = sketch.call(aten.t.default, a)
    c = sketch.call(aten.mm.default, a, b)
    frame = frame_of(step := sketch.returning(c))
    assert frame.peak == MATRIX + 4 * 4 * 8
    assert frame.sizes == {0: MATRIX, 1: 128}
    assert measured(step) == frame.peak


def test_a_view_keeps_the_storage_of_a_base_that_is_gone() -> None:
    sketch = Sketch()
    x = sketch.input("x", 4, 8)
    a = sketch.call(aten.tanh.default, x)
    row = sketch.call(aten.select.int, a, 0, 0)
    b = sketch.call(aten.exp.default, x)
    c = sketch.call(aten.add.Tensor, b, row)
    step = sketch.returning(c)
    ends = last_uses(step)
    assert ends[row] == [a]
    frame = frame_of(step)
    assert frame.peak == 3 * MATRIX  # a behind its row, b, c
    assert measured(step) == frame.peak


def test_a_view_of_an_input_costs_nothing_and_belongs_to_it() -> None:
    sketch = Sketch()
    x = sketch.input("x", 4, 8)
    t = sketch.call(aten.t.default, x)
    step = sketch.returning(t, x, None)
    assert frame_of(step) == Frame(0, "", (), (), ("x", "x", None), {})
    assert measured(step) == 0


def test_a_returned_value_stays() -> None:
    sketch = Sketch()
    x = sketch.input("x", 4, 8)
    a = sketch.call(aten.tanh.default, x)
    b = sketch.call(aten.exp.default, a)
    c = sketch.call(aten.neg.default, b)
    step = sketch.returning(a, c)
    frame = frame_of(step)
    assert frame.peak == 3 * MATRIX
    assert frame.results == (0, 2)
    assert last_uses(step) == {c: [b]}
    assert measured(step) == frame.peak


def test_two_outputs_of_one_storage_are_one() -> None:
    sketch = Sketch()
    x = sketch.input("x", 4, 8)
    a = sketch.call(aten.tanh.default, x)
    step = sketch.returning(a, sketch.call(aten.t.default, a))
    assert frame_of(step).results == (0, 0)
    assert frame_of(step).peak == measured(step) == MATRIX


@pytest.mark.parametrize("used", [0, 1])
def test_an_unused_result_of_an_op_with_several_goes_at_once(used: int) -> None:
    sketch = Sketch()
    x = sketch.input("x", 4, 8)
    both = sketch.call(aten.sort.default, x)  # values f64, places i64: 256 bytes each
    part = sketch.part(both, used)
    a = sketch.call(aten.mul.Tensor, part, part)
    b = sketch.call(aten.mul.Tensor, a, part)
    step = sketch.returning(b)
    frame = frame_of(step)
    assert frame.peak == 3 * MATRIX  # part, a, b; at the sort it was two
    assert frame.peak_node == b.name
    assert measured(step) == frame.peak


def test_all_results_of_an_op_with_several_are_there_at_once() -> None:
    sketch = Sketch()
    x = sketch.input("x", 4, 8)
    both = sketch.call(aten.sort.default, x)
    step = sketch.returning(sketch.part(both, 0))
    frame = frame_of(step)
    assert frame.peak == 2 * MATRIX
    assert frame.results == (0,)
    assert measured(step) == frame.peak


def test_a_dead_value_counts_while_it_is_computed() -> None:
    sketch = Sketch()
    x = sketch.input("x", 4, 8)
    a = sketch.call(aten.tanh.default, x)
    dead = sketch.call(aten.exp.default, x)
    b = sketch.call(aten.neg.default, a)
    step = sketch.returning(b)
    assert last_uses(step) == {dead: [dead], b: [a]}
    assert frame_of(step).peak == measured(step) == 2 * MATRIX


def test_an_expanded_value_has_the_bytes_of_its_storage() -> None:
    sketch = Sketch()
    x = sketch.input("x", 4, 8)
    row = sketch.call(aten.sum.dim_IntList, x, [0], True)
    step = sketch.returning(sketch.call(aten.expand.default, row, [4, 8]))
    assert frame_of(step).peak == measured(step) == 8 * 8


def owned(name: str, size: int, storage: int = 0) -> Owned:
    return Owned(name, storage, size)


def handed_over(step: StepGraph, tensors: list[Tensor]) -> int:
    """The peak while a function has the only references to its state, over what was there."""
    run, state = generated(step), [tensor.clone() for tensor in tensors]
    tensors.clear()
    before = sum(tensor.untyped_storage().nbytes() for tensor in state)

    def call() -> Any:
        given = [tensor.clone() for tensor in state]  # the meter counts what is made inside
        state.clear()
        return run(given)

    return memory.measure(call).peak - before


def test_a_state_that_is_taken_over_dies_after_its_last_use() -> None:
    sketch = Sketch()
    w = sketch.input("w", 4, 8, role=Role.THETA)
    v = sketch.input("v", 4, 8, role=Role.OPT_STATE)
    a = sketch.call(aten.mul.Tensor, w, v)
    b = sketch.call(aten.exp.default, a)
    c = sketch.call(aten.exp.default, b)
    step = sketch.returning(c)
    ends = last_uses(step)
    assert ends[a] == [w, v]
    kept = frame_of(step)
    assert (kept.peak, kept.freed) == (2 * MATRIX, ())
    taken = frame_of(step, (owned("w", MATRIX, 0), owned("v", MATRIX, 1)))
    assert taken.peak == MATRIX  # a beside w and v; then they are gone
    assert taken.peak_node == a.name and taken.freed == ()
    assert handed_over(step, [torch.randn(4, 8).double() for _ in range(2)]) == MATRIX


def test_a_storage_of_two_inputs_goes_with_the_last_of_them() -> None:
    sketch = Sketch()
    w = sketch.input("w", 4, 8, role=Role.THETA)
    v = sketch.input("v", 4, 8, role=Role.OPT_STATE)
    a = sketch.call(aten.exp.default, w)
    b = sketch.call(aten.mul.Tensor, a, v)
    c = sketch.call(aten.exp.default, b)
    step = sketch.returning(c)
    shared = frame_of(step, (owned("w", MATRIX), owned("v", MATRIX)))
    apart = frame_of(step, (owned("w", MATRIX, 0), owned("v", MATRIX, 1)))
    assert shared.peak == 2 * MATRIX and shared.freed == ()
    assert apart.peak == MATRIX


def test_an_input_that_nobody_reads_goes_at_once() -> None:
    sketch = Sketch()
    w = sketch.input("w", 4, 8, role=Role.THETA)
    sketch.input("v", 4, 8, role=Role.OPT_STATE)
    step = sketch.returning(sketch.call(aten.exp.default, w))
    assert frame_of(step, (owned("v", MATRIX),)).peak == 0
    assert frame_of(step, (owned("v", MATRIX),)).freed == ((0, MATRIX),)
    assert frame_of(step).peak == MATRIX


def test_a_state_that_is_returned_stays() -> None:
    sketch = Sketch()
    w = sketch.input("w", 4, 8, role=Role.THETA)
    a = sketch.call(aten.exp.default, w)
    step = sketch.returning(sketch.call(aten.exp.default, a), w)
    frame = frame_of(step, (owned("w", MATRIX),))
    assert (frame.peak, frame.freed, frame.results) == (2 * MATRIX, (), (1, "w"))


@given(random_graphs())
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_frames_of_random_graphs_are_what_the_meter_sees(step: StepGraph) -> None:
    assert frame_of(step).peak == measured(step)
    lean = simplify(step)
    assert frame_of(lean).peak == measured(lean)


# --- broken twins -----------------------------------------------------------------------------


def twice(tensor: Tensor) -> Tensor:
    return torch.empty((2, *tensor.shape), dtype=tensor.dtype, device=tensor.device)


def test_a_storage_of_the_wrong_size_is_caught() -> None:
    sketch = Sketch()
    x = sketch.input("x", 4, 8)
    a = sketch.call(aten.tanh.default, x)
    step = sketch.returning(sketch.call(aten.exp.default, a))
    with sketch.mode:
        a.meta["val"] = twice(a.meta["val"])
    assert frame_of(step).peak == 3 * MATRIX != measured(step)


def test_a_name_that_lives_too_long_is_caught() -> None:
    """Where a generated function forgets a deletion, the meter sees more than the frame."""
    sketch = Sketch()
    node = sketch.input("x", 4, 8)
    for _ in range(4):
        node = sketch.call(aten.tanh.default, node)
    step = sketch.returning(node)
    reserved = {alias_of(n.target): n.target for n in iterate_calls(step)}
    space: dict[str, Any] = {"torch": torch, **reserved}
    source = render_function("run", step, ["One graph."], {}, reserved)
    assert source.count("; del ") == 3
    exec(source.replace("; del ", "; print, "), space)
    x = values_for(step)
    assert memory.measure(lambda: space["run"](*x)).peak == 4 * MATRIX > frame_of(step).peak


def test_projections_are_no_calls() -> None:
    sketch = Sketch()
    x = sketch.input("x", 4, 8)
    both = sketch.call(aten.sort.default, x)
    step = sketch.returning(sketch.part(both, 0), sketch.part(both, 1))
    assert [n.target for n in iterate_calls(step)] == [aten.sort.default]
    assert [n.target for n in step.graph.nodes].count(operator.getitem) == 2
    assert last_uses(step) == {both: [both]}
