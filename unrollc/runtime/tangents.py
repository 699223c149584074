"""The tangents of a program: following live tangents forward through the inner loop."""

from __future__ import annotations

from collections.abc import Sequence

from unrollc.capture.assemble import assemble_graph, same_graph
from unrollc.differentiate.pushforward import NoForwardFormulaError
from unrollc.differentiate.tangent import (
    Direction,
    Moving,
    directions_of,
    moving_in,
    step_tangent,
    tangent_obstacle,
)
from unrollc.optimize.hoist import moved_by
from unrollc.optimize.packed_loop import PackedLoop
from unrollc.optimize.simplify import simplify
from unrollc.plan.pieces import ForwardMode
from unrollc.requirements.judge import MetaParameter
from unrollc.runtime.options import Options
from unrollc.step import STARTS, STATE_ROLES, Role, StepGraph

#: In shorter loops little is kept for the backward pass, and making the tangents takes longer than
#: they would save; a budget asks for them in any loop.
SHORTEST_LOOP = 32

#: More elements of meta-parameters than this are not few: each costs more than a step.
MOST_DIRECTIONS = 8


def forward_mode(
    loop: PackedLoop,
    val_gradient: StepGraph,
    meta: Sequence[MetaParameter],
    per_step: frozenset[str],
    options: Options,
) -> ForwardMode | str:
    """The loop in forward mode, or why that is not for this program.

    Args:
        loop: The inner steps.
        val_gradient: The validation loss with B_T.
        meta: The meta-parameters whose gradient is computed.
        per_step: Labels of inputs with one entry a step.
        options: The user's options.
    """
    steps = len(loop.sequence)
    start = next((m.label for m in meta if m.role in STARTS), None)
    if start is not None:
        return f"{start}, where the loop starts, is a meta-parameter"
    stepwise = next((m.label for m in meta if m.label in per_step), None)
    if stepwise is not None:
        return f"{stepwise} has one value a step, hence a direction a step"
    if options.steps_back(steps) < steps:
        return "the gradient is truncated, which bounds what is kept"
    shapes = {
        (value.role, value.label): node.meta["val"].shape
        for step in loop.steps
        for value, node in zip(step.inputs, step.placeholders, strict=True)
    }
    directions = directions_of({m.key: shapes[m.key] for m in meta if m.key in shapes})
    if not directions:
        return "no meta-parameter moves the inner loop"
    if len(directions) > MOST_DIRECTIONS:
        return f"the meta-parameters have {len(directions)} elements, which are not few"
    assert not moved_by(loop.prologue, frozenset(m.key for m in meta)), "no step has its tangent"
    if options.memory is None and steps < SHORTEST_LOOP:
        return f"tried from {SHORTEST_LOOP} steps on, or under a budget"
    for step in loop.steps:
        if (reason := tangent_obstacle(step)) is not None:
            return reason
    try:
        return _followed(loop, val_gradient, directions, options.first_order)
    except NoForwardFormulaError as error:
        return str(error)


def _followed(
    loop: PackedLoop, val_gradient: StepGraph, directions: tuple[Direction, ...], first_order: bool
) -> ForwardMode:
    """The distinct steps with tangents, following the live tangents from step 0 on."""
    found: list[StepGraph] = []
    known: dict[tuple[int, frozenset[Moving], bool], int] = {}
    order: list[int] = []
    live: frozenset[Moving] = frozenset()
    for number, index in enumerate(loop.sequence):
        last = number == len(loop.sequence) - 1
        key = (index, live, last)
        if key not in known:
            graph = step_tangent(loop.steps[index], directions, live, first_order=first_order)
            assert moving_in(graph.inputs_with(Role.TANGENT)) == live, "a tangent gets lost"
            graph = simplify(_pruned(graph, val_gradient) if last else graph)
            same = (i for i, old in enumerate(found) if same_graph(old, graph))
            known[key] = next(same, len(found))
            if known[key] == len(found):
                found.append(graph)
        order.append(known[key])
        live = moving_in(found[order[-1]].outputs_with(Role.TANGENT))
    return ForwardMode(tuple(found), tuple(order), directions)


def _pruned(graph: StepGraph, val_gradient: StepGraph) -> StepGraph:
    """The last step, without tangents that the validation loss does not read."""
    read = {
        (value.of, value.label)
        for value, node in val_gradient.outputs_with(Role.COTANGENT)
        if node is not None and value.of in STATE_ROLES
    }
    outputs = [
        (value, node)
        if value.role is not Role.TANGENT or (value.of, value.label) in read
        else (value, None)
        for value, node in zip(graph.outputs, graph.results, strict=True)
    ]
    inputs = zip(graph.inputs, graph.placeholders, strict=True)
    return assemble_graph(graph, inputs, outputs)
