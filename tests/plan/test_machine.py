"""The reference machine on broken schedules."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

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
from unrollc.plan.machine import Machine, ScheduleError


@dataclass(frozen=True)
class Unknown(Action):
    """No action of the language."""


FORWARD = [Keep(0), Advance(0), Keep(1), Advance(1), Validate(2)]

# What was executed so far, the action whose precondition fails, and what the message must say.
BROKEN: dict[str, tuple[Sequence[Action], Action, str]] = {
    "keep another state": ([], Keep(1), "only the current state can be kept"),
    "keep after the validation": (FORWARD, Keep(2), "only the current state can be kept"),
    "keep twice": ([Keep(0)], Keep(0), "it is kept already"),
    "advance another step": ([], Advance(1), "the current state is another"),
    "advance the same step twice": ([Advance(0)], Advance(0), "the current state is another"),
    "advance past the end": ([Advance(0), Advance(1)], Advance(2), "there is no such step"),
    "advance from nothing": (FORWARD, Advance(1), "the current state is another"),
    "validate too early": ([Advance(0)], Validate(2), "θ_T is not current"),
    "validate another length": ([Advance(0), Advance(1)], Validate(3), "θ_T is not current"),
    "validate twice": (
        [*FORWARD, Restore(1), Advance(1)],
        Validate(2),
        "it ran before",
    ),
    "restore what is not kept": (FORWARD, Restore(2), "it is not kept"),
    "restore what was dropped": ([*FORWARD, Drop(1)], Restore(1), "it is not kept"),
    "reverse from another state": (
        [*FORWARD, Restore(0)],
        Reverse(1),
        "the current state is another",
    ),
    "reverse without a state": (FORWARD, Reverse(1), "the current state is another"),
    "reverse without its cotangent": (
        [*FORWARD, Restore(0)],
        Reverse(0),
        "its cotangent is not there",
    ),
    "reverse before the validation": ([Keep(0)], Reverse(0), "its cotangent is not there"),
    "reverse twice": (
        [*FORWARD, Restore(1), Reverse(1), Restore(1)],
        Reverse(1),
        "its cotangent is not there",
    ),
    "drop what is not kept": ([], Drop(0), "it is not kept"),
    "spill another state": ([], Spill(1), "only the current state can be kept"),
    "spill twice": ([Spill(0)], Spill(0), "it is kept already"),
    "fetch what is not spilled": (FORWARD, Fetch(0), "it is not spilled"),
    "fetch what is kept": ([Keep(0), Spill(0)], Fetch(0), "it is kept already"),
    "record another step": ([], Record(1), "the current state is another"),
    "record twice": ([Keep(0), Record(0), Restore(0)], Record(0), "it is recorded already"),
    "drop twice": ([*FORWARD, Drop(1)], Drop(1), "it is not kept"),
    "an action of another language": ([], Unknown(), "there is no such action"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_violated_precondition_is_caught(name: str) -> None:
    before, action, reason = BROKEN[name]
    machine = Machine(2)
    for good in before:
        machine.execute(good)
    current, kept = machine.current, sorted(machine.kept)
    with pytest.raises(ScheduleError) as caught:
        machine.execute(action)
    message = str(caught.value)
    assert message.startswith(f"{action}: {reason} ")
    assert f"current state {current}, kept {kept}" in message
    assert f"cotangent of state {machine.reversed_to}, T = 2" in message


def test_a_slot_too_many_is_caught() -> None:
    machine = Machine(5, slots=1)
    for action in (Keep(0), Advance(0), Keep(1), Advance(1)):
        machine.execute(action)
    with pytest.raises(ScheduleError, match="no slot is free"):
        machine.execute(Keep(2))


def test_what_is_left_on_the_disk_is_caught() -> None:
    actions = [Spill(0), Keep(0), Advance(0), Validate(1), Restore(0), Reverse(0), Drop(0)]
    with pytest.raises(ScheduleError, match="left behind"):
        Machine(1).run(actions)


def test_residuals_without_a_use_are_caught() -> None:
    actions = [Keep(0), Record(0), Validate(1), Restore(0), Reverse(0), Drop(0)]
    Machine(1).run(actions)
    with pytest.raises(ScheduleError, match="left behind"):
        Machine(1, stop=1).run([Record(0), Validate(1)])
