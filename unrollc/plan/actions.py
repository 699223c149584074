"""The language of schedules: actions on the states of the inner loop.

State j is what inner step j starts from (θ_j, optimizer state, buffers); state T is θ_T. At any
moment the run holds at most one *current* state and a set of *kept* ones; kept states may be
*spilled*, which frees their memory. An action says nothing about what a step computes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Action:
    """Base of all actions."""


@dataclass(frozen=True, slots=True)
class Keep(Action):
    """Store the current state, which is `state`."""

    state: int


@dataclass(frozen=True, slots=True)
class Advance(Action):
    """Run inner step `step`: the current state becomes ``step + 1``."""

    step: int


@dataclass(frozen=True, slots=True)
class Record(Action):
    """Run inner step `step` like `Advance`, and hold the residuals that its adjoint reads."""

    step: int


@dataclass(frozen=True, slots=True)
class Validate(Action):
    """Evaluate the validation loss on the current state, T; starts the cotangent B_T."""

    steps: int


@dataclass(frozen=True, slots=True)
class Restore(Action):
    """Make a kept state current."""

    state: int


@dataclass(frozen=True, slots=True)
class Reverse(Action):
    """Run the adjoint of `step` on the current state: B_{step+1} becomes B_step."""

    step: int


@dataclass(frozen=True, slots=True)
class Drop(Action):
    """Forget a kept state."""

    state: int


@dataclass(frozen=True, slots=True)
class Spill(Action):
    """Write the current state, which is `state`, to the disk."""

    state: int


@dataclass(frozen=True, slots=True)
class Fetch(Action):
    """Keep a spilled state in memory, and forget it on the disk."""

    state: int
