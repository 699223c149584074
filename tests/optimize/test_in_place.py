"""Ops that write over an operand: each variant, when one may be used, and the values."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, fx

from tests.gradients.programs import assert_equals_eager, compiled
from tests.oracles import cases, memory
from tests.plan.graphs import Sketch, random_graphs, values_for
from unrollc.codegen.function import render_function
from unrollc.codegen.names import alias_of
from unrollc.optimize.in_place import OUT_VARIANTS, called_op, out_name, write_in_place
from unrollc.optimize.simplify import simplify
from unrollc.plan.liveness import frame_of
from unrollc.step import Role, StepGraph, iterate_calls

aten = torch.ops.aten
MATRIX = 4 * 8 * 8  # bytes of an f64[4, 8]


# --- the variants -----------------------------------------------------------------------------


def arguments(op: Any, dtype: torch.dtype) -> list[Any]:
    """Positive tensors of 8 KiB and more, and numbers, for the arguments without a default."""
    generator = torch.Generator().manual_seed(0)
    made: list[Any] = []
    for argument in op._schema.arguments:
        if argument.has_default_value():
            continue
        if str(argument.type) == "Tensor":
            made.append(torch.rand(64, 32, generator=generator, dtype=dtype) + 0.25)
        else:
            made.append(0.3)
    if op is aten.where.self:
        made[0] = made[0] > 0.75
    return made


def targets_of(op: Any, args: list[Any], like: Tensor) -> list[int]:
    """Positions of the operands that a result like `like` can be written over."""
    return [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.dtype == like.dtype]


def wrong_with(functional: Any, variant: Any, dtype: torch.dtype) -> list[str]:
    """What is wrong with a row of the table; empty for a good one."""
    found = []
    given = out_name(variant)
    expected = functional(*arguments(functional, dtype))
    for position in targets_of(functional, arguments(functional, dtype), expected):
        args = arguments(functional, dtype)
        into = args[position]
        with torch.no_grad():
            held = memory.allocator_peak(lambda: variant(*args, **{given: into}))  # noqa: B023
        if held >= expected.nbytes:
            found.append(f"{variant} allocates {held} bytes")
        args = arguments(functional, dtype)
        result = variant(*args, **{given: args[position]})
        if result is not args[position] or not torch.equal(result, expected):
            found.append(f"{variant} over argument {position} has another result")
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("op", OUT_VARIANTS, ids=str)
def test_a_variant_has_the_same_bits_and_allocates_nothing(op: Any, dtype: torch.dtype) -> None:
    assert not op._schema.is_mutable
    assert targets_of(op, arguments(op, dtype), op(*arguments(op, dtype)))
    assert not wrong_with(op, OUT_VARIANTS[op], dtype)


def test_a_variant_that_allocates_is_caught() -> None:
    (finding,) = wrong_with(aten.relu.default, aten.relu.out, torch.float32)
    assert "allocates" in finding


def test_a_variant_of_another_op_is_caught() -> None:
    found = wrong_with(aten.sub.Tensor, aten.add.out, torch.float64)
    assert any("another result" in each for each in found)


# --- when an operand may be overwritten -------------------------------------------------------


def into(step: StepGraph) -> list[int | None]:
    """For each op the argument that it writes over."""
    found = write_in_place(step, worth=0)
    return [node.meta.get("into") for node in iterate_calls(found)]


def one_value() -> tuple[Sketch, fx.Node, fx.Node]:
    """``a = tanh(x)``"""
    sketch = Sketch()
    x = sketch.input("x", 4, 8)
    return sketch, x, sketch.call(aten.tanh.default, x)


def test_a_chain_stays_in_the_memory_of_its_first_value() -> None:
    sketch, _, a = one_value()
    b = sketch.call(aten.exp.default, a)
    step = sketch.returning(sketch.call(aten.neg.default, b))
    assert into(step) == [None, 0, 0]
    placed = write_in_place(step, worth=0)
    assert frame_of(step).peak == 2 * MATRIX
    assert frame_of(placed).peak == MATRIX
    values = values_for(step)
    run = generated(placed)
    assert memory.measure(lambda: run(*values)).peak == MATRIX


def test_the_given_graph_is_left_as_it_is() -> None:
    sketch, _, a = one_value()
    step = sketch.returning(sketch.call(aten.exp.default, a))
    before = [dict(node.meta) for node in step.graph.nodes]
    write_in_place(step, worth=0)
    assert [dict(node.meta) for node in step.graph.nodes] == before


@pytest.mark.parametrize("role", [Role.THETA, Role.COTANGENT, Role.BATCH])
def test_inputs_are_never_overwritten(role: Role) -> None:
    """Whether somebody else holds an input, a kept state for one, the graph cannot know."""
    sketch = Sketch()
    x = sketch.input("x", 4, 8, role=role)
    assert into(sketch.returning(sketch.call(aten.tanh.default, x))) == [None]


def test_what_is_read_later_is_not_overwritten() -> None:
    sketch, _, a = one_value()
    b = sketch.call(aten.exp.default, a)
    step = sketch.returning(sketch.call(aten.mul.Tensor, a, b))
    assert into(step) == [None, None, 0]


def test_what_is_returned_is_not_overwritten() -> None:
    sketch, _, a = one_value()
    assert into(sketch.returning(a, sketch.call(aten.exp.default, a))) == [None, None]


def test_the_second_operand_may_take_the_result() -> None:
    sketch, x, a = one_value()
    assert into(sketch.returning(sketch.call(aten.sub.Tensor, x, a))) == [None, 1]


def test_both_operands_may_be_the_same() -> None:
    sketch, _, a = one_value()
    assert into(sketch.returning(sketch.call(aten.mul.Tensor, a, a))) == [None, 0]


def test_an_operand_is_not_overwritten_while_a_view_of_it_is_read() -> None:
    sketch, _, a = one_value()
    row = sketch.call(aten.select.int, a, 0, 0)
    same = sketch.call(aten.mul.Tensor, a, row)  # reads the row while it writes
    assert into(sketch.returning(same)) == [None, None, None]
    sketch, x, a = one_value()
    row = sketch.call(aten.select.int, a, 0, 0)
    b = sketch.call(aten.exp.default, a)
    later = sketch.call(aten.add.Tensor, x, row)
    assert into(sketch.returning(b, later)) == [None, None, None, None]


def test_a_reshape_counts_as_a_view_even_where_it_copies() -> None:
    sketch, _, a = one_value()
    flat = sketch.call(aten.reshape.default, sketch.call(aten.t.default, a), [32])
    assert flat.meta["val"].untyped_storage()._cdata != a.meta["val"].untyped_storage()._cdata
    b = sketch.call(aten.exp.default, a)
    assert into(sketch.returning(b, sketch.call(aten.exp.default, flat))) == [
        *[None] * 4,  # the op on `a` may not, the last one on the reshape may
        0,
    ]


@pytest.mark.parametrize("shape", [(1, 8), (4, 1)])
def test_a_broadcast_operand_is_not_overwritten(shape: tuple[int, int]) -> None:
    sketch = Sketch()
    x, y = sketch.input("x", 4, 8), sketch.input("y", *shape)
    small = sketch.call(aten.tanh.default, y)
    assert into(sketch.returning(sketch.call(aten.mul.Tensor, x, small))) == [None, None]


def test_a_part_of_a_storage_is_not_overwritten() -> None:
    sketch, _, a = one_value()
    rows = sketch.call(aten.slice.Tensor, a, 0, 0, 2)
    assert into(sketch.returning(sketch.call(aten.exp.default, rows))) == [None, None, None]


def test_small_results_are_not_worth_it() -> None:
    sketch, _, a = one_value()
    step = sketch.returning(sketch.call(aten.exp.default, a))
    assert not any("into" in n.meta for n in write_in_place(step, worth=MATRIX + 1).graph.nodes)
    assert any("into" in n.meta for n in write_in_place(step, worth=MATRIX).graph.nodes)


# --- values -----------------------------------------------------------------------------------


def generated(step: StepGraph) -> Callable[..., Any]:
    """The graph as the function that programs contain."""
    ops = {alias_of(called_op(node)): called_op(node) for node in iterate_calls(step)}
    space: dict[str, Any] = {"torch": torch, **ops}
    exec(render_function("run", step, ["One graph."], {}, set(ops)), space)
    function: Callable[..., Any] = space["run"]
    return function


def results(step: StepGraph) -> tuple[Tensor, ...]:
    pairs = zip(step.placeholders, values_for(step), strict=True)
    used = [tensor for node, tensor in pairs if node.users or node in step.results]
    found: tuple[Tensor, ...] = generated(step)(*used)
    return tuple(tensor.clone() for tensor in found)


def agree(first: StepGraph, second: StepGraph) -> bool:
    pairs = zip(results(first), results(second), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


@given(random_graphs())
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_random_graphs_keep_their_values(step: StepGraph) -> None:
    for before in (step, simplify(step)):
        after = write_in_place(before, worth=0)
        assert agree(before, after)
        assert frame_of(after).peak <= frame_of(before).peak


def test_a_line_shows_where_the_result_goes() -> None:
    sketch, _, a = one_value()
    step = write_in_place(sketch.returning(sketch.call(aten.exp.default, a)), worth=0)
    text = render_function("run", step, ["One graph."], {}, ())
    assert "op_exp_out(tanh, out=tanh); del tanh" in text


@pytest.mark.parametrize("optimizer", ["sgd-nesterov", "adam"])
@pytest.mark.parametrize("model", cases.MODELS)
def test_meta_gradients_with_every_write_in_place(
    model: str, optimizer: str, float64: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed: list[Any] = []

    def every_write(step: StepGraph) -> StepGraph:
        made = write_in_place(step, worth=0)
        placed.extend(node for node in iterate_calls(made) if "into" in node.meta)
        return made

    monkeypatch.setattr("unrollc.plan.pieces.write_in_place", every_write)
    case = cases.build(model, optimizer, 3)
    result = compiled(case)(case.train, case.val)
    assert len(placed) > 20
    assert_equals_eager(result, case.unroll(), case.meta)


# --- broken twins -----------------------------------------------------------------------------


def test_an_operand_overwritten_too_early_is_caught() -> None:
    sketch, _, a = one_value()
    b = sketch.call(aten.exp.default, a)
    step = sketch.returning(sketch.call(aten.mul.Tensor, a, b))
    broken = write_in_place(step, worth=0)
    assert agree(step, broken)
    list(iterate_calls(broken))[1].meta["into"] = 0
    assert not agree(step, broken)
