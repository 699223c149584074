"""Peaks of long loops against the schedule executed action by action, and plans for other T."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unrollc
from tests.oracles import cases
from tests.oracles.objectives import unstack
from unrollc.plan.horizon import extended, steady
from unrollc.plan.memory import plan_memory, plan_program
from unrollc.plan.predict import predict
from unrollc.plan.schedule import Schedule
from unrollc.plan.simulate import simulate

pytestmark = pytest.mark.usefixtures("float64")

CAPTURED = 7


@functools.cache
def lowered(steps: int, *, adam: bool = True, **options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 3)
    )
    opt: Any = (torch.optim.Adam if adam else torch.optim.SGD)(model.parameters(), lr=0.05)
    opt.param_groups[0]["lr"] = unrollc.PerStep(torch.full((steps,), 0.05).requires_grad_())
    train = cases.batches((5, 4), steps, seed=1)
    program = unrollc.compile(model, opt, F.cross_entropy, **options)
    return program.lower(train, unstack(train)[0])


@pytest.fixture(scope="module")
def pieces() -> Any:
    """A program that keeps every state and no residuals."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    full = lowered.__wrapped__(CAPTURED).plan._given
    torch.set_default_dtype(before)
    return full


@pytest.mark.parametrize("slots", [0, 1, 3, 4, 5, 9, 30])
@pytest.mark.parametrize("T", [CAPTURED, 30, 61, 151])
def test_a_short_loop_reaches_the_same_peak(T: int, slots: int, pieces: Any) -> None:
    for segment in (None, 1, 6, 20):
        long = replace(extended(pieces, T), schedule=Schedule(T, 0, slots, segment))
        found, whole = predict(long), simulate(long)
        assert found.moment.bytes == whole.peak.moment.bytes
        assert sum(part.bytes for part in found.composition) == found.moment.bytes
        kinds = {peak.kind: peak.moment.bytes for peak in whole.peaks}
        assert kinds[found.kind] == found.moment.bytes


def test_a_peak_that_does_not_grow_with_the_slots_is_found(pieces: Any) -> None:
    """With many steps and few slots the gradients of all rates, scaled, are the largest."""
    T = 4000
    for slots in (2, 5):
        long = replace(extended(pieces, T), schedule=Schedule(T, 0, slots))
        found = predict(long)
        assert found.kind.startswith("scale the gradient")
        assert found.moment.bytes == simulate(long).peak.moment.bytes


def test_a_short_loop_with_fewer_slots_is_another(
    pieces: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broken twin: a loop so short that a slot stays empty."""
    monkeypatch.setattr("unrollc.plan.predict._short", lambda pieces: 5)
    long = replace(extended(pieces, 100), schedule=Schedule(100, 0, 9))
    assert predict(long).moment.bytes < simulate(long).peak.moment.bytes


@pytest.mark.parametrize("adam", [True, False])
@pytest.mark.parametrize("T", [5, 12, 40])
def test_a_plan_for_other_steps_is_that_of_their_program(T: int, adam: bool) -> None:
    plan = lowered(CAPTURED, adam=adam).plan.for_steps(T)
    expected = lowered(T, adam=adam).plan
    assert plan.peak_bytes == expected.peak_bytes
    assert plan.schedule == expected.schedule
    assert plan.cost == expected.cost
    assert plan.timeline == expected.timeline
    assert plan.composition == expected.composition


@pytest.mark.parametrize("T", [12, 40])
def test_a_plan_for_other_steps_keeps_the_budget(T: int) -> None:
    budget = 30_000
    plan = lowered(CAPTURED, memory=budget).plan.for_steps(T)
    expected = lowered(T, memory=budget).plan
    assert plan.budget == budget and plan.peak_bytes <= budget
    assert (plan.schedule, plan.peak_bytes) == (expected.schedule, expected.peak_bytes)


def test_truncated_plans_keep_the_steps_that_are_reversed() -> None:
    plan = lowered(CAPTURED, gradient=unrollc.Truncated(4)).plan.for_steps(30)
    expected = lowered(30, gradient=unrollc.Truncated(4)).plan
    assert plan.schedule == expected.schedule and plan.schedule.stop == 26
    assert plan.peak_bytes == expected.peak_bytes


def test_a_loop_without_a_steady_step_is_refused(pieces: Any) -> None:
    with pytest.raises(unrollc.InputError, match="steady middle"):
        extended(replace(pieces, sequence=(0, 1, 0, 1, 0, 1, 0)), 2)
    with pytest.raises(unrollc.InputError, match=r"for_steps\(0\)"):
        lowered(3).plan.for_steps(0)
    first, last = steady(pieces)
    assert (first, last) == (1, CAPTURED - 1)


def test_the_timeline_is_made_on_demand(pieces: Any) -> None:
    plan = plan_memory(replace(extended(pieces, 200), schedule=Schedule(200, 0, 4)))
    assert max(moment.bytes for moment in plan.timeline) == plan.peak_bytes
    reversals = [m for m in plan.timeline if m.action.startswith("adjoint of step")]
    assert len(reversals) == 200


def test_the_largest_number_of_slots_that_fits_is_taken(pieces: Any) -> None:
    long = extended(pieces, 300)
    for slots in (0, 1, 7, 20, 140):
        exact = predict(replace(long, schedule=Schedule(300, 0, slots))).moment.bytes
        assert plan_program(long, exact).schedule.slots == slots
        if slots:
            assert plan_program(long, exact - 1).schedule.slots == slots - 1


def test_residuals_are_kept_while_they_fit(pieces: Any) -> None:
    full = plan_program(pieces, None)
    assert full.schedule.records
    plain = plan_memory(pieces).peak_bytes
    assert plan_program(pieces, full.peak_bytes).schedule.records
    lean = plan_program(pieces, plain)
    assert not lean.schedule.records and lean.schedule.slots is None
    assert plan_program(pieces, plain - 1).schedule.slots is not None
    assert full.cost.weight < lean.cost.weight


def test_the_table_shows_the_peak_by_role_and_line() -> None:
    text = str(lowered(CAPTURED, memory=9_320).plan)
    for words in ("binomial", "opt_state", "theta", "cotangents", "9.1 KiB", "adam.py:", "R = "):
        assert words in text, words


def test_slabs_are_close_to_what_lives_at_once() -> None:
    buffers = lowered(CAPTURED).plan.buffers
    assert set(buffers) >= {"step_0", "step_1", "validate", "adjoint_0"}
    for plan in buffers.values():
        rounding = 64 * len(plan.lifetimes)  # the tensors are tiny, and each is aligned
        assert plan.lower_bound <= plan.slab_bytes <= 1.1 * plan.lower_bound + rounding


def test_later_steps_are_as_the_last_ones() -> None:
    """RAdam rectifies from its sixth step on: its later steps hold more than most known ones."""

    def plan_of(steps: int) -> Any:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        opt = torch.optim.RAdam(model.parameters(), lr=0.05)
        train = cases.batches((5, 4), steps, seed=1)
        program = unrollc.compile(model, opt, F.cross_entropy)
        return program.lower(train, unstack(train)[0]).plan

    assert plan_of(9).for_steps(20).peak_bytes == plan_of(20).peak_bytes
    with pytest.raises(unrollc.InputError, match="steady middle"):
        plan_of(6).for_steps(20)
