"""Forward mode in the plan: nothing is kept in T, and it is taken where it pays and fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import unrollc
from tests.oracles import cases, eager, memory
from tests.oracles.compare import assert_close, relative_error
from tests.oracles.models import MLP, DropoutMLP
from tests.oracles.objectives import unstack
from unrollc.errors import BudgetError
from unrollc.optimize import packing
from unrollc.plan import choice
from unrollc.plan.cost import Cost
from unrollc.plan.forward import in_forward_mode
from unrollc.plan.pieces import Pieces, ready_to_run
from unrollc.plan.predict import predict
from unrollc.plan.schedule import Schedule

pytestmark = pytest.mark.usefixtures("float64", "short_loops_too")

T = 6
# Scalars that are not the plan's: the cotangent 1 of autograd, the learning rate's gradient, and
# what the product of cotangents and tangents adds up in.
SCALARS = 256


class Setting:
    """A learning rate (and more) as the only meta-parameter."""

    def __init__(self, *, hidden: int = 64, adam: bool = False, **options: Any) -> None:
        self.model = MLP(hidden=hidden)
        self.lr = torch.tensor(0.02 if adam else 0.1, requires_grad=True)
        self.meta = {"lr": self.lr}
        params = self.model.parameters()
        if adam:
            self.opt: torch.optim.Optimizer = torch.optim.Adam(params, lr=self.lr, eps=1e-2)
            self.meta["beta"] = torch.tensor(0.8, requires_grad=True)
            self.opt.param_groups[0]["betas"] = (self.meta["beta"], 0.95)
        else:
            self.opt = torch.optim.SGD(params, lr=self.lr, momentum=0.8)
        self.train = cases.batches((16, 4), T, seed=1)
        self.val = unstack(cases.batches((16, 4), 1, seed=2))[0]
        meta = list(self.meta.values())
        self.program = unrollc.compile(self.model, self.opt, F.cross_entropy, meta=meta, **options)

    @property
    def lowered(self) -> Any:
        return self.program.lower(self.train, self.val)

    def run(self) -> dict[str, Tensor]:
        result = self.program(self.train, self.val)  # θ_T counts as long as someone holds it
        found = torch.autograd.grad(result.loss, [*self.meta.values()])
        return dict(zip(self.meta, found, strict=True))


def prefer(monkeypatch: pytest.MonkeyPatch, *, forward: bool) -> None:
    """Make the cost model predict that forward mode costs half as much, or half as much again."""
    cost = 10 if forward else 30
    monkeypatch.setattr(
        choice, "total_cost", lambda each: Cost(cost if each.directions else 20, 0, 0)
    )


@pytest.mark.parametrize("adam", [False, True])
def test_programs_in_forward_mode_are_exact(adam: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(monkeypatch, forward=True)
    setting = Setting(adam=adam)
    result = setting.program(setting.train, setting.val)
    assert setting.lowered.plan.schedule.directions == len(setting.meta)
    assert setting.lowered.adjoint is None
    expected = eager.unroll(
        setting.model, setting.opt, F.cross_entropy, unstack(setting.train), setting.val
    )
    assert relative_error(result.loss, expected.loss) < 1e-12
    assert_close(result.params, expected.params, rtol=1e-12)
    assert relative_error(result.inner_losses, expected.inner_losses) < 1e-12
    wanted = torch.autograd.grad(expected.loss, [*setting.meta.values()])
    for _ in range(2):  # a second backward pass finds what the first one found
        found = torch.autograd.grad(result.loss, [*setting.meta.values()], retain_graph=True)
        pairs = dict(zip(setting.meta, found, strict=True))
        assert_close(pairs, dict(zip(setting.meta, wanted, strict=True)), rtol=1e-10)


def test_the_saved_program_is_the_same() -> None:
    setting = Setting()
    namespace: dict[str, Any] = {}
    exec(setting.lowered.code, namespace)
    inputs = setting.program.inputs(setting.train, setting.val)
    loss, found = namespace["loss_and_gradients"](inputs)
    assert torch.equal(loss, setting.program(setting.train, setting.val).loss.detach())
    assert_close({"lr": found['param_groups[0]["lr"]']}, setting.run(), rtol=1e-15)


def test_the_state_of_the_result_has_no_tangents(monkeypatch: pytest.MonkeyPatch) -> None:
    # Over packed state a backward pass through a loop as small as this one costs less.
    monkeypatch.setattr(packing, "PASSES", ())
    torch.manual_seed(0)
    model, lr = DropoutMLP(), torch.tensor(0.1, requires_grad=True)
    opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.8)
    batch = (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
    program = unrollc.compile(model, opt, F.cross_entropy, meta=[lr])
    assert program.lower(unrollc.repeat(batch, T), batch).plan.schedule.directions == 1
    torch.manual_seed(1)
    forward = program(unrollc.repeat(batch, T), batch)
    torch.manual_seed(1)
    with torch.no_grad():
        plain = program(unrollc.repeat(batch, T), batch)
    assert torch.equal(forward.loss, plain.loss)
    assert_close(forward.params, plain.params, rtol=1e-15)
    assert forward.opt_state.keys() == plain.opt_state.keys()


# --- memory -------------------------------------------------------------------------------------


def measured(setting: Setting) -> int:
    setting.run()
    return memory.measure(setting.run).peak


@pytest.mark.parametrize("adam", [False, True])
def test_the_peak_is_the_measured_one(adam: bool) -> None:
    setting = Setting(adam=adam)
    assert abs(setting.lowered.plan.peak_bytes - measured(setting)) <= SCALARS


def test_nothing_is_kept_in_the_number_of_steps() -> None:
    """All that grows is the record of the inner losses."""
    plan = Setting().lowered.plan
    longer = plan.for_steps(10_000)
    assert longer.schedule.directions == 1 and longer.schedule.recomputed == 0
    assert longer.peak_bytes - plan.peak_bytes == (10_000 - T) * 8
    assert all(moment.kept == 0 for moment in longer.timeline)


# --- the choice ---------------------------------------------------------------------------------


def pieces_of(setting: Setting) -> Pieces:
    """The program with both forms, before one is chosen."""
    return setting.lowered.plan._given  # type: ignore[no-any-return]


def test_the_cheaper_form_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = pieces_of(Setting())
    chosen, reason = choice.choose(pieces, None)
    assert chosen.directions
    assert reason.startswith("taken: predicted 0.") and "(keep every state" in reason
    prefer(monkeypatch, forward=False)
    chosen, reason = choice.choose(pieces, None)
    assert not chosen.directions and chosen.adjoints
    assert reason == "not taken: predicted 1.50 of the cost with a backward pass (keep every state)"


def test_a_budget_that_one_form_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wide model: binomial checkpointing holds a state and an adjoint, forward mode tangents."""
    prefer(monkeypatch, forward=False)
    pieces = pieces_of(Setting(hidden=512))
    peak = predict(ready_to_run(in_forward_mode(pieces), lean=True)).moment.bytes
    least = predict(
        replace(ready_to_run(pieces, lean=True), schedule=Schedule(T, slots=0))
    ).moment.bytes
    lower, higher = sorted([peak, least])
    chosen, reason = choice.choose(pieces, higher - 1)
    if peak < least:
        assert chosen.directions
        assert reason == "taken: no schedule of a backward pass fits into the budget"
    else:
        assert not chosen.directions and reason.startswith("not taken: it would hold")
    chosen, reason = choice.choose(pieces, higher)
    assert not chosen.directions and reason.startswith("not taken: predicted 1.50")
    with pytest.raises(BudgetError, match=f"{lower} bytes"):
        choice.choose(pieces, lower - 1)


def test_the_plan_says_why() -> None:
    forward = Setting()
    assert "forward mode, 1 direction: 6 steps, 0 recomputed" in str(forward.lowered.plan)
    assert "taken: predicted" in str(forward.lowered.plan)
    reverse = unrollc.compile(forward.model, forward.opt, F.cross_entropy)
    text = str(reverse.lower(forward.train, forward.val).plan)
    assert "not taken: hidden.weight, where the loop starts, is a" in text


def test_a_program_under_a_small_budget_runs() -> None:
    setting = Setting()
    peak = setting.lowered.plan.peak_bytes
    lean = Setting(memory=peak)
    lean.model.load_state_dict(setting.model.state_dict())
    assert lean.lowered.plan.peak_bytes <= peak
    assert_close(lean.run(), setting.run(), rtol=1e-12)
