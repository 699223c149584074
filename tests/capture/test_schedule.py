"""The rates that a scheduler gives to T inner steps, against the scheduler itself."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.optim.swa_utils import SWALR

import unrollc
from tests.gradients.surroundings import task
from unrollc.capture.problem import PerStep
from unrollc.capture.schedule import Schedule, run_schedule

pytestmark = pytest.mark.usefixtures("float64")

T = 4
LR = 'param_groups[0]["lr"]'
Build = Callable[[torch.optim.Optimizer, float], LRScheduler]


class Halving(LRScheduler):
    """A scheduler of a user's: a closed form of the base rate, and a table in an attribute."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.table = [1.0, 0.5, 0.25, 0.125, 0.0625, 0.03, 0.02]
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        return [base * self.table[self.last_epoch] for base in self.base_lrs]


class Squaring(LRScheduler):
    """A recursion whose derivative reads the rate that the next step writes over."""

    def get_lr(self) -> list[Any]:
        return [group["lr"] ** 2 * 4 for group in self.optimizer.param_groups]


class Shrinking:
    """A function of the step with state of its own."""

    def __init__(self) -> None:
        self.factor = 1.0

    def __call__(self, step: int) -> float:
        self.factor *= 0.9
        return self.factor


#: Schedulers over an optimizer whose learning rate is `b`.
SCHEDULERS: dict[str, Build] = {
    "lambda": lambda o, b: LambdaLR(o, lambda step: 1 / (1 + step)),
    "lambda, warm-up": lambda o, b: LambdaLR(o, lambda step: (step + 1) / 5),
    "multiplicative": lambda o, b: MultiplicativeLR(o, lambda step: 0.8),
    "step": lambda o, b: StepLR(o, 2, 0.3),
    "multi-step": lambda o, b: MultiStepLR(o, [1, 3, 4], 0.3),
    "constant": lambda o, b: ConstantLR(o, 0.5, 3),
    "linear": lambda o, b: LinearLR(o, 0.25, total_iters=3),
    "exponential": lambda o, b: ExponentialLR(o, 0.7),
    "polynomial": lambda o, b: PolynomialLR(o, 8, 2.0),
    "cosine": lambda o, b: CosineAnnealingLR(o, 3, eta_min=0.05),
    "restarts": lambda o, b: CosineAnnealingWarmRestarts(o, 2, 2, eta_min=0.05),
    "sequential": lambda o, b: SequentialLR(
        o, [LinearLR(o, 0.1, total_iters=2), CosineAnnealingLR(o, 4)], [2]
    ),
    "chained": lambda o, b: ChainedScheduler([StepLR(o, 3, 0.5), ExponentialLR(o, 0.7)]),
    "one cycle": lambda o, b: OneCycleLR(
        o, 0.5, total_steps=12, pct_start=0.9, div_factor=0.5 / b, final_div_factor=b / 0.01
    ),
    "cyclic": lambda o, b: CyclicLR(o, b, 0.5, step_size_up=3),
    "cyclic, exponential": lambda o, b: CyclicLR(
        o, b, 0.5, step_size_up=3, mode="exp_range", gamma=0.9
    ),
    "swa": lambda o, b: SWALR(o, 0.05, anneal_epochs=3),
    "a user's": lambda o, b: Halving(o),
}


def built(build: Build, base: float, taken: int) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """An optimizer and its scheduler after some steps."""
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base, momentum=0.9)
    scheduler = build(opt, base)
    for _ in range(taken):
        opt.step()
        scheduler.step()
    return opt, scheduler


def stepped(opt: torch.optim.Optimizer, scheduler: LRScheduler, key: str = "lr") -> list[float]:
    """The values of an entry during T steps of the scheduler itself."""
    values = []
    for _ in range(T):
        values.append(float(opt.param_groups[0][key]))
        opt.step()
        scheduler.step()
    return values


def rates(schedule: Schedule) -> Tensor:
    value = schedule.opt.param_groups[0]["lr"]
    return value.per_step if isinstance(value, PerStep) else torch.as_tensor(value).expand(T)


