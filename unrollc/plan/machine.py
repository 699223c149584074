"""The reference machine: executes any schedule on state numbers and checks each precondition."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

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


class ScheduleError(AssertionError):
    """An action whose precondition does not hold, with the machine's state."""


@dataclass
class Machine:
    """What a run holds, by numbers.

    Attributes:
        steps: T.
        stop: Where the backward pass must end.
        slots: The most states that may be kept at once besides the first; None for any number.
        current: Number of the current state, or None.
        kept: Numbers of the states kept in memory.
        spilled: Numbers of the states on the disk.
        recorded: The steps whose residuals are held.
        reversed_to: j where B_j is held; None before `Validate`.
        most_kept: The largest number of states kept at once.
        advanced: How often each step ran.
    """

    steps: int
    stop: int = 0
    slots: int | None = None
    current: int | None = 0
    kept: set[int] = field(default_factory=set)
    spilled: set[int] = field(default_factory=set)
    recorded: set[int] = field(default_factory=set)
    reversed_to: int | None = None
    most_kept: int = 0
    advanced: dict[int, int] = field(default_factory=dict)

    def run(self, actions: Iterable[Action]) -> Machine:
        """Execute every action; at the end every step must be reversed and nothing kept.

        Raises:
            ScheduleError: If a precondition fails.
        """
        for action in actions:
            self.execute(action)
        self._require(self.reversed_to == self.stop, "the end", "the backward pass is incomplete")
        left = self.kept or self.spilled or self.recorded
        self._require(not left, "the end", "states are left behind")
        return self

    def execute(self, action: Action) -> None:
        match action:
            case Keep(state) | Spill(state):
                self._require(self.current == state, action, "only the current state can be kept")
                there = self.spilled if isinstance(action, Spill) else self.kept
                self._require(state not in there, action, "it is kept already")
                there.add(state)
                self._count(action)
            case Advance(step) | Record(step):
                self._require(self.current == step, action, "the current state is another")
                self._require(step < self.steps, action, "there is no such step")
                if isinstance(action, Record):
                    self._require(step not in self.recorded, action, "it is recorded already")
                    self.recorded.add(step)
                self.current = step + 1
                self.advanced[step] = self.advanced.get(step, 0) + 1
            case Validate(steps):
                self._require(self.current == self.steps == steps, action, "θ_T is not current")
                self._require(self.reversed_to is None, action, "it ran before")
                self.reversed_to = self.steps
                self.current = None
            case Restore(state):
                self._require(state in self.kept, action, "it is not kept")
                self.current = state
            case Reverse(step):
                self._require(self.current == step, action, "the current state is another")
                self._require(self.reversed_to == step + 1, action, "its cotangent is not there")
                self.reversed_to = step
                self.recorded.discard(step)
                self.current = None
            case Drop(state):
                self._require(state in self.kept, action, "it is not kept")
                self.kept.remove(state)
            case Fetch(state):
                self._require(state in self.spilled, action, "it is not spilled")
                self._require(state not in self.kept, action, "it is kept already")
                self.spilled.remove(state)
                self.kept.add(state)
                self._count(action)
            case _:
                self._require(False, action, "there is no such action")

    def _count(self, action: Action) -> None:
        self.most_kept = max(self.most_kept, len(self.kept))
        if self.slots is not None:
            # The first state, and until the backward pass begins the one before θ_T, are besides.
            besides = 2 if self.reversed_to is None and self.steps - 1 in self.kept else 1
            self._require(len(self.kept) <= self.slots + besides, action, "no slot is free")

    def _require(self, condition: bool, action: object, reason: str) -> None:
        if not condition:
            raise ScheduleError(
                f"{action}: {reason} (current state {self.current}, kept {sorted(self.kept)}, "
                f"cotangent of state {self.reversed_to}, T = {self.steps})"
            )
