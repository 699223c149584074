"""Which schedule a budget allows: the fewest repeated steps that fit.

Peaks grow with the number of kept states, so the largest number of slots is found by bisection.
"""

from __future__ import annotations

from dataclasses import replace

from unrollc.errors import BudgetError
from unrollc.plan.cost import human_bytes
from unrollc.plan.pieces import Pieces
from unrollc.plan.schedule import Schedule
from unrollc.plan.simulate import Simulation, simulate


def choose_schedule(pieces: Pieces, budget: int) -> Schedule:
    """The schedule with the fewest repeated steps whose predicted peak is within the budget.

    Args:
        pieces: The program; the T and the stop of its schedule count.
        budget: Bytes that a run may hold beyond its inputs.

    Raises:
        BudgetError: If no schedule fits; it names the smallest budget that would do.
    """
    given = pieces.schedule
    if _fits(pieces, given, budget):
        return given
    if not given.differentiates:
        raise _too_small(pieces, given, budget)
    leanest = replace(given, slots=0, records=False)
    if not _fits(pieces, leanest, budget):
        raise _too_small(pieces, leanest, budget)
    fitting, too_many = 0, given.steps - given.stop
    while too_many - fitting > 1:
        slots = (fitting + too_many) // 2
        if _fits(pieces, replace(leanest, slots=slots), budget):
            fitting = slots
        else:
            too_many = slots
    return replace(leanest, slots=fitting)


def _fits(pieces: Pieces, schedule: Schedule, budget: int) -> bool:
    return _simulated(pieces, schedule).peak.bytes <= budget


def _simulated(pieces: Pieces, schedule: Schedule) -> Simulation:
    return simulate(replace(pieces, schedule=schedule))


def _too_small(pieces: Pieces, leanest: Schedule, budget: int) -> BudgetError:
    found = _simulated(pieces, leanest)
    needed = found.peak.bytes
    largest = found.composition[0]
    where = f" ({largest.where.short})" if largest.where is not None else ""
    return BudgetError(
        f"the program does not fit into memory={human_bytes(budget)}: the smallest budget that "
        f"works is {needed} bytes ({human_bytes(needed)})",
        where=largest.where,
        why=f"its peak is at {found.peak.action}, where {largest.what}{where} take "
        f"{human_bytes(largest.bytes)}",
        remedy=f"pass memory={needed} or more, or make batches or the model smaller",
    )
