"""Schedules on the reference machine, against brute force and against another package."""

import functools
import itertools
from collections.abc import Callable

import pytest
from checkpoint_schedules import EndReverse, Forward, Revolve

from unrollc.plan.actions import Drop, Reverse, Validate
from unrollc.plan.binomial import checkpoints, repeated, stride
from unrollc.plan.machine import Machine, ScheduleError
from unrollc.plan.schedule import Schedule, forward_only, keep_all

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
    assert not list(schedule.backward)
    assert schedule.recomputed == 0


def test_forward_ends_with_the_validation() -> None:
    for schedule in (keep_all(4), keep_all(4, 2), forward_only(4), Schedule(4, slots=1)):
        assert list(schedule.forward)[-1] == Validate(4)
        assert sum(isinstance(action, Validate) for action in schedule) == 1


# --- the binomial optimum ----------------------------------------------------------------------

LONGEST = 60


@functools.cache
def fewest(steps: int, slots: int) -> int:
    """Fewest advances that reverse `steps` steps from a kept state, by trying every split.

    The last state on the way needs no slot: its step is reversed at once.
    """
    if steps == 1:
        return 0
    if slots == 0:
        return steps * (steps - 1) // 2
    return min(m + fewest(steps - m, slots - 1) + fewest(m, slots) for m in range(1, steps))


@pytest.mark.parametrize("T", range(1, LONGEST + 1))
def test_no_schedule_repeats_fewer_steps(T: int) -> None:
    for slots in range(T + 1):
        schedule = Schedule(T, slots=slots)
        machine = Machine(T, slots=slots).run(schedule)
        repeats = sum(machine.advanced.values()) - T
        assert repeats == schedule.recomputed == fewest(T, slots) - (T - 1)


@pytest.mark.parametrize("T", [2, 3, 7, 20, 41, LONGEST])
def test_another_package_repeats_as_many(T: int) -> None:
    """`checkpoint_schedules` counts the first state as a snapshot, and the first sweep as well."""
    for snapshots in range(1, T):
        theirs = itertools.takewhile(
            lambda action: not isinstance(action, EndReverse), Revolve(T, snapshots)
        )
        advances = sum(
            action.n1 - action.n0
            for action in theirs
            if isinstance(action, Forward) and not action.write_adj_deps
        )
        assert Schedule(T, slots=snapshots - 1).recomputed == advances - (T - 1)


def replace_stride(monkeypatch: pytest.MonkeyPatch, wrong: Callable[[int, int], int]) -> None:
    for module in ("binomial", "schedule"):
        monkeypatch.setattr(f"unrollc.plan.{module}.stride", wrong)


def test_a_wrong_stride_repeats_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin: halving is no optimum."""
    replace_stride(monkeypatch, lambda steps, slots: max(steps // 2, 1) if slots else steps - 1)
    machine = Machine(40).run(Schedule(40, slots=3))
    assert sum(machine.advanced.values()) - 40 > fewest(40, 3) - 39


def test_a_stride_that_keeps_too_many_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_stride(monkeypatch, lambda steps, slots: 1)
    with pytest.raises(ScheduleError, match="no slot is free"):
        Machine(12, slots=3).run(Schedule(12, slots=3))


def test_enough_slots_repeat_nothing() -> None:
    assert Schedule(50, slots=48).recomputed == 0
    assert Schedule(50, slots=47).recomputed == 1
    assert checkpoints(0, 5, 4) == [0, 1, 2, 3, 4]
    assert stride(7, 0) == 6
    assert repeated(1, 0) == 0


@pytest.mark.parametrize("slots", [None, 0, 1, 3, 40])
@pytest.mark.parametrize("segment", [1, 2, 5, 40])
@pytest.mark.parametrize(("T", "stop"), [(1, 0), (2, 0), (9, 0), (23, 0), (23, 4), (23, 22)])
def test_spilled_segments_are_reversed_one_by_one(
    T: int, stop: int, segment: int, slots: int | None
) -> None:
    schedule = Schedule(T, stop, slots, segment)
    machine = Machine(T, stop, slots).run(schedule)
    assert sum(machine.advanced.values()) - T == schedule.recomputed
    assert machine.most_kept <= segment


def test_schedules_say_what_they_do() -> None:
    assert str(Schedule(10_000, slots=20)) == "binomial, 20 slots: 10000 steps, 27701 recomputed"
    text = "spill every 100 steps, within them keep every state: 1000 steps, 990 recomputed"
    assert str(Schedule(1000, segment=100)) == text
    assert str(Schedule(5, records=True)).startswith("keep every state and residuals: 5 steps")


# --- what a schedule must do -------------------------------------------------------------------


def test_an_incomplete_backward_pass_is_caught() -> None:
    schedule = keep_all(3)
    with pytest.raises(ScheduleError, match=r"the end: the backward pass is incomplete.*T = 3"):
        Machine(3).run([*list(schedule)[:-1]])
    with pytest.raises(ScheduleError, match="incomplete"):
        Machine(3).run(keep_all(3, stop=1))
    with pytest.raises(ScheduleError, match="incomplete"):
        Machine(3).run(forward_only(3))
    with pytest.raises(ScheduleError, match="incomplete"):
        Machine(3).run([])


def test_a_state_that_is_left_behind_is_caught() -> None:
    actions = [action for action in keep_all(3) if action != Drop(0)]
    with pytest.raises(ScheduleError, match=r"left behind \(current state None, kept \[0\]"):
        Machine(3).run(actions)


@pytest.mark.parametrize("stop", [0, 2])
def test_no_action_of_keep_all_can_be_left_out(stop: int) -> None:
    actions = list(keep_all(4, stop))
    for position in range(len(actions)):
        with pytest.raises(ScheduleError):
            Machine(4, stop).run([*actions[:position], *actions[position + 1 :]])
