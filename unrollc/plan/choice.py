"""Which program a budget allows: the cheapest that fits.

While every state fits, steps may hold residuals for their adjoints as well; beyond that the fewest
steps run again. Peaks grow with the number of kept states, so the largest number of slots is found
by doubling and bisection.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace

import torch

from unrollc.errors import BudgetError
from unrollc.plan.cost import human_bytes
from unrollc.plan.forward import in_forward_mode
from unrollc.plan.pieces import Pieces, ready_to_run
from unrollc.plan.predict import Predictor, predict
from unrollc.plan.recording import recording
from unrollc.plan.schedule import Schedule
from unrollc.plan.work import total_cost

#: Prices of a kept byte in operations, from "keep most" to "keep what is dearest to compute": at
#: 100 a transformer's adjoint repeats 2 % of its step's products and keeps half of what it could.
_PRICES = (100.0, 1000.0, 10_000.0)


def choose(pieces: Pieces, budget: int | None, *, spill: bool = False) -> tuple[Pieces, str]:
    """The program to run, its schedule chosen, and what is to be said about forward mode.

    Forward mode keeps nothing for a backward pass, but pushes a tangent forward for every element
    of the meta-parameters. Of the programs that fit, the one with the lower predicted cost.

    Args:
        pieces: A program that keeps every state, and maybe a form in forward mode.
        budget: Bytes that a run may hold beyond its inputs. None for the fastest program; steps
            hold residuals then if half of the device's memory is enough.
        spill: Whether states go to the disk, from where a run is taken up again.

    Raises:
        BudgetError: If none fits; it names the smallest budget that would do.
    """
    if spill:
        pieces = _ready(pieces, budget)
        schedule = choose_segments(pieces, budget)
        why = "states are spilled" if pieces.forward else pieces.no_forward
        return replace(pieces, schedule=schedule, forward=None, no_forward=why), _not_taken(why)
    if pieces.forward is None:
        return _with_schedule(pieces, budget), _not_taken(pieces.no_forward)
    forward = _ready(in_forward_mode(pieces), budget)
    peak = predict(forward).moment.bytes
    if budget is not None and (least := _smallest(plain := _ready(pieces, budget))) > budget:
        if peak <= budget:
            return forward, "taken: no schedule of a backward pass fits into the budget"
        leanest = forward if peak < least else plain
        raise _too_small(leanest, _leanest(leanest.schedule), budget)
    reverse = _with_schedule(replace(pieces, forward=None), budget)
    ratio = total_cost(forward).weight / max(total_cost(reverse).weight, 1.0)
    why = f"predicted {ratio:.2f} of the cost with a backward pass ({reverse.schedule.name})"
    if budget is not None and peak > budget:
        why = f"it would hold {human_bytes(peak)}"
    elif ratio < 1:
        return forward, f"taken: {why}"
    return replace(reverse, no_forward=why), _not_taken(why)


def _ready(pieces: Pieces, budget: int | None) -> Pieces:
    return ready_to_run(pieces, lean=budget is not None)


def _not_taken(why: str) -> str:
    return f"not taken: {why}" if why else ""


def _with_schedule(pieces: Pieces, budget: int | None) -> Pieces:
    """The program under the cheapest schedule that fits, with residuals where there is room."""
    found = _ready(pieces, budget)
    if budget is None:
        limit = _device_memory(pieces) // 2
    else:
        limit = budget
        found = replace(found, schedule=choose_schedule(found, budget))
    if not pieces.differentiates or found.schedule.slots is not None:
        return found
    for price in _PRICES:
        recorded = _ready(recording(pieces, price), budget)
        if predict(recorded).moment.bytes <= limit:
            return min(found, recorded, key=lambda each: total_cost(each).weight)
    return found


def _device_memory(pieces: Pieces) -> int:
    """Bytes of the memory in which the program's tensors live."""
    device = pieces.device
    if device.type == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def choose_schedule(pieces: Pieces, budget: int) -> Schedule:
    """The schedule with the fewest repeated steps whose predicted peak is within the budget.

    Args:
        pieces: The program; the T and the stop of its schedule count.
        budget: Bytes that a run may hold beyond its inputs.

    Raises:
        BudgetError: If no schedule fits; it names the smallest budget that would do.
    """
    given, predictor = pieces.schedule, Predictor(pieces)
    back = given.steps - given.stop
    leanest = _leanest(given)
    if predictor.bytes(leanest) > budget:
        raise _too_small(pieces, leanest, budget)
    if not given.differentiates:
        return given
    # Where a loop is too short to be cut, many slots take longer to plan: few are tried first.
    fitting, tried = 0, 1
    while tried < back - 1 and predictor.bytes(replace(leanest, slots=tried)) <= budget:
        fitting, tried = tried, 2 * tried
    if tried >= back - 1 and predictor.bytes(given) <= budget:
        return given
    too_many = min(tried, back)
    while too_many - fitting > 1:
        slots = (fitting + too_many) // 2
        if predictor.bytes(replace(leanest, slots=slots)) <= budget:
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
    given, predictor = pieces.schedule, Predictor(pieces)
    if not given.differentiates:
        return given if budget is None else choose_schedule(pieces, budget)
    wished = math.isqrt(given.steps - given.stop - 1) + 1
    longest = replace(given, slots=None, segment=wished, records=False)
    if budget is None or predictor.bytes(longest) <= budget:
        return longest
    shortest = replace(longest, segment=1)
    if predictor.bytes(shortest) > budget:
        raise _too_small(pieces, shortest, budget)
    fitting, too_long = 1, wished
    while too_long - fitting > 1:
        length = (fitting + too_long) // 2
        if predictor.bytes(replace(longest, segment=length)) <= budget:
            fitting = length
        else:
            too_long = length
    return replace(longest, segment=fitting)


def _leanest(schedule: Schedule) -> Schedule:
    """The schedule that keeps one state; a program without a backward pass has no choice."""
    return replace(schedule, slots=0, records=False) if schedule.differentiates else schedule


def _smallest(pieces: Pieces) -> int:
    return Predictor(pieces).bytes(_leanest(pieces.schedule))


def _too_small(pieces: Pieces, leanest: Schedule, budget: int) -> BudgetError:
    found = predict(replace(pieces, schedule=leanest))
    needed = found.moment.bytes
    largest = found.composition[0]
    where = f" ({largest.where.short})" if largest.where is not None else ""
    error = BudgetError(
        f"the program does not fit into memory={human_bytes(budget)}: the smallest budget that "
        f"works is {needed} bytes ({human_bytes(needed)})",
        where=largest.where,
        why=f"its peak is at {found.moment.action}, where {largest.what}{where} take "
        f"{human_bytes(largest.bytes)}",
        remedy=f"pass memory={needed} or more, or make batches or the model smaller",
    )
    error.smallest = needed
    return error
