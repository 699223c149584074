"""The peak of a run over many steps, predicted from a run over few.

Between its first and last steps a loop repeats itself. A short loop with as many slots therefore
reaches the same peak, and each further slot adds one steady state to it; what grows with T (inner
losses, gradients of single steps) counts as for all of T.
"""

from __future__ import annotations

from dataclasses import replace

from unrollc.plan.horizon import extended, steady
from unrollc.plan.pieces import Pieces
from unrollc.plan.schedule import Schedule
from unrollc.plan.simulate import Moment, Peak, Simulation, simulate

#: Slots of a short loop; every further one adds the same bytes.
_FEW_SLOTS = 3


def predict(pieces: Pieces) -> Peak:
    """The peak of a run of the program under its own schedule."""
    return Predictor(pieces).peak(pieces.schedule)


class Predictor:
    """The peaks of one program under one schedule after another; short loops are run once."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._known: dict[Schedule, Simulation] = {}

    def peak(self, schedule: Schedule) -> Peak:
        """The peak of a run under `schedule`."""
        pieces = replace(self._pieces, schedule=schedule)
        length = _short(pieces)
        listed = (pieces.per_step - pieces.stacked) & set(pieces.wanted)
        truncated = schedule.differentiates and schedule.stop > 0
        if length is None or length >= schedule.steps or listed or truncated:
            return simulate(pieces).peak
        slots = schedule.slots
        if schedule.segment is not None or slots is None or slots <= _FEW_SLOTS:
            return _renamed(self._briefly(schedule).peak, pieces)
        few, more = (self._briefly(replace(schedule, slots=_FEW_SLOTS + n)) for n in (0, 1))
        after = {peak.kind: peak for peak in more.peaks}
        grown = [_grown(peak, after[peak.kind], slots - _FEW_SLOTS) for peak in few.peaks]
        return _renamed(max(grown, key=lambda peak: peak.moment.bytes), pieces)

    def bytes(self, schedule: Schedule) -> int:
        """The bytes of that peak."""
        return self.peak(schedule).moment.bytes

    def _briefly(self, schedule: Schedule) -> Simulation:
        """A short loop, with T's entries where each step has its own."""
        if schedule not in self._known:
            pieces = replace(self._pieces, schedule=schedule)
            length = _short(pieces)
            assert length is not None
            self._known[schedule] = simulate(extended(pieces, length), schedule.steps)
        return self._known[schedule]


def _short(pieces: Pieces) -> int | None:
    """Steps of a loop that is as good as the whole one; None where there is none.

    There is none where every state is kept, so that each step adds to what is held.
    """
    schedule = pieces.schedule
    first, last = steady(pieces)
    ends = first + len(pieces.sequence) - last
    if last - first < 2:
        return None
    if schedule.segment is not None:
        rounds = -(-(ends + 2) // schedule.segment) + 2
        return schedule.steps % schedule.segment + rounds * schedule.segment
    if schedule.slots is None:
        return None if schedule.differentiates else ends + 2
    # So long that once all slots are taken, and a step is reversed whose state is in none.
    return ends + 4 * (schedule.slots + 2)


def _grown(few: Peak, more: Peak, slots: int) -> Peak:
    """The peak of this kind with `slots` slots more than `few` has; `more` has one more."""

    def grown(before: int, after: int) -> int:
        return before + slots * (after - before)

    sizes = {(part.what, part.where): part.bytes for part in more.composition}
    parts = [
        replace(part, bytes=grown(part.bytes, sizes.get((part.what, part.where), part.bytes)))
        for part in few.composition
    ]
    a, b = few.moment, more.moment
    moment = Moment(b.action, grown(a.bytes, b.bytes), grown(a.kept, b.kept), b.local)
    return Peak(few.kind, moment, tuple(sorted(parts, key=lambda part: -part.bytes)))


def _renamed(peak: Peak, pieces: Pieces) -> Peak:
    """The peak with a name that holds in the whole loop: which of its steps reaches it first
    is not known, if it is none of the first ones."""
    number = peak.moment.action.removeprefix(peak.kind).strip()
    if not number or int(number) < steady(pieces)[0]:
        return peak
    action = f"{peak.kind.removesuffix('step')}a step in the middle"
    return replace(peak, moment=replace(peak.moment, action=action))
