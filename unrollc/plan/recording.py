"""Steps that hold residuals for their adjoints: a partition of each pair, for a price of a byte."""

from __future__ import annotations

from dataclasses import replace

from unrollc.differentiate.adjoint import StepAdjoint
from unrollc.plan.partition import Partition, partition
from unrollc.plan.pieces import Pieces
from unrollc.step import StepGraph


def recording(pieces: Pieces, price: float) -> Pieces:
    """``pieces --> pieces``: each step returns what its adjoint would compute again.

    Args:
        pieces: A program that keeps every state.
        price: Of a kept byte, in operations (see `partition`).
    """
    assert pieces.schedule.slots is None and pieces.schedule.segment is None, pieces.schedule
    steps: list[StepGraph] = []
    adjoints: list[StepAdjoint] = []
    known: dict[tuple[int, int | None], int] = {}
    order: list[int] = []
    adjoint_order: list[int | None] = []
    for pair in zip(pieces.sequence, pieces.adjoint_sequence, strict=True):
        step, adjoint = pair
        if pair not in known:
            known[pair] = len(steps)
            if adjoint is None:
                steps.append(pieces.steps[step])
            else:
                graph = pieces.adjoints[adjoint].graph
                parts = partition(pieces.steps[step], graph, price, spare_results=True)
                steps.append(parts.step)
                adjoints.append(_told(pieces.adjoints[adjoint], parts))
        order.append(known[pair])
        first = sum(index is None for _, index in known)
        adjoint_order.append(None if adjoint is None else known[pair] - first)
    return replace(
        pieces,
        steps=tuple(steps),
        sequence=tuple(order),
        adjoints=tuple(adjoints),
        adjoint_sequence=tuple(adjoint_order),
        schedule=replace(pieces.schedule, records=True),
    )


def _told(adjoint: StepAdjoint, parts: Partition) -> StepAdjoint:
    count = len(parts.kept)
    reason = f"{adjoint.reason}; {count} values of the step are kept for it"
    return replace(adjoint, graph=parts.adjoint, reason=reason.lstrip("; "))
