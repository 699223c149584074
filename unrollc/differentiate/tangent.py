"""Forward-mode accumulation: tangents travel with the state, so nothing waits for a backward pass.

For one direction φ̇ the tangent θ̇_j = ∂θ_j/∂φ · φ̇ follows the same recursion as the state,

    θ̇_{j+1} = ∂step_j/∂θ · θ̇_j + ∂step_j/∂φ · φ̇,

("forward-HG" of Franceschi et al. 2017, "Forward and Reverse Gradient-Based Hyperparameter
Optimization", §3.2), and the meta-gradient is B_T · θ̇_T plus what Lval reads of φ itself. Memory
is independent of T; the work grows with the number of directions, one an element of φ.

The graph that is pushed forward holds the inner gradient as ordinary ops, so no symmetry is asked.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from unrollc.capture.record import Recorder
from unrollc.differentiate.adjoint import Key, assembled, differentiable_inputs
from unrollc.differentiate.pushforward import Pushforward
from unrollc.differentiate.replay import Replay, calls, is_projection, start
from unrollc.differentiate.symmetry import inexactness
from unrollc.step import ATTACH, STATE_ROLES, Phase, Role, StepGraph, Value, tensors_of

#: A tangent that is no structural zero: the number of its direction, and the value that moves.
Moving = tuple[int, Key]


@dataclass(frozen=True)
class Direction:
    """One element of a meta-parameter.

    Attributes:
        key: Role and label of the meta-parameter.
        index: Position of the element in it.
    """

    key: Key
    index: tuple[int, ...]


def moving_in(pairs: Sequence[tuple[Value, fx.Node | None]]) -> frozenset[Moving]:
    """The tangents among a graph's inputs or outputs that are no structural zeros."""
    return frozenset(
        (value.direction, (value.of, value.label))
        for value, node in pairs
        if node is not None and value.of is not None and value.direction is not None
    )


def directions_of(sizes: Mapping[Key, torch.Size]) -> tuple[Direction, ...]:
    """Every element of the meta-parameters with these shapes."""
    return tuple(
        Direction(key, index)
        for key, shape in sizes.items()
        for index in itertools.product(*(range(size) for size in shape))
    )


def tangent_obstacle(step: StepGraph) -> str | None:
    """Why forward mode would not give what reverse mode gives for this step."""
    for node in calls(step, *Phase):
        if is_projection(node) or node.target in (ATTACH, torch.ops.aten.detach.default):
            continue  # a stop and a declared derivative mean the same in both modes
        reason = inexactness(node) if _has_a_rule(node) else None
        if reason:
            source = node.meta.get("source")
            return f"{reason}{f' at {source.short}' if source else ''}"
    if any(t.is_complex() for node in step.placeholders for t in tensors_of(node)):
        return "complex numbers"
    return None


def _has_a_rule(node: fx.Node) -> bool:
    """Whether the rules for ops of a loss say something about this node."""
    authored = node.meta["phase"] in (Phase.FORWARD, Phase.LOSS)
    return authored or node.target is torch.ops.aten.embedding.default


def step_tangent(
    step: StepGraph,
    directions: Sequence[Direction],
    live: frozenset[Moving],
    *,
    first_order: bool = False,
) -> StepGraph:
    """``step --> step with Jacobian-vector products``; the caller has asked for obstacles.

    The primal ops stand in the graph once, whatever the number of directions.

    Args:
        step: One inner step.
        directions: Elements of meta-parameters that are no state; those that the step does not
            read move nothing.
        live: Tangents of the state that are not structurally zero.
        first_order: Take the inner gradient as a constant (first-order MAML).

    Returns:
        A graph whose inputs are those of the step and the live tangents (`Role.TANGENT`), and whose
        outputs are the new state, its tangents in every direction, None for structural zeros, and
        the loss.

    Raises:
        NoForwardFormulaError: If an op on the way has no forward-mode derivative.
    """
    recorder, inputs = start(step)
    entering = _entering(step, live, recorder)
    read = {(v.role, v.label): n for v, n in zip(step.inputs, step.placeholders, strict=True)}
    stops = {node for _, node in step.outputs_with(Role.GRADIENT)} if first_order else set()
    state, loss = step.outputs_with(*STATE_ROLES), step.outputs_with(Role.LOSS)

    def run(*tensors: Tensor) -> list[Tensor | None]:
        given, moving = tensors[: len(inputs)], tensors[len(inputs) :]
        replay = Replay(recorder)
        replay.bind(step.placeholders, given)
        tangents: list[dict[fx.Node, Tensor]] = [{} for _ in directions]
        for (value, node, _), tensor in zip(entering, moving, strict=True):
            assert value.direction is not None
            tangents[value.direction][node] = tensor
        with torch.no_grad():
            replay.run(calls(step, *Phase))
            found = [None if node is None else replay.values[node] for _, node in state]
            for direction, known in zip(directions, tangents, strict=True):
                if (source := read.get(direction.key)) is not None:
                    recorder.origin, recorder.phase = source, Phase.TANGENT
                    known[source] = _unit(replay.values[source], direction.index)
                pushed = _pushed(recorder, replay, step, known, stops)
                found += [None if node is None else pushed.get(node) for _, node in state]
            found += [None if node is None else replay.values[node] for _, node in loss]
        return found

    found = recorder.run(run, [*inputs, *(tensor for _, _, tensor in entering)])
    values = [value for value, _ in state]
    for number in range(len(directions)):
        values += [_tangent_of(value, number, "tan_new_") for value, _ in state]
    values += [value for value, _ in loss]
    typed = [*step.inputs, *(value for value, _, _ in entering)]
    outputs = list(zip(values, found, strict=True))
    return assembled(step, recorder, typed, outputs)


def _pushed(
    recorder: Recorder,
    replay: Replay,
    step: StepGraph,
    tangents: Mapping[fx.Node, Tensor],
    stops: set[fx.Node | None],
) -> dict[fx.Node, Tensor]:
    """The tangents of all nodes; at `stops` they end where the update begins."""
    pushed = Pushforward(recorder, replay.values, Phase.TANGENT, tangents)
    pushed.run(calls(step, *(phase for phase in Phase if phase is not Phase.UPDATE)))
    pushed.tangents = {n: t for n, t in pushed.tangents.items() if n not in stops}
    pushed.run(calls(step, Phase.UPDATE))
    return pushed.tangents


def _entering(
    step: StepGraph, live: frozenset[Moving], recorder: Recorder
) -> list[tuple[Value, fx.Node, Tensor]]:
    """Fresh inputs for the live tangents: their types, whose they are, and their tensors.

    As in reverse mode, step counters and integers have no tangents.
    """
    found = []
    for number in sorted({number for number, _ in live}):
        for value, node in differentiable_inputs(step, frozenset()):
            if (number, (value.role, value.label)) in live:
                typed = _tangent_of(value, number, "tan_")
                found.append((typed, node, recorder.input(typed.name, node.meta["val"])))
    return found


def _tangent_of(value: Value, number: int, prefix: str) -> Value:
    name = f"{prefix}{value.name}{f'_{number + 1}' if number else ''}"
    return Value(Role.TANGENT, value.label, name, value.role, direction=number)


def _unit(like: Tensor, index: tuple[int, ...]) -> Tensor:
    """The direction in which one element of a meta-parameter moves."""
    if like.numel() == 1:
        return torch.ones_like(like)
    place = 0
    for position, size in zip(index, like.shape, strict=True):
        place = place * size + position
    places = torch.arange(like.numel(), device=like.device)
    return (places == place).to(like.dtype).reshape(like.shape)
