"""Binomial checkpointing: the fewest repeated steps for a given number of kept states.

Griewank and Walther 2000, "Algorithm 799: Revolve". From a kept state, n steps are to be reversed
while at most s more states can be kept at once. The best is to advance some m steps, keep that
state, reverse the n - m steps behind it with s - 1 slots, and then the m steps before it with s
again. These functions stand in the generated program word for word.
"""

from __future__ import annotations

import math


def stride(steps: int, slots: int) -> int:
    """How far to advance before the next state is kept, so that the fewest steps run again.

    Args:
        steps: How many steps are reversed, from a kept state; at least 2.
        slots: How many more states can be kept.
    """
    if slots == 0:
        return steps - 1
    sweeps = 1  # so often a step runs, at most
    while math.comb(slots + 1 + sweeps, sweeps) < steps:
        sweeps += 1
    longest = math.comb(slots + sweeps, sweeps - 1)
    return min(longest, steps - math.comb(slots + sweeps - 1, sweeps - 1))


def checkpoints(first: int, last: int, slots: int) -> list[int]:
    """The states to keep on the way from state `first` to state `last`, which is reversed next.

    The state before the last one is among them: its step is reversed first.
    """
    kept = []
    while first < last:
        kept.append(first)
        first += stride(last - first, slots) if last - first > 1 else 1
        slots -= slots > 0
    return kept


def repeated(steps: int, slots: int) -> int:
    """How many of `steps` steps run again while they are reversed (Griewank and Walther, eq. 3).

    The first sweep over them is not counted; its last state is kept.
    """
    if steps < 2:
        return 0
    sweeps = 1
    while math.comb(slots + 1 + sweeps, sweeps) < steps:
        sweeps += 1
    evaluated = sweeps * steps - math.comb(slots + 1 + sweeps, sweeps - 1)
    return evaluated - (steps - 1)
