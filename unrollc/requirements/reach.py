"""From which inputs a meta-gradient can be non-zero: the live sets of the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from unrollc.requirements.dependence import Dependence, Key, reached_from, sources_of
from unrollc.step import STARTS, STATE_ROLES, Role


@dataclass(frozen=True)
class Graphs:
    """The captured program as dependence graphs.

    Attributes:
        steps: The distinct inner steps.
        sequence: Which of them runs when.
        val: The validation loss.
        first_order: Whether the inner gradient counts as a constant.
        steps_back: How many steps the backward pass goes back.
    """

    steps: tuple[Dependence, ...]
    sequence: tuple[int, ...]
    val: Dependence
    first_order: bool
    steps_back: int

    @property
    def all(self) -> tuple[Dependence, ...]:
        return (*self.steps, self.val)

    @property
    def reached(self) -> frozenset[Key]:
        """Inputs of the program from which a differentiable path leads to Lval."""
        return self._walk[0]

    @property
    def live(self) -> frozenset[Key]:
        """State from which, at some step, a differentiable path leads to Lval."""
        return self._walk[1]

    @functools.cached_property
    def _walk(self) -> tuple[frozenset[Key], frozenset[Key]]:
        live = {key for key, node in self.val.inputs.items() if node in self.val.into_loss}
        reached = {key for key in live if key[0] not in STATE_ROLES}
        state = {key for key in live if key[0] in STATE_ROLES}
        ever = set(state)
        stop = len(self.sequence) - self.steps_back
        before: dict[tuple[int, frozenset[Key]], set[Key]] = {}
        for index in reversed(self.sequence[stop:]):
            memo = (index, frozenset(state))
            if memo not in before:
                graph = self.steps[index]
                edges = graph.direct if self.first_order else graph.smooth
                sources = sources_of(edges, graph.state_results(state))
                before[memo] = {key for key, node in graph.inputs.items() if node in sources}
            reached |= {key for key in before[memo] if key[0] not in STATE_ROLES}
            state = {key for key in before[memo] if key[0] in STATE_ROLES}
            ever |= state
        if stop == 0:
            reached |= {key for key in state if key[0] in STARTS}
        return frozenset(reached), frozenset(ever)

    def states_reached(self, key: Key) -> list[str]:
        """Labels of the fast weights that an input reaches within one step."""
        found: dict[str, None] = {}
        for graph in self.steps:
            if key not in graph.inputs:
                continue
            moving = reached_from(graph.smooth, [graph.inputs[key]])
            for value, node in graph.step.outputs_with(Role.THETA):
                if node in moving and node is not graph.inputs[key]:
                    found[value.label] = None
        return list(found)


def on_the_way(
    graph: Dependence, start: fx.Node, edges: Sequence[tuple[fx.Node, fx.Node]]
) -> list[tuple[fx.Node, fx.Node]]:
    """Those of `edges` that lie on a differentiable path from `start` to a result."""
    moving = reached_from(graph.smooth, [start])
    ends = sources_of(graph.smooth, graph.results(*STATE_ROLES, Role.LOSS))
    return [(a, b) for a, b in edges if a in moving and b in ends]
