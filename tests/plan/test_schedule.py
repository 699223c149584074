"""Schedules on the reference machine, and the machine on broken schedules."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from unrollc.plan.schedule import (
    Action,
    Advance,
    Drop,
    Keep,
    Machine,
    Restore,
    Reverse,
    Schedule,
    ScheduleError,
    Validate,
    forward_only,
    keep_all,
)

LENGTHS = [(T, stop) for T in (1, 2, 3, 7, 50) for stop in sorted({0, 1, T // 2, T - 1, T})]


@pytest.mark.parametrize(("T", "stop"), LENGTHS)
def test_keep_all_runs(T: int, stop: int) -> None:
    schedule = keep_all(T, stop)
    machine = Machine(T, stop).run(schedule)
    assert machine.advanced == dict.fromkeys(range(T), 1)
    assert machine.most_kept == T - stop
    assert schedule.recomputed == 0
    reversed_steps = [action.step for action in schedule if isinstance(action, Reverse)]
    assert reversed_steps == list(reversed(range(stop, T)))


@pytest.mark.parametrize("T", [1, 2, 7, 50])
def test_forward_only_runs(T: int) -> None:
    schedule = forward_only(T)
    machine = Machine(T, T).run(schedule)
    assert machine.advanced == dict.fromkeys(range(T), 1)
    assert machine.most_kept == 0
    assert not schedule.backward
    assert schedule.recomputed == 0


def test_forward_ends_with_the_validation() -> None:
    for schedule in (keep_all(4), keep_all(4, 2), forward_only(4)):
        assert schedule.forward[-1] == Validate(4)
        assert sum(isinstance(action, Validate) for action in schedule) == 1


def test_recomputed_steps_are_counted() -> None:
    """A schedule that keeps the start alone: step 0 runs twice."""
    actions = (Keep(0), Advance(0), Advance(1), Validate(2))
    backward = (Restore(0), Advance(0), Reverse(1), Restore(0), Reverse(0), Drop(0))
    schedule = Schedule(2, 0, actions, backward, "keep the start")
    machine = Machine(2).run(schedule)
    assert machine.advanced == {0: 2, 1: 1}
    assert machine.most_kept == 1
    assert schedule.recomputed == 1
    assert str(schedule) == "keep the start: 2 steps, 1 recomputed"


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


def test_an_incomplete_backward_pass_is_caught() -> None:
    schedule = keep_all(3)
    with pytest.raises(ScheduleError, match=r"the end: the backward pass is incomplete.*T = 3"):
        Machine(3).run([*schedule.forward, *schedule.backward[:-3], Drop(0)])
    with pytest.raises(ScheduleError, match="incomplete"):
        Machine(3).run(keep_all(3, stop=1))
    with pytest.raises(ScheduleError, match="incomplete"):
        Machine(3).run(forward_only(3))
    with pytest.raises(ScheduleError, match="incomplete"):
        Machine(3).run([])


def test_a_state_that_is_left_behind_is_caught() -> None:
    with pytest.raises(ScheduleError, match=r"left behind \(current state None, kept \[0\]"):
        Machine(3).run(list(keep_all(3))[:-1])


@pytest.mark.parametrize("stop", [0, 2])
def test_no_action_of_keep_all_can_be_left_out(stop: int) -> None:
    actions = list(keep_all(4, stop))
    for position in range(len(actions)):
        with pytest.raises(ScheduleError):
            Machine(4, stop).run([*actions[:position], *actions[position + 1 :]])
