"""Programs under every schedule: same gradients, same noise; the code does what was planned."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unrollc
from tests.oracles import cases
from tests.oracles.compare import assert_close
from tests.oracles.objectives import unstack
from unrollc.codegen.module import generate
from unrollc.plan.actions import Action, Advance, Reverse
from unrollc.plan.memory import plan_memory
from unrollc.plan.schedule import Schedule
from unrollc.runtime.load import load

pytestmark = pytest.mark.usefixtures("float64")

T = 9

SCHEDULES = {
    **{f"{slots} slots": Schedule(T, slots=slots) for slots in (0, 1, 2, 3, 5, T - 2, T + 3)},
    **{
        f"segments of {segment}, {slots} slots": Schedule(T, slots=slots, segment=segment)
        for segment, slots in ((1, None), (4, None), (4, 1), (3, 0), (T, 2), (2 * T, 2))
    },
}


def lowered(**options: Any) -> tuple[Any, dict[str, Any]]:
    """Dropout, batch norm, Adam's state and a rate per step; the first step has its own graph."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 3)
    )
    opt = torch.optim.Adam(model.parameters(), lr=0.05, amsgrad=True)
    rates = torch.linspace(0.04, 0.06, T).requires_grad_()
    opt.param_groups[0]["lr"] = unrollc.PerStep(rates)
    train = cases.batches((5, 4), T, seed=1)
    val = unstack(train)[0]
    program = unrollc.compile(model, opt, F.cross_entropy, **options)
    lowered = program.lower(train, val)
    return lowered, program.inputs(train, val)


def plain_pieces(lowered: Any) -> Any:
    """The program before a schedule is chosen: every state is kept, and no residuals."""
    return lowered.plan._given


@pytest.fixture(scope="module")
def usual() -> Iterator[tuple[Any, dict[str, Any]]]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield lowered()
    torch.set_default_dtype(before)


def under(pieces: Any, schedule: Schedule) -> Any:
    pieces = replace(pieces, schedule=schedule)
    return load(generate(pieces, plan_memory(pieces)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_step_that_runs_again_is_the_same(name: str, usual: Any) -> None:
    program, inputs = usual
    module, plain = under(plain_pieces(program), SCHEDULES[name]), load(program.generated)
    for seed in (0, 7):
        loss, found = module.loss_and_gradients(inputs, seed)
        expected_loss, expected = plain.loss_and_gradients(inputs, seed)
        assert torch.equal(loss, expected_loss)
        assert_close(found, expected, rtol=1e-13)
    different, _ = plain.loss_and_gradients(inputs, 1)
    assert not torch.equal(different, expected_loss)  # the noise does come from the seed


def test_noise_of_another_step_is_found(usual: Any) -> None:
    """The broken twin: a step that runs again draws other noise."""
    program, inputs = usual
    module, plain = under(plain_pieces(program), SCHEDULES["2 slots"]), load(program.generated)
    loss, _, _, kept, cotangents, totals = module.adapt(inputs, 0)
    found = module.backward(inputs, 5, kept, cotangents, totals)
    expected_loss, expected = plain.loss_and_gradients(inputs, 0)
    assert torch.equal(loss, expected_loss)
    with pytest.raises(AssertionError):
        assert_close(found, expected, rtol=1e-6)


class Spy:
    """Notes which steps a generated module runs and reverses."""

    def __init__(self, module: Any) -> None:
        self.done: list[Action] = []
        advance, pull_back = module.advance, module.pull_back

        def advanced(inputs: Any, seed: int, j: int, state: Any) -> Any:
            self.done.append(Advance(j))
            return advance(inputs, seed, j, state)

        def reversed_(inputs: Any, seed: int, j: int, *rest: Any) -> Any:
            self.done.append(Reverse(j))
            return pull_back(inputs, seed, j, *rest)

        module.advance, module.pull_back = advanced, reversed_


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_code_runs_the_schedule(name: str, usual: Any) -> None:
    program, inputs = usual
    schedule = SCHEDULES[name]
    module = under(plain_pieces(program), schedule)
    spy = Spy(module)
    module.loss_and_gradients(inputs)
    planned = [action for action in schedule if isinstance(action, Advance | Reverse)]
    assert spy.done == planned
    # The broken twin: another schedule is not what ran.
    other = [a for a in Schedule(T, slots=4) if isinstance(a, Advance | Reverse)]
    assert spy.done != other


@pytest.mark.parametrize("slots", [0, 2])
def test_truncated_programs_stop_where_they_must(slots: int) -> None:
    program, inputs = lowered(gradient=unrollc.Truncated(5))
    schedule = Schedule(T, stop=T - 5, slots=slots)
    module = under(plain_pieces(program), schedule)
    spy = Spy(module)
    _, found = module.loss_and_gradients(inputs)
    _, expected = load(program.generated).loss_and_gradients(inputs)
    assert_close(found, expected, rtol=1e-13)
    assert spy.done[-1] == Reverse(T - 5)
    assert spy.done == [a for a in schedule if isinstance(a, Advance | Reverse)]


def test_a_budget_gives_the_schedule_and_the_same_gradient() -> None:
    full, inputs = lowered()
    expected_loss, expected = load(full.generated).loss_and_gradients(inputs)
    every_state = plan_memory(plain_pieces(full)).peak_bytes
    assert full.plan.schedule.records and every_state < full.plan.peak_bytes
    for part in (1.0, 0.9, 0.7, 0.5):
        budget = int(every_state * part)
        program, _ = lowered(memory=budget)
        assert program.plan.peak_bytes <= budget
        assert (program.plan.schedule.recomputed > 0) == (part < 1)
        loss, found = load(program.generated).loss_and_gradients(inputs)
        assert torch.equal(loss, expected_loss)
        assert_close(found, expected, rtol=1e-13)
