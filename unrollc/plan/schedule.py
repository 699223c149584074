"""Schedules: which states a run keeps, and in which order steps run and are reversed.

A `Schedule` is a rule with its numbers; the actions follow from it, as they follow from the loops
of the generated program.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from unrollc.plan.actions import (
    Action,
    Advance,
    Drop,
    Fetch,
    Keep,
    Record,
    Restore,
    Reverse,
    Spill,
    Validate,
)
from unrollc.plan.binomial import checkpoints, repeated, stride


@dataclass(frozen=True)
class Schedule:
    """The order of actions of one program run.

    Attributes:
        steps: T.
        stop: The first step that is reversed; 0 for the whole loop, T for none.
        slots: How many states are kept at once besides the first one; None keeps every state.
            The state before θ_T is kept besides, until the backward pass begins with it.
        segment: Every so many steps a state is spilled to the disk, and each segment is reversed
            by itself; None spills none.
        records: Whether steps hold the residuals that their adjoints read.
        directions: How many tangents travel with the state; no step is reversed then.
    """

    steps: int
    stop: int = 0
    slots: int | None = None
    segment: int | None = None
    records: bool = False
    directions: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.stop <= self.steps and self.steps >= 1, self
        assert self.slots is None or self.slots >= 0, self
        assert self.segment is None or self.segment >= 1, self
        assert not self.records or (self.slots is None and self.segment is None), self

    def __iter__(self) -> Iterator[Action]:
        yield from self.forward
        yield from self.backward

    @property
    def differentiates(self) -> bool:
        return self.stop < self.steps

    @property
    def segments(self) -> tuple[range, ...]:
        """The steps that are reversed, cut where states are spilled; without spilling one range."""
        length = self.segment or max(self.steps - self.stop, 1)
        starts = range(self.stop, self.steps, length)
        return tuple(range(start, min(start + length, self.steps)) for start in starts)

    @property
    def kept_forward(self) -> tuple[int, ...]:
        """The states that the forward pass keeps in memory."""
        if not self.differentiates or self.segment is not None:
            return ()
        return self._on_the_way(self.stop, self.steps)

    def _on_the_way(self, first: int, last: int) -> tuple[int, ...]:
        if self.slots is None:
            return tuple(range(first, last))
        return tuple(checkpoints(first, last, self.slots))

    @property
    def forward(self) -> Iterator[Action]:
        """Actions up to and including `Validate`."""
        kept = set(self.kept_forward)
        spilled = {part.start for part in self.segments} if self.segment is not None else set()
        for step in range(self.steps):
            if step in spilled:
                yield Spill(step)
            if step in kept:
                yield Keep(step)
            yield Record(step) if self.records and step >= self.stop else Advance(step)
        yield Validate(self.steps)

    @property
    def backward(self) -> Iterator[Action]:
        """The remaining actions."""
        for part in reversed(self.segments):
            kept = list(self.kept_forward)
            if self.segment is not None:
                yield Fetch(part.start)
                kept = [part.start]
            yield from self._reversed(part, kept)

    def _reversed(self, part: range, kept: list[int]) -> Iterator[Action]:
        """Reverse a range of steps, of whose states `kept` are there, among them the first."""
        slots = len(part) if self.slots is None else self.slots
        for step in reversed(part):
            start = kept[-1]
            yield Restore(start)
            if start == step:
                yield Drop(kept.pop())
            while start < step:
                middle = start + stride(step + 1 - start, slots + 1 - len(kept))
                yield from map(Advance, range(start, middle))
                start = middle
                if start < step:
                    yield Keep(start)
                    kept.append(start)
            yield Reverse(step)

    @property
    def recomputed(self) -> int:
        """How many inner steps run again in the backward pass (adjoints not counted)."""
        if self.segment is not None:  # nothing of a segment but its start is there
            return sum(
                repeated(len(part), self._slots(part)) + len(part) - 1 for part in self.segments
            )
        return repeated(self.steps - self.stop, self._slots(range(self.stop, self.steps)))

    def _slots(self, part: range) -> int:
        return len(part) if self.slots is None else self.slots

    @property
    def name(self) -> str:
        """How reports call the schedule."""
        if self.directions:
            return f"forward mode, {self.directions} direction{'s' * (self.directions > 1)}"
        if not self.differentiates:
            return "forward only"
        kept = "keep every state" if self.slots is None else f"binomial, {self.slots} slots"
        if self.segment is not None:
            return f"spill every {self.segment} steps, within them {kept}"
        return f"{kept} and residuals" if self.records else kept

    def __str__(self) -> str:
        return f"{self.name}: {self.steps} steps, {self.recomputed} recomputed"


def keep_all(steps: int, stop: int = 0) -> Schedule:
    """Keep the start of every step that will be reversed; no step runs twice.

    Args:
        steps: T, at least 1.
        stop: Steps before this one are not reversed (truncated backpropagation).
    """
    return Schedule(steps, stop)


def forward_mode(steps: int, directions: int) -> Schedule:
    """Advance with tangents: the meta-gradient is there when the validation loss is."""
    return Schedule(steps, steps, directions=directions)


def forward_only(steps: int) -> Schedule:
    """Adapt and evaluate; nothing is kept."""
    return Schedule(steps, steps)
