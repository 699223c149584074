"""Meta-gradients of the validation loss at averaged weights."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_multi_avg_fn,
)

import unrollc
from tests.differentiate.steps import pulled_back
from tests.gradients.surroundings import Weights, assert_agrees, task, unroll
from tests.oracles import finite
from tests.oracles.compare import assert_close, relative_error
from unrollc.differentiate.mixed import mixed_adjoint
from unrollc.differentiate.reverse import reverse_adjoint

pytestmark = pytest.mark.usefixtures("float64")

Average = Callable[[Tensor, Tensor, int], Tensor]


def mean(average: Tensor, weight: Tensor, count: int) -> Tensor:
    return average + (weight - average) / (count + 1)


def moving(average: Tensor, weight: Tensor, count: int) -> Tensor:
    return 0.6 * average + 0.4 * weight


#: What `AveragedModel` is built with, the same by hand, and how many models it is of already.
AVERAGES: dict[str, tuple[dict[str, Any], Average, int]] = {
    "mean": ({}, mean, 0),
    "mean, foreach": ({"multi_avg_fn": get_swa_multi_avg_fn()}, mean, 2),
    "moving": ({"avg_fn": get_ema_avg_fn(0.6)}, moving, 1),
    "moving, foreach": ({"multi_avg_fn": get_ema_multi_avg_fn(0.6)}, moving, 0),
}


def averaged(model: nn.Module, count: int, **options: Any) -> tuple[AveragedModel, Weights]:
    """An average that is of `count` models already, and the weights that it holds."""
    average = AveragedModel(model, **options)
    with torch.no_grad():
        average.n_averaged.fill_(count)
        for parameter in average.parameters():
            parameter.mul_(0.9)
    return average, [parameter.detach().clone() for parameter in average.parameters()]


@pytest.mark.parametrize("name", AVERAGES)
def test_the_meta_gradient_is_exact(name: str) -> None:
    options, by_hand, count = AVERAGES[name]
    model, train, val = task()
    opt = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    average, start = averaged(model, count, **options)
    program = unrollc.compile(model, opt, F.cross_entropy, average=average)
    result = program(train, val)
    expected = unroll(
        model,
        train,
        val,
        rates=[0.5] * 3,
        momentum=0.9,
        average=by_hand,
        averaged=(start, count),
    )
    leaves = dict(model.named_parameters())
    assert_agrees(result, expected, leaves)
    assert result.average is not None
    assert_close(result.average, dict(zip(leaves, expected.average, strict=True)), rtol=1e-13)
    assert_close(result.params, dict(zip(leaves, expected.theta, strict=True)), rtol=1e-13)
    kinds = program.lower(train, val).loop.kinds
    assert len(kinds) == 2  # the first step (no momentum, or no average, yet) and all others
    assert average.n_averaged == count
    assert_close(dict(enumerate(average.parameters())), dict(enumerate(start)), rtol=0)
    result.apply()
    assert average.n_averaged == count + 3
    assert_close(dict(average.module.named_parameters()), dict(result.average), rtol=0)


@pytest.mark.parametrize("foreach", [False, True], ids=["one by one", "foreach"])
def test_a_decay_behind_the_averaging_function_is_a_meta_parameter(foreach: bool) -> None:
    model, train, val = task()
    decay = torch.tensor(0.6, requires_grad=True)

    def each(average: Tensor, weight: Tensor, count: Tensor) -> Tensor:
        return decay * average + (1 - decay) * weight

    def together(averages: Weights, weights: Weights, count: Tensor) -> None:
        torch._foreach_lerp_(averages, weights, 1 - decay)

    options: dict[str, Any] = {"multi_avg_fn": together} if foreach else {"avg_fn": each}
    average, start = averaged(model, 1, **options)
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    program = unrollc.compile(model, opt, F.cross_entropy, average=average, meta=[decay])
    expected = unroll(
        model,
        train,
        val,
        rates=[0.5] * 3,
        average=lambda a, w, n: decay * a + (1 - decay) * w,
        averaged=(start, 1),
    )
    assert_agrees(program(train, val), expected, {"decay": decay})


def test_a_learned_rate_truncated_and_first_order() -> None:
    model, train, val = task()
    rate = torch.tensor(0.5, requires_grad=True)
    opt = torch.optim.SGD(model.parameters(), lr=rate)
    for gradient in (unrollc.FirstOrder(), unrollc.Truncated(1)):
        average, start = averaged(model, 1, avg_fn=get_ema_avg_fn(0.6))
        program = unrollc.compile(
            model, opt, F.cross_entropy, average=average, gradient=gradient, meta=[rate]
        )
        first_order = isinstance(gradient, unrollc.FirstOrder)
        steps, parts = itertools.count(), itertools.count()

        def after(theta: Weights, steps=steps, first_order=first_order) -> Weights:
            cut = next(steps) < 2 and not first_order
            return [w.detach().requires_grad_() for w in theta] if cut else theta

        def cut_average(a, w, n, parts=parts, first_order=first_order) -> Tensor:
            cut = next(parts) < 2 * 4 and not first_order  # two steps, four parameters
            return moving(a, w, n).detach() if cut else moving(a, w, n)

        expected = unroll(
            model,
            train,
            val,
            rates=[rate] * 3,
            transform=lambda theta, gs, first_order=first_order: (
                [g.detach() for g in gs] if first_order else gs
            ),
            after=after,
            average=cut_average,
            averaged=(start, 1),
        )
        assert_agrees(program(train, val), expected, {"rate": rate})


class Levelled(nn.Module):
    """A model with a running statistic that its output and its derivative depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("level", torch.tensor(0.5))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x)
        self.level = 0.8 * self.level + 0.2 * hidden.square().mean()
        self.calls.add_(1)
        return hidden * self.level


