"""The graphs of a program and the order in which a schedule runs them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from unrollc.differentiate.adjoint import StepAdjoint
from unrollc.differentiate.tangent import Direction
from unrollc.optimize.in_place import write_in_place
from unrollc.optimize.narrow_products import merge_narrow_products
from unrollc.plan.cost import human_bytes
from unrollc.plan.order import in_lean_order
from unrollc.plan.schedule import Schedule
from unrollc.step import CARRIED, STATE_ROLES, Role, StepGraph, Value

#: Names of the functions that run once, before the loop and behind its backward pass.
PROLOGUE, EPILOGUE = "prologue", "epilogue"


@dataclass(frozen=True)
class ForwardMode:
    """The loop in forward mode, as an alternative to its adjoints.

    Attributes:
        steps: The distinct inner steps with tangents.
        sequence: For each of the T steps an index into `steps`.
        directions: The elements of meta-parameters that the tangents belong to.
    """

    steps: tuple[StepGraph, ...]
    sequence: tuple[int, ...]
    directions: tuple[Direction, ...]


@dataclass(frozen=True)
class Pieces:
    """Everything that the memory plan and the code generator need.

    Attributes:
        steps: The distinct inner steps; outputs are the new state and the inner loss.
        sequence: For each of the T steps an index into `steps`.
        adjoints: The distinct adjoints; which state outputs carry a cotangent differs.
        adjoint_sequence: For each step an index into `adjoints`, or None before `schedule.stop`.
        val: The validation loss.
        val_gradient: The validation loss with B_T and its direct contributions; None for a
            program that only adapts.
        schedule: The order of actions.
        per_step: Labels of inputs with one entry a step (`PerStep` values, batches).
        stacked: Those of `per_step` that are one tensor with a leading T.
        wanted: Labels of the meta-parameters whose gradient is returned.
        forward: The same loop in forward mode, where that is possible.
        no_forward: Why it is not possible.
        directions: The directions of the tangents that the steps carry, in forward mode.
        packed: What is to be said about state that travels as vectors.
        prologue: What no step changes, computed once before the first; None if that is nothing.
        epilogue: The adjoint of the prologue, which runs once behind the backward pass.
    """

    steps: tuple[StepGraph, ...]
    sequence: tuple[int, ...]
    adjoints: tuple[StepAdjoint, ...]
    adjoint_sequence: tuple[int | None, ...]
    val: StepGraph
    val_gradient: StepGraph | None
    schedule: Schedule
    per_step: frozenset[str]
    stacked: frozenset[str]
    wanted: tuple[str, ...]
    forward: ForwardMode | None = None
    no_forward: str = ""
    directions: tuple[Direction, ...] = ()
    packed: str = ""
    prologue: StepGraph | None = None
    epilogue: StepGraph | None = None

    @property
    def differentiates(self) -> bool:
        return self.val_gradient is not None

    @property
    def named_graphs(self) -> tuple[tuple[str, StepGraph], ...]:
        """Every graph with the name of its function in the generated program."""
        found = (
            (PROLOGUE, self.prologue),
            *((f"step_{i}", step) for i, step in enumerate(self.steps)),
            ("validate", self.val_gradient or self.val),
            *((f"adjoint_{i}", adjoint.graph) for i, adjoint in enumerate(self.adjoints)),
            (EPILOGUE, self.epilogue),
        )
        return tuple((name, graph) for name, graph in found if graph is not None)

    @property
    def device(self) -> torch.device:
        """Where the fast weights live."""
        _, node = self.steps[0].inputs_with(Role.THETA)[0]
        device: torch.device = node.meta["val"].device
        return device

    @property
    def carried(self) -> tuple[Value, ...]:
        """What the last step returns besides its loss: the state, and tangents behind it."""
        last = self.steps[self.sequence[-1]]
        return tuple(value for value, node in last.outputs_with(*CARRIED) if node is not None)

    @property
    def validated_roles(self) -> frozenset[Role]:
        """Roles of the state that the validation loss takes."""
        return frozenset(value.role for value, _ in self.val.inputs_with(*STATE_ROLES))

    @property
    def hoisted(self) -> str:
        """What is to be said about values that are computed before the loop."""
        if self.prologue is None:
            return ""
        sizes = [node.meta["val"].nbytes for node in self.prologue.results if node is not None]
        count = "1 value" if len(sizes) == 1 else f"{len(sizes)} values"
        return f"{count} that no step changes ({human_bytes(sum(sizes))}), computed once"

    @property
    def graphs(self) -> tuple[StepGraph, ...]:
        """The graphs that a run executes forward."""
        return (*self.steps, self.val)

    @functools.cached_property
    def totalled(self) -> tuple[str, ...]:
        """Labels of the meta-parameters whose gradient adds up in one tensor, step by step."""
        graphs = [
            self.val_gradient,
            *(adjoint.graph for adjoint in self.adjoints),
            self.epilogue,
        ]
        found = {
            value.label
            for graph in graphs
            if graph is not None
            for value, node in graph.outputs_with(Role.COTANGENT)
            if node is not None and value.of not in STATE_ROLES
        } | {direction.key[1] for direction in self.directions}
        return tuple(sorted((found - self.per_step) | (self.stacked & set(self.wanted))))

    @functools.cached_property
    def _sizes(self) -> dict[str, int]:
        graphs = [*self.steps, self.val, *(adjoint.graph for adjoint in self.adjoints)]
        return {
            value.label: node.meta["val"].numel() * node.meta["val"].element_size()
            for graph in graphs
            for value, node in zip(graph.inputs, graph.placeholders, strict=True)
            if value.role not in (Role.COTANGENT, Role.TANGENT)
        }

    def bytes_of(self, label: str, steps: int) -> int:
        """Bytes of an input of the program, over so many steps where each has its own."""
        return self._sizes[label] * (steps if label in self.per_step else 1)


def ready_to_run(pieces: Pieces, *, lean: bool) -> Pieces:
    """The graphs as they will run: nothing may keep more values from here on.

    Narrow products are merged where differentiation made them; elementwise ops write in place.

    Args:
        pieces: The program.
        lean: Whether ops are put in an order that holds less; the given order reads better.
    """

    def settled(graph: StepGraph, *, primal: bool = False) -> StepGraph:
        merged = merge_narrow_products(graph, primal=primal)
        return write_in_place(in_lean_order(merged) if lean else merged)

    def adjoint(each: StepAdjoint) -> StepAdjoint:
        return replace(each, graph=settled(each.graph, primal=True))

    return replace(
        pieces,
        steps=tuple(settled(step) for step in pieces.steps),
        adjoints=tuple(adjoint(each) for each in pieces.adjoints),
        val=settled(pieces.val),
        val_gradient=pieces.val_gradient and settled(pieces.val_gradient),
        prologue=pieces.prologue and settled(pieces.prologue),
        epilogue=pieces.epilogue and settled(pieces.epilogue, primal=True),
    )
