"""How many threads pay off."""

from __future__ import annotations

from unrollc.plan.cost import cost_of
from unrollc.plan.pieces import Pieces
from unrollc.step import StepGraph

#: A graph that one thread is done with in so many seconds is run by one: waking others takes longer
#: than they save.
_ALONE = 1e-3


def is_small(graph: StepGraph) -> bool:
    """Whether a graph runs faster on one thread, by the rates of this machine."""
    return cost_of(graph).seconds < _ALONE


def all_small(pieces: Pieces) -> bool:
    """Whether no function of a program is worth a second thread."""
    return all(is_small(graph) for _, graph in pieces.named_graphs)
