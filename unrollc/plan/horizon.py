"""The same program over another number of inner steps."""

from __future__ import annotations

from dataclasses import replace

from unrollc.errors import InputError
from unrollc.plan.forward import in_forward_mode
from unrollc.plan.pieces import ForwardMode, Pieces


def extended(pieces: Pieces, steps: int) -> Pieces:
    """The pieces of a loop of `steps` steps: its first and last ones as they are, between them the
    steady one as often as needed.

    Args:
        pieces: A captured program.
        steps: T.

    Raises:
        InputError: If the captured loop is too short to tell what its steady step is.
    """
    known = len(pieces.sequence)
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise InputError(f"for_steps({steps!r})", remedy="pass a positive number of steps")
    if steps == known:
        return pieces
    stop = pieces.schedule.stop
    back = known - stop
    # What lies before the steady stretch, and behind it, has its own steps and adjoints.
    begins, ends = steady(pieces)
    head, tail = begins, known - ends
    if begins == ends or steps < head + tail + 1:
        raise InputError(
            f"for_steps({steps}) needs a loop with a steady middle",
            why=f"of the {known} captured steps, {head + tail} differ from their neighbours, or "
            "their adjoints do",
            remedy=f"lower the program with more steps than {known}, or with {steps} itself",
        )
    middle = steps - head - tail

    def stretched(order: tuple[int, ...]) -> tuple[int, ...]:
        return (*order[:head], *[order[head]] * middle, *order[known - tail :])

    truncated = 0 < stop < known
    new_stop = 0 if stop == 0 else steps if not pieces.differentiates else max(steps - back, 0)
    if truncated and new_stop != steps - back:
        raise InputError(
            f"for_steps({steps}) is shorter than the {back} steps that are reversed",
            remedy="lower the program with that many steps",
        )
    return replace(
        pieces,
        sequence=stretched(pieces.sequence),
        adjoint_sequence=stretched(pieces.adjoint_sequence),  # type: ignore[arg-type]
        schedule=replace(pieces.schedule, steps=steps, stop=new_stop),
        forward=(forward := _extended_forward(pieces, steps)),
        no_forward=pieces.no_forward if forward or not pieces.forward else _UNKNOWN,
    )


_UNKNOWN = "the captured loop is too short to tell its steady step in forward mode"


def _extended_forward(pieces: Pieces, steps: int) -> ForwardMode | None:
    """The form in forward mode, whose steady steps may be others."""
    if pieces.forward is None:
        return None
    try:
        sequence = extended(in_forward_mode(pieces), steps).sequence
    except InputError:  # its steps differ from one another for longer
        return None
    return replace(pieces.forward, sequence=sequence)


def steady(pieces: Pieces) -> tuple[int, int]:
    """The longest stretch of steps that equal the last one, and have equal adjoints: its first step
    and its end; an empty one where there is none.

    Other stretches may be longer, as before an optimizer begins to rectify, but later steps are as
    the last one. In forward mode the last step has no use for all tangents and is another: there
    the last stretch of several steps counts.
    """
    pairs = list(zip(pieces.sequence, pieces.adjoint_sequence, strict=True))
    best, last = (0, 0), pieces.sequence[-1]
    start = 0
    for end in range(1, len(pairs) + 1):
        if end == len(pairs) or pairs[end] != pairs[start]:
            several = end - start > 1 if pieces.directions else pairs[start][0] == last
            longer = pieces.directions or end - start > best[1] - best[0]
            if several and longer and start < len(pairs) - 1:
                best = (start, end)
            start = end
    return best
