"""Schedules: a small language of actions on the states of the inner loop.

State j is what inner step j starts from (θ_j, optimizer state, buffers); state T is θ_T. At any
moment the run holds at most one *current* state and a set of *kept* ones. A schedule says nothing
about what a step computes; `Machine` executes any schedule and checks every precondition.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Action:
    """Base of all actions."""


@dataclass(frozen=True)
class Keep(Action):
    """Store the current state, which is `state`."""

    state: int


@dataclass(frozen=True)
class Advance(Action):
    """Run inner step `step`: the current state becomes ``step + 1``."""

    step: int


@dataclass(frozen=True)
class Validate(Action):
    """Evaluate the validation loss on the current state, T; starts the cotangent B_T."""

    steps: int


@dataclass(frozen=True)
class Restore(Action):
    """Make a kept state current."""

    state: int


@dataclass(frozen=True)
class Reverse(Action):
    """Run the adjoint of `step` on the current state: B_{step+1} becomes B_step."""

    step: int


@dataclass(frozen=True)
class Drop(Action):
    """Forget a kept state."""

    state: int


@dataclass(frozen=True)
class Schedule:
    """Actions of one program run.

    Attributes:
        steps: T.
        stop: The first step that is reversed; 0 for the whole loop.
        forward: Actions up to and including `Validate`.
        backward: The remaining ones.
        name: How the schedule is called in reports.
    """

    steps: int
    stop: int
    forward: tuple[Action, ...]
    backward: tuple[Action, ...]
    name: str

    def __iter__(self) -> Iterator[Action]:
        return iter((*self.forward, *self.backward))

    @property
    def recomputed(self) -> int:
        """How many inner steps run again in the backward pass (adjoints not counted)."""
        return sum(isinstance(action, Advance) for action in self.backward)

    def __str__(self) -> str:
        return f"{self.name}: {self.steps} steps, {self.recomputed} recomputed"


def keep_all(steps: int, stop: int = 0) -> Schedule:
    """Keep the start of every step that will be reversed; no step runs twice.

    Args:
        steps: T, at least 1.
        stop: Steps before this one are not reversed (truncated backpropagation).
    """
    forward: list[Action] = []
    for step in range(steps):
        if step >= stop:
            forward.append(Keep(step))
        forward.append(Advance(step))
    forward.append(Validate(steps))
    backward: list[Action] = []
    for step in reversed(range(stop, steps)):
        backward += [Restore(step), Reverse(step), Drop(step)]
    return Schedule(steps, stop, tuple(forward), tuple(backward), "keep every state")


def forward_only(steps: int) -> Schedule:
    """Adapt and evaluate; nothing is kept."""
    actions = (*(Advance(step) for step in range(steps)), Validate(steps))
    return Schedule(steps, steps, actions, (), "forward only")


class ScheduleError(AssertionError):
    """An action whose precondition does not hold, with the machine's state."""


@dataclass
class Machine:
    """The reference machine: executes actions on state numbers and checks them.

    Attributes:
        steps: T.
        stop: Where the backward pass must end.
        current: Number of the current state, or None.
        kept: Numbers of the kept states.
        reversed_to: j where B_j is held; None before `Validate`.
        most_kept: The largest number of states kept at once.
        advanced: How often each step ran.
    """

    steps: int
    stop: int = 0
    current: int | None = 0
    kept: set[int] = field(default_factory=set)
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
        self._require(not self.kept, "the end", "states are left behind")
        return self

    def execute(self, action: Action) -> None:
        match action:
            case Keep(state):
                self._require(self.current == state, action, "only the current state can be kept")
                self._require(state not in self.kept, action, "it is kept already")
                self.kept.add(state)
                self.most_kept = max(self.most_kept, len(self.kept))
            case Advance(step):
                self._require(self.current == step, action, "the current state is another")
                self._require(step < self.steps, action, "there is no such step")
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
                self.current = None
            case Drop(state):
                self._require(state in self.kept, action, "it is not kept")
                self.kept.remove(state)
            case _:
                self._require(False, action, "there is no such action")

    def _require(self, condition: bool, action: object, reason: str) -> None:
        if not condition:
            raise ScheduleError(
                f"{action}: {reason} (current state {self.current}, kept {sorted(self.kept)}, "
                f"cotangent of state {self.reversed_to}, T = {self.steps})"
            )
