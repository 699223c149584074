"""Meta-gradients through schedules of the learning rate."""

import pytest
import torch
from torch.nn import functional as F
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    SequentialLR,
)

import unrollc
from tests.gradients.surroundings import assert_agrees, task, unroll
from tests.oracles import finite
from tests.oracles.compare import relative_error

pytestmark = pytest.mark.usefixtures("float64")

LR = 'param_groups[0]["lr"]'


def test_a_learned_base_rate_under_warm_up_and_decay() -> None:
    """lr_j = φ · c_j: one captured step serves all steps after the first."""
    model, train, val = task()
    opt = torch.optim.SGD(model.parameters(), lr=0.4, momentum=0.9)
    warm_up, decay = LinearLR(opt, 0.5, total_iters=1), ExponentialLR(opt, 0.7)
    scheduler = SequentialLR(opt, [warm_up, decay], [1])
    assert opt.param_groups[0]["lr"] == 0.2
    opt.param_groups[0]["lr"] = rate = torch.tensor(0.2, requires_grad=True)
    program = unrollc.compile(model, opt, F.cross_entropy, scheduler=scheduler)
    expected = unroll(model, train, val, rates=[rate, 2 * rate, 2 * rate * 0.7], momentum=0.9)
    lowered = program.lower(train, val)
    assert len(lowered.loop.kinds) == 2
    assert lowered.requirements[rate].label == LR
    assert lowered.requirements[LR].status == "exists"
    result = program(train, val)
    assert_agrees(result, expected, {"rate": rate, **dict(model.named_parameters())})
    assert result.scheduler is not None
    assert abs(result.scheduler["_last_lr"][0] - 0.4 * 0.7**2) < 1e-15
    assert program.inputs(train, val)[LR].shape == (3,)
    result.apply()
    assert rate.item() == 0.2  # the meta-parameter itself is nobody's to write to
    assert abs(opt.param_groups[0]["lr"].item() - 0.4 * 0.7**2) < 1e-15


def test_an_affine_schedule_of_a_computed_rate_without_lowering_again() -> None:
    model, train, val = task()
    opt = torch.optim.SGD(model.parameters(), lr=0.3)
    scheduler = CosineAnnealingLR(opt, 3, eta_min=0.05)
    program = unrollc.compile(model, opt, F.cross_entropy, scheduler=scheduler, meta=[LR])
    log_rate = torch.tensor(-1.5, requires_grad=True)
    seen = set()
    for _ in range(2):
        rate = log_rate.exp()
        opt.param_groups[0]["lr"] = rate
        cosine = [1.0, 0.75, 0.25]
        rates = [0.05 + (rate - 0.05) * factor for factor in cosine]
        expected = unroll(model, train, val, rates=rates)
        result = program(train, val)
        assert_agrees(result, expected, {"log_rate": log_rate})
        seen.add(id(program.lower(train, val)))
        with torch.no_grad():
            log_rate += 0.2
    assert len(seen) == 1


def test_a_schedule_that_has_moved_on_is_never_stale() -> None:
    model, train, val = task()
    opt = torch.optim.SGD(model.parameters(), lr=0.3)
    scheduler = LambdaLR(opt, lambda step: 1 / (1 + step))
    program = unrollc.compile(model, opt, F.cross_entropy, scheduler=scheduler)
    with torch.no_grad():
        lowered = program.lower(train, val)
        opt.step()
        scheduler.step()
        result = program(train, val)
        assert program.lower(train, val) is lowered
    expected = unroll(model, train, val, rates=[0.3 / 2, 0.3 / 3, 0.3 / 4])
    assert relative_error(result.loss, expected.loss) < 1e-12


def test_rates_and_momenta_of_one_cycle() -> None:
    """OneCycleLR cycles beta1 of Adam too; its own bounds are meta-parameters where tensors."""
    model, train, val = task()
    opt = torch.optim.Adam(model.parameters(), lr=0.1, eps=1e-2)
    scheduler = OneCycleLR(opt, 0.2, total_steps=3, div_factor=2, final_div_factor=4)
    highest = torch.tensor(0.2, requires_grad=True)
    low = torch.tensor(0.85, requires_grad=True)
    opt.param_groups[0] |= {"max_lr": highest, "base_momentum": low}
    program = unrollc.compile(model, opt, F.cross_entropy, scheduler=scheduler, meta=[highest, low])
    result = program(train, val)
    result.loss.backward()
    for tensor in (highest, low):
        finite.assert_gradient(lambda: program(train, val).loss.detach(), tensor, tensor.grad)


def test_first_order_and_truncated() -> None:
    model, train, val = task()
    opt = torch.optim.SGD(model.parameters(), lr=0.3)
    scheduler = ExponentialLR(opt, 0.5)
    opt.param_groups[0]["lr"] = rate = torch.tensor(0.3, requires_grad=True)
    for gradient in (unrollc.FirstOrder(), unrollc.Truncated(1)):
        program = unrollc.compile(
            model, opt, F.cross_entropy, scheduler=scheduler, gradient=gradient, meta=[rate]
        )
        first_order = isinstance(gradient, unrollc.FirstOrder)
        steps = iter(range(3))

        def after(theta: list, steps=steps, first_order=first_order) -> list:
            cut = next(steps) < 2 and not first_order
            return [w.detach().requires_grad_() for w in theta] if cut else theta

        expected = unroll(
            model,
            train,
            val,
            rates=[rate, rate * 0.5, rate * 0.25],
            transform=lambda theta, gs, first_order=first_order: (
                [g.detach() for g in gs] if first_order else gs
            ),
            after=after,
        )
        assert_agrees(program(train, val), expected, {"rate": rate})