@pytest.mark.parametrize("use_buffers", [False, True], ids=["copied", "averaged"])
def test_buffers_of_the_average(use_buffers: bool) -> None:
    """Values against ordinary training, the gradient against finite differences."""
    _, train, val = task()
    model = Levelled()
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.6), use_buffers=use_buffers)
    program = unrollc.compile(model, opt, F.cross_entropy, average=average)
    result = program(train, val)
    theirs, their_opt, their_average = copy.deepcopy((model, opt, average))
    for inputs, target in zip(*train, strict=True):
        their_opt.zero_grad()
        F.cross_entropy(theirs(inputs), target).backward()
        their_opt.step()
        theirs.level = theirs.level.detach()
        their_average.update_parameters(theirs)
    assert result.average is not None
    assert_close(dict(result.average), their_average.module.state_dict(), rtol=1e-13)
    with torch.no_grad():
        loss = F.cross_entropy(copy.deepcopy(their_average.module)(val[0]), val[1])
    assert relative_error(result.loss, loss) < 1e-13
    weight = model.linear.weight
    (gradient,) = torch.autograd.grad(result.loss, weight)

    def validation() -> Tensor:
        with torch.no_grad():
            return program(train, val).loss

    finite.assert_gradient(validation, weight, gradient, step=1e-3, directions=1)


def test_a_teacher_in_the_inner_loss() -> None:
    """The average as a module inside losses: constant for G, not for the meta-gradient."""
    model, train, val = task()
    average, teacher = averaged(model, 1, avg_fn=get_ema_avg_fn(0.6))

    def consistent(student: nn.Module, batch: Any) -> Tensor:
        prediction = student(batch[0])
        distance = F.mse_loss(prediction, average(batch[0]))
        return F.cross_entropy(prediction, batch[1]) + distance

    def taught(student: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(average(batch[0]), batch[1])

    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    program = unrollc.compile(
        model,
        opt,
        unrollc.objective(consistent),
        val_loss=unrollc.objective(taught),
        average=average,
    )
    names = [name for name, _ in model.named_parameters()]

    def run(weights: Weights, x: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (x,))

    def inner(student: Weights, teacher: Weights, x: Tensor, y: Tensor) -> Tensor:
        prediction = run(student, x)
        return F.cross_entropy(prediction, y) + F.mse_loss(prediction, run(teacher, x))

    student: Weights = list(model.parameters())
    for x, y in zip(*train, strict=True):
        gradients = torch.func.grad(inner)(student, teacher, x, y)
        student = [w - 0.5 * g for w, g in zip(student, gradients, strict=True)]
        teacher = [moving(a, w, 1) for a, w in zip(teacher, student, strict=True)]
    loss = F.cross_entropy(run(teacher, val[0]), val[1])
    result = program(train, val)
    assert relative_error(result.loss, loss) < 1e-12
    leaves = dict(model.named_parameters())
    found = torch.autograd.grad(result.loss, list(leaves.values()))
    wanted = torch.autograd.grad(loss, list(leaves.values()))
    assert_close(
        dict(zip(leaves, found, strict=True)), dict(zip(leaves, wanted, strict=True)), rtol=1e-10
    )
    reasons = {adjoint.reason for adjoint in program.lower(train, val).pieces.adjoints}
    assert any("which is state" in reason for reason in reasons)


def test_mixed_mode_stays_valid() -> None:
    model, train, _ = task()
    batch = (train[0][0], train[1][0])
    average, start = averaged(model, 1, avg_fn=get_ema_avg_fn(0.6))
    opt = torch.optim.SGD(model.parameters(), lr=0.3)
    program = unrollc.compile(model, opt, F.cross_entropy, average=average)
    with torch.no_grad():
        step = program.lower(unrollc.repeat(batch, 2), batch).step
    given = {
        **{name: p.detach() for name, p in model.named_parameters()},
        "train.inputs": batch[0],
        "train.target": batch[1],
    }
    names = [name for name, _ in model.named_parameters()]
    given |= {f"average.module.{name}": w for name, w in zip(names, start, strict=True)}
    mixed = pulled_back(step, given, mixed_adjoint)
    assert {f"average.module.{name}" for name in names} < set(mixed)
    assert_close(mixed, pulled_back(step, given, reverse_adjoint), rtol=1e-12)


def test_running_statistics_in_the_average_are_a_declared_stop() -> None:
    """Validation in evaluation mode reads them; autograd takes them for constants."""
    _, train, val = task()
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))

    def evaluated(model: nn.Module, batch: Any) -> Tensor:
        model.eval()
        return F.cross_entropy(model(batch[0]), batch[1])

    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    found = unrollc.check(
        model,
        opt,
        F.cross_entropy,
        train,
        val,
        val_loss=unrollc.objective(evaluated),
        average=AveragedModel(model),
    )
    assert [stop.reason for stop in found.stops] == ["running statistics are constants to autograd"]
