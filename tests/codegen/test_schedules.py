"""Programs under schedules that run steps again: same gradients, same noise, same buffers."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unrollc
from tests.oracles import cases
from tests.oracles.compare import assert_close
from tests.oracles.objectives import unstack
from unrollc.codegen.module import generate
from unrollc.plan.memory import plan_memory
from unrollc.plan.schedule import (
    Action,
    Advance,
    Drop,
    Keep,
    Machine,
    Restore,
    Reverse,
    Schedule,
    Validate,
)
from unrollc.runtime.load import load

pytestmark = pytest.mark.usefixtures("float64")

T = 4


def recompute_all() -> Schedule:
    """Keep state 0 alone and run up to each step again."""
    forward = (Keep(0), *(Advance(step) for step in range(T)), Validate(T))
    backward: list[Action] = []
    for last in reversed(range(T)):
        backward.append(Restore(0))
        backward += [Advance(step) for step in range(last)]
        backward.append(Reverse(last))
    return Schedule(T, 0, forward, (*backward, Drop(0)), "recompute everything")


def keep_every_other() -> Schedule:
    forward = (Keep(0), Advance(0), Advance(1), Keep(2), Advance(2), Advance(3), Validate(T))
    backward = []
    for start in (2, 0):
        backward += [Restore(start), Advance(start), Reverse(start + 1)]
        backward += [Restore(start), Reverse(start), Drop(start)]
    return Schedule(T, 0, forward, tuple(backward), "keep every other state")


@pytest.mark.parametrize("build", [recompute_all, keep_every_other])
def test_a_step_that_runs_again_is_the_same(build) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 3)
    )
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, dampening=0.2)
    rates = torch.full((T,), 0.05, requires_grad=True)
    opt.param_groups[0]["lr"] = unrollc.PerStep(rates)
    train = cases.batches((5, 4), T, seed=1)
    val = unstack(train)[0]
    program = unrollc.compile(model, opt, F.cross_entropy)
    lowered, inputs = program.lower(train, val), program.inputs(train, val)
    schedule = build()
    Machine(T).run(schedule)
    pieces = replace(lowered.pieces, schedule=schedule)
    plan = plan_memory(pieces)
    other = load(generate(pieces, plan))
    usual = load(lowered.generated)
    for seed in (0, 7):
        loss, found = other.loss_and_gradients(inputs, seed)
        expected_loss, expected = usual.loss_and_gradients(inputs, seed)
        assert torch.equal(loss, expected_loss)
        assert_close(found, expected, rtol=1e-13)
    different, _ = usual.loss_and_gradients(inputs, 1)
    assert not torch.equal(different, expected_loss)  # the noise does come from the seed
    assert schedule.recomputed > 0
    kept = [max(moment.kept for moment in p.timeline) for p in (plan, lowered.plan)]
    assert kept[0] < kept[1]