@pytest.mark.parametrize("taken", [0, 2], ids=["fresh", "on its way"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_rates_are_the_schedulers_and_follow_the_base_rate(name: str, taken: int) -> None:
    """dlr_j/dφ, with φ the present rate, against schedulers built with other base rates."""
    build, base, step = SCHEDULERS[name], 0.2, 1e-6
    opt, scheduler = built(build, base, taken)
    present = opt.param_groups[0]["lr"]
    plain = run_schedule(opt, scheduler, T)
    opt.param_groups[0]["lr"] = rate = torch.tensor(present, requires_grad=True)
    followed = run_schedule(opt, scheduler, T)
    assert opt.param_groups[0]["lr"] is rate
    assert rate.item() == present
    opt.param_groups[0]["lr"] = present
    expected = torch.tensor(stepped(opt, scheduler))
    assert torch.equal(rates(plain), expected)
    torch.testing.assert_close(rates(followed).detach(), expected, rtol=1e-14, atol=0)
    momenta = plain.opt.param_groups[0]["momentum"]
    assert isinstance(momenta, PerStep) == ("cycl" in name)
    found = torch.stack(
        [torch.autograd.grad(r, rate, retain_graph=True)[0] for r in rates(followed)]
    )
    above, below = (torch.tensor(stepped(*built(build, base + h, taken))) for h in (step, -step))
    slope = (above - below) / (2 * step)  # of affine functions: exact up to rounding
    torch.testing.assert_close(found, slope / slope[0], rtol=1e-8, atol=1e-8)


def test_a_moved_tensor_moves_the_whole_schedule() -> None:
    """What an outer loop does to a learned rate in place."""
    opt, scheduler = built(SCHEDULERS["sequential"], 0.2, 0)
    present = opt.param_groups[0]["lr"]
    opt.param_groups[0]["lr"] = torch.tensor(1.5 * present, requires_grad=True)
    moved = rates(run_schedule(opt, scheduler, T)).detach()
    other = torch.tensor(stepped(*built(SCHEDULERS["sequential"], 0.3, 0)))
    torch.testing.assert_close(moved, other)


def test_a_base_rate_that_is_no_affine_function_is_refused() -> None:
    class Root(LRScheduler):
        def get_lr(self) -> list[Any]:
            return [base**0.5 / (1 + self.last_epoch) for base in self.base_lrs]

    opt, scheduler = built(lambda o, b: Root(o), 0.2, 0)
    opt.param_groups[0]["lr"] = torch.tensor(0.9, requires_grad=True)
    with pytest.raises(unrollc.InputError, match="no affine function"):
        run_schedule(opt, scheduler, T)


def test_a_rate_that_is_written_over_keeps_its_derivative() -> None:
    opt, scheduler = built(lambda o, b: Squaring(o), 0.2, 0)
    start = opt.param_groups[0]["lr"]
    opt.param_groups[0]["lr"] = rate = torch.tensor(start, requires_grad=True)
    values = rates(run_schedule(opt, scheduler, 3))
    (slope,) = torch.autograd.grad(values[2], rate)
    assert abs(slope.item() - 4**3 * 4 * start**3) < 1e-12


def test_tensors_that_a_scheduler_reads_carry_gradient() -> None:
    opt, scheduler = built(SCHEDULERS["one cycle"], 0.2, 0)
    highest = torch.tensor(0.5, requires_grad=True)
    opt.param_groups[0]["max_lr"] = highest
    schedule = run_schedule(opt, scheduler, T)
    assert schedule.behind[LR] == (highest,)
    (slope,) = torch.autograd.grad(rates(schedule).sum(), highest)
    totals = []
    for change in (1e-6, -1e-6):
        other, cycle = built(SCHEDULERS["one cycle"], 0.2, 0)
        other.param_groups[0]["max_lr"] += change
        totals.append(sum(stepped(other, cycle)))
    assert abs(slope.item() - (totals[0] - totals[1]) / 2e-6) < 1e-8


def test_parameters_of_a_scheduler_carry_gradient_and_state_is_left_alone() -> None:
    decay = nn.Parameter(torch.tensor(0.8))

    class Learned(LRScheduler):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.decay = decay
            super().__init__(optimizer)

        def get_lr(self) -> list[Any]:
            return [base * self.decay**self.last_epoch for base in self.base_lrs]

    with torch.no_grad():  # the first rate is a value; a graph of it would be used up once
        opt, scheduler = built(lambda o, b: Learned(o), 0.2, 0)
    values = rates(run_schedule(opt, scheduler, T))
    assert run_schedule(opt, scheduler, T).behind[LR] == (decay,)
    (slope,) = torch.autograd.grad(values.sum(), decay)
    assert abs(slope.item() - 0.2 * sum(j * 0.8 ** (j - 1) for j in range(1, T))) < 1e-14
    shrinking = Shrinking()
    opt, scheduler = built(lambda o, b: LambdaLR(o, shrinking), 0.2, 0)
    factor = shrinking.factor
    first, second = (rates(run_schedule(opt, scheduler, T)) for _ in range(2))
    assert torch.equal(first, second)
    assert shrinking.factor == factor


def snapshot(opt: torch.optim.Optimizer, scheduler: LRScheduler) -> str:
    groups = [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]
    return repr((groups, scheduler.state_dict(), sorted(vars(opt))))


@pytest.mark.parametrize("name", ["sequential", "chained", "cyclic", "multi-step"])
def test_the_state_after_the_loop_and_nothing_touched(name: str) -> None:
    opt, scheduler = built(SCHEDULERS[name], 0.2, 0)
    before = snapshot(opt, scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no advice to the user about calls that are ours
        schedule = run_schedule(opt, scheduler, T)
    assert snapshot(opt, scheduler) == before
    stepped(opt, scheduler)
    assert repr(schedule.state) == repr(scheduler.state_dict())
    for key, value in schedule.groups[0].items():
        assert opt.param_groups[0][key] == value
    assert schedule.groups[0]["lr"] == opt.param_groups[0]["lr"]


def test_what_is_no_scheduler_is_refused() -> None:
    model, train, val = task()
    opt = torch.optim.SGD(model.parameters(), lr=0.2)
    other = torch.optim.SGD(model.parameters(), lr=0.2)
    for scheduler, words in (
        (0.5, "not a torch.optim.lr_scheduler"),
        (ExponentialLR(other, 0.9), "another optimizer"),
        (ReduceLROnPlateau(opt), "needs a metric"),
    ):
        with pytest.raises(unrollc.InputError, match=words):
            unrollc.compile(model, opt, F.cross_entropy, scheduler=scheduler)
    short = OneCycleLR(opt, 0.5, total_steps=2, cycle_momentum=False)
    program = unrollc.compile(model, opt, F.cross_entropy, scheduler=short)
    with pytest.raises(unrollc.InputError, match="cannot go through 3 inner steps"):
        program(train, val)


def test_a_scheduler_and_a_per_step_value_of_one_entry_contradict() -> None:
    model, train, val = task()
    opt = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    scheduler = ExponentialLR(opt, 0.9)
    opt.param_groups[0]["lr"] = unrollc.PerStep(torch.full((3,), 0.2))
    program = unrollc.compile(model, opt, F.cross_entropy, scheduler=scheduler)
    with pytest.raises(unrollc.InputError, match="both the scheduler and a PerStep set"):
        program(train, val)
    opt.param_groups[0]["lr"] = 0.2
    opt.param_groups[0]["momentum"] = unrollc.PerStep(torch.full((3,), 0.9))
    with torch.no_grad():
        program(train, val)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.05),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.05, t0=1.5),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_ordinary_training_with_the_scheduler(name: str) -> None:
    """θ_T to rounding, optimizer state, and what apply() leaves: the next T steps as well."""
    model, train, val = task()
    opt = OPTIMIZERS[name](model.parameters())
    scheduler = LambdaLR(opt, lambda step: 1 / (1 + step))
    theirs, their_opt, their_scheduler = copy.deepcopy((model, opt, scheduler))
    program = unrollc.compile(model, opt, F.cross_entropy, scheduler=scheduler)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the copied optimizer has lost its mark
        for _ in range(2):
            program(train, val).apply()
            for inputs, target in zip(*train, strict=True):
                their_opt.zero_grad()
                with torch.enable_grad():
                    F.cross_entropy(theirs(inputs), target).backward()
                their_opt.step()
                their_scheduler.step()
    for mine, other in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)
    assert opt.param_groups[0]["lr"] == their_opt.param_groups[0]["lr"]
    assert repr(scheduler.state_dict()) == repr(their_scheduler.state_dict())
