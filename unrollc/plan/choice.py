"""Which program a budget allows: forward mode, or the schedule with the fewest repeated steps.

Peaks grow with the number of kept states, so the largest number of slots is found by doubling and
bisection.
"""

from __future__ import annotations

import math
from dataclasses import replace

from unrollc.errors import BudgetError
from unrollc.plan.cost import human_bytes
from unrollc.plan.forward import in_forward_mode
from unrollc.plan.pieces import Pieces
from unrollc.plan.predict import predict
from unrollc.plan.schedule import Schedule
from unrollc.plan.work import total_cost


def choose(pieces: Pieces, budget: int | None, *, spill: bool = False) -> tuple[Pieces, str]:
    """The program to run, its schedule chosen, and what is to be said about forward mode.

    Forward mode keeps nothing for a backward pass, but pushes a tangent forward for every element
    of the meta-parameters. Of the programs that fit, the one with the lower predicted cost.

    Args:
        pieces: A program with adjoints, and maybe a form in forward mode.
        budget: Bytes that a run may hold beyond its inputs; None without a budget.
        spill: Whether states go to the disk, from where a run is taken up again.

    Raises:
        BudgetError: If none fits; it names the smallest budget that would do.
    """
    if spill:
        schedule = choose_segments(pieces, budget)
        why = "states are spilled" if pieces.forward else pieces.no_forward
        return replace(pieces, schedule=schedule, forward=None, no_forward=why), _not_taken(why)
    if pieces.forward is None:
        schedule = pieces.schedule if budget is None else choose_schedule(pieces, budget)
        return replace(pieces, schedule=schedule), _not_taken(pieces.no_forward)
    forward = in_forward_mode(pieces)
    peak = _peak(forward, forward.schedule)
    if budget is not None and (least := _smallest(pieces)) > budget:
        if peak <= budget:
            return forward, "taken: no schedule of a backward pass fits into the budget"
        leanest = forward if peak < least else pieces
        raise _too_small(leanest, _leanest(leanest.schedule), budget)
    schedule = pieces.schedule if budget is None else choose_schedule(pieces, budget)
    reverse = replace(pieces, schedule=schedule, forward=None)
    ratio = total_cost(forward).weight / max(total_cost(reverse).weight, 1.0)
    why = f"predicted {ratio:.2f} of the cost with a backward pass ({schedule.name})"
    if budget is not None and peak > budget:
        why = f"it would hold {human_bytes(peak)}"
    elif ratio < 1:
        return forward, f"taken: {why}"
    return replace(reverse, no_forward=why), _not_taken(why)


def _not_taken(why: str) -> str:
    return f"not taken: {why}" if why else ""


def choose_schedule(pieces: Pieces, budget: int) -> Schedule:
    """The schedule with the fewest repeated steps whose predicted peak is within the budget.

    Args:
        pieces: The program; the T and the stop of its schedule count.
        budget: Bytes that a run may hold beyond its inputs.

    Raises:
        BudgetError: If no schedule fits; it names the smallest budget that would do.
    """
    given = pieces.schedule
    back = given.steps - given.stop
    leanest = _leanest(given)
    if _peak(pieces, leanest) > budget:
        raise _too_small(pieces, leanest, budget)
    if not given.differentiates:
        return given
    # Long loops with many slots take longer to plan, so the search starts with few.
    fitting, tried = 0, 1
    while tried < back - 1 and _peak(pieces, replace(leanest, slots=tried)) <= budget:
        fitting, tried = tried, 2 * tried
    if tried >= back - 1 and _peak(pieces, given) <= budget:
        return given
    too_many = min(tried, back)
    while too_many - fitting > 1:
        slots = (fitting + too_many) // 2
        if _peak(pieces, replace(leanest, slots=slots)) <= budget:
            fitting = slots
        else:
            too_many = slots
    return replace(leanest, slots=fitting)


def choose_segments(pieces: Pieces, budget: int | None) -> Schedule:
    """The two-level schedule: states on the disk, and between two of them every state in memory.

    Each step runs twice whatever the length of a segment, so √T steps are enough: that many states
    are written, and a run that is cut off loses no more work than one segment. Where they do not
    fit, the longest segments that do are taken.

    Args:
        pieces: The program; the T and the stop of its schedule count.
        budget: Bytes that a run may hold beyond its inputs; None for no limit.

    Raises:
        BudgetError: If not even segments of one step fit.
    """
    given = pieces.schedule
    if not given.differentiates:
        return given if budget is None else choose_schedule(pieces, budget)
    wished = math.isqrt(given.steps - given.stop - 1) + 1
    longest = replace(given, slots=None, segment=wished, records=False)
    if budget is None or _peak(pieces, longest) <= budget:
        return longest
    shortest = replace(longest, segment=1)
    if _peak(pieces, shortest) > budget:
        raise _too_small(pieces, shortest, budget)
    fitting, too_long = 1, wished
    while too_long - fitting > 1:
        length = (fitting + too_long) // 2
        if _peak(pieces, replace(longest, segment=length)) <= budget:
            fitting = length
        else:
            too_long = length
    return replace(longest, segment=fitting)


def _leanest(schedule: Schedule) -> Schedule:
    """The schedule that keeps one state; a program without a backward pass has no choice."""
    return replace(schedule, slots=0, records=False) if schedule.differentiates else schedule


def _smallest(pieces: Pieces) -> int:
    return _peak(pieces, _leanest(pieces.schedule))


def _peak(pieces: Pieces, schedule: Schedule) -> int:
    return predict(replace(pieces, schedule=schedule)).moment.bytes


def _too_small(pieces: Pieces, leanest: Schedule, budget: int) -> BudgetError:
    found = predict(replace(pieces, schedule=leanest))
    needed = found.moment.bytes
    largest = found.composition[0]
    where = f" ({largest.where.short})" if largest.where is not None else ""
    return BudgetError(
        f"the program does not fit into memory={human_bytes(budget)}: the smallest budget that "
        f"works is {needed} bytes ({human_bytes(needed)})",
        where=largest.where,
        why=f"its peak is at {found.moment.action}, where {largest.what}{where} take "
        f"{human_bytes(largest.bytes)}",
        remedy=f"pass memory={needed} or more, or make batches or the model smaller",
    )
