"""What a whole run costs."""

from __future__ import annotations

from collections import Counter

from unrollc.plan.cost import Cost, cost_of
from unrollc.plan.horizon import steady
from unrollc.plan.pieces import Pieces


def total_cost(pieces: Pieces) -> Cost:
    """The cost of the whole run; steps that run again count as steady ones."""
    schedule = pieces.schedule
    runs = Counter(pieces.sequence)
    runs[pieces.sequence[steady(pieces)[0]]] += schedule.recomputed
    reversals = Counter(index for index in pieces.adjoint_sequence if index is not None)
    parts = [
        (cost_of(pieces.val_gradient or pieces.val), 1),
        *((cost_of(graph), 1) for graph in (pieces.prologue, pieces.epilogue) if graph),
        *((cost_of(pieces.steps[index]), count) for index, count in runs.items()),
        *((cost_of(pieces.adjoints[index].graph), count) for index, count in reversals.items()),
    ]
    return Cost(
        sum(part.operations * count for part, count in parts),
        sum(part.bytes_moved * count for part, count in parts),
        sum(part.calls * count for part, count in parts),
    )
