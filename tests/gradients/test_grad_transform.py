"""Meta-gradients through what happens between the backward pass and the optimizer's step."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import unrollc
from tests.differentiate.steps import pulled_back
from tests.gradients.surroundings import Weights, assert_agrees, task, unroll
from tests.oracles import finite
from tests.oracles.compare import assert_close, relative_error
from unrollc.differentiate.mixed import mixed_adjoint
from unrollc.differentiate.reverse import reverse_adjoint

pytestmark = pytest.mark.usefixtures("float64")


def clipped(order: float, bound: float) -> Callable[[Weights, Weights], Weights]:
    """The norm of all gradients together, brought down to a bound."""

    def transform(theta: Weights, gradients: Weights) -> Weights:
        flat = torch.cat([g.flatten() for g in gradients])
        total = flat.abs().amax() if order == float("inf") else flat.abs().pow(order).sum()
        total = total if order == float("inf") else total ** (1 / order)
        factor = (bound / (total + 1e-6)).clamp(max=1.0)
        return [g * factor for g in gradients]

    return transform


def rebind(change: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], None]:
    def transform(parameters: list[Tensor]) -> None:
        for parameter in parameters:
            parameter.grad = change(parameter.grad)

    return transform


def adaptive_clip(parameters: list[Tensor]) -> None:
    """Clip by the norm of each weight, as in Brock et al. 2021."""
    for parameter in parameters:
        bound = 0.1 * parameter.detach().norm()
        parameter.grad.mul_((bound / parameter.grad.norm()).clamp(max=1.0))


def halve_data(parameters: list[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad.data.mul_(0.5)


#: What an ordinary loop would call, and the same by hand.
TRANSFORMS: dict[str, tuple[Callable, Callable]] = {
    "norm 2": (lambda p: clip_grad_norm_(p, 0.2), clipped(2, 0.2)),
    "norm 1, foreach": (lambda p: clip_grad_norm_(p, 0.5, 1, foreach=True), clipped(1, 0.5)),
    "norm inf": (
        lambda p: clip_grad_norm_(p, 0.05, float("inf")),
        clipped(float("inf"), 0.05),
    ),
    "value, foreach": (
        lambda p: clip_grad_value_(p, 0.05, foreach=True),
        lambda theta, gradients: [g.clamp(-0.05, 0.05) for g in gradients],
    ),
    "centralised": (
        rebind(lambda g: g - g.mean(0, keepdim=True)),
        lambda theta, gradients: [g - g.mean(0, keepdim=True) for g in gradients],
    ),
    "by the weights": (
        adaptive_clip,
        lambda theta, gradients: [
            g * (0.1 * w.norm() / g.norm()).clamp(max=1.0)
            for w, g in zip(theta, gradients, strict=True)
        ],
    ),
    "through .data": (halve_data, lambda theta, gradients: [g * 0.5 for g in gradients]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_meta_gradient_is_exact(name: str) -> None:
    user, by_hand = TRANSFORMS[name]
    model, train, val = task()
    lr = torch.tensor(0.3, requires_grad=True)
    opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    program = unrollc.compile(model, opt, F.cross_entropy, grad_transform=user)
    expected = unroll(model, train, val, rates=[lr] * 3, momentum=0.9, transform=by_hand)
    assert_agrees(program(train, val), expected, {"lr": lr, **dict(model.named_parameters())})
    assert all(parameter.grad is None for parameter in model.parameters())


def test_parameters_of_the_model_mean_the_fast_weights() -> None:
    """A transform may ignore its argument, as code of ordinary loops does."""
    model, train, val = task()
    opt = torch.optim.SGD(model.parameters(), lr=0.3)
    stale = torch.full_like(model[0].weight, 7.0)
    model[0].weight.grad = stale

    def transform(parameters: list[Tensor]) -> None:
        clip_grad_norm_(model.parameters(), 0.2)

    program = unrollc.compile(model, opt, F.cross_entropy, grad_transform=transform)
    expected = unroll(model, train, val, rates=[0.3] * 3, transform=clipped(2, 0.2))
    assert_agrees(program(train, val), expected, dict(model.named_parameters()))
    assert model[0].weight.grad is stale
    assert torch.equal(stale, torch.full_like(stale, 7.0))


class Preconditioner(nn.Module):
    """A learned scale a parameter, over a running mean of the gradient's norm."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5, 1.0, 1.5, 2.0]))
        self.register_buffer("mean", torch.tensor(0.7))

    def forward(self, parameters: list[Tensor]) -> None:
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        self.mean.mul_(0.9).add_(norm, alpha=0.1)
        for parameter, scale in zip(parameters, self.scale, strict=True):
            parameter.grad = scale * parameter.grad / self.mean


def test_a_learned_preconditioner_has_meta_gradients_and_state() -> None:
    model, train, val = task()
    opt = torch.optim.SGD(model.parameters(), lr=0.3)
    transform = Preconditioner()
    program = unrollc.compile(model, opt, F.cross_entropy, grad_transform=transform)
    mean = [torch.tensor(0.7)]

    def by_hand(theta: Weights, gradients: Weights) -> Weights:
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        mean.append(0.9 * mean[-1] + 0.1 * norm)
        pairs = zip(transform.scale, gradients, strict=True)
        return [scale * g / mean[-1] for scale, g in pairs]

    expected = unroll(model, train, val, rates=[0.3] * 3, transform=by_hand)
    result = program(train, val)
    lowered = program.lower(train, val)
    assert lowered.requirements["grad_transform.scale"].status == "exists"
    leaves = {"scale": transform.scale, **dict(model.named_parameters())}
    assert_agrees(result, expected, leaves)
    assert relative_error(result.other_buffers["grad_transform.mean"], mean[-1]) < 1e-12
    assert transform.mean == 0.7
    result.apply()
    assert torch.equal(transform.mean, result.other_buffers["grad_transform.mean"])


class Levelled(nn.Module):
    """A model with a running statistic that depends on its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("level", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x)
        self.level = 0.8 * self.level + 0.2 * hidden.square().mean()
        return hidden


def test_a_buffer_that_the_forward_pass_changes_may_be_read() -> None:
    """A path from θ into the update besides G: reverse mode follows it."""
    _, train, val = task()
    model = Levelled()
    opt = torch.optim.SGD(model.parameters(), lr=0.3)

    def transform(parameters: list[Tensor]) -> None:
        for parameter in parameters:
            parameter.grad.div_(model.level.sqrt())

    program = unrollc.compile(model, opt, F.cross_entropy, grad_transform=transform)
    result = program(train, val)
    weight = model.linear.weight
    (gradient,) = torch.autograd.grad(result.loss, weight)

    def loss() -> Tensor:
        with torch.no_grad():
            return program(train, val).loss

    finite.assert_gradient(loss, weight, gradient, step=1e-3)
    reasons = {adjoint.reason for adjoint in program.lower(train, val).pieces.adjoints}
    reason = "the update reads a buffer that the forward pass has changed"
    assert any(each.startswith(reason) for each in reasons)


def test_tensors_behind_a_transform_are_meta_parameters() -> None:
    model, train, val = task()
    opt = torch.optim.SGD(model.parameters(), lr=0.3)
    bound = torch.tensor(0.2, requires_grad=True)

    def transform(parameters: list[Tensor]) -> None:
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for parameter in parameters:
            parameter.grad.mul_((bound / (norm + 1e-6)).clamp(max=1.0))

    program = unrollc.compile(model, opt, F.cross_entropy, grad_transform=transform, meta=[bound])
    expected = unroll(model, train, val, rates=[0.3] * 3, transform=clipped(2, bound))
    assert_agrees(program(train, val), expected, {"bound": bound})


def test_gradient_noise_is_the_same_in_the_backward_pass() -> None:
    model, train, val = task()
    lr = torch.tensor(0.3, requires_grad=True)
    opt = torch.optim.SGD(model.parameters(), lr=lr)

    def transform(parameters: list[Tensor]) -> None:
        for parameter in parameters:
            parameter.grad.add_(torch.randn_like(parameter.grad), alpha=0.3)

    program = unrollc.compile(model, opt, F.cross_entropy, grad_transform=transform, meta=[lr])

    def loss() -> Tensor:
        torch.manual_seed(5)
        return program(train, val).loss

    assert loss() == loss()
    (gradient,) = torch.autograd.grad(loss(), lr)
    finite.assert_gradient(lambda: loss().detach(), lr, gradient)


@pytest.mark.parametrize(
    "gradient", [unrollc.FirstOrder(), unrollc.Truncated(2)], ids=["first order", "truncated"]
)
def test_approximations_keep_the_transform(gradient: unrollc.FirstOrder) -> None:
    model, train, val = task()
    lr = torch.tensor(0.3, requires_grad=True)
    opt = torch.optim.SGD(model.parameters(), lr=lr)
    program = unrollc.compile(
        model,
        opt,
        F.cross_entropy,
        grad_transform=lambda p: clip_grad_norm_(p, 0.2),
        gradient=gradient,
        meta=[lr],
    )
    clip = clipped(2, 0.2)
    steps = iter(range(3))

    def by_hand(theta: Weights, gradients: Weights) -> Weights:
        detached = isinstance(gradient, unrollc.FirstOrder)
        gradients = [g.detach() for g in gradients] if detached else gradients
        return clip(theta, gradients)

    def after(theta: Weights) -> Weights:
        cut = next(steps) == 0 and isinstance(gradient, unrollc.Truncated)
        return [w.detach().requires_grad_() for w in theta] if cut else theta

    expected = unroll(model, train, val, rates=[lr] * 3, transform=by_hand, after=after)
    assert_agrees(program(train, val), expected, {"lr": lr})


def test_mixed_mode_stays_valid() -> None:
    """G is still the true gradient: the transform is part of the update."""
    model, train, _ = task()
    batch = (train[0][0], train[1][0])
    opt = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.3), momentum=0.9)
    program = unrollc.compile(
        model, opt, F.cross_entropy, grad_transform=lambda p: clip_grad_norm_(p, 0.2)
    )
    with torch.no_grad():
        step = program.lower(unrollc.repeat(batch, 2), batch).step
    given = {
        **{name: p.detach() for name, p in model.named_parameters()},
        'param_groups[0]["lr"]': torch.tensor(0.3),
        "train.inputs": batch[0],
        "train.target": batch[1],
    }
    for name, parameter in model.named_parameters():
        given[f'state["{name}"]["momentum_buffer"]'] = torch.randn(parameter.shape)
    assert_close(
        pulled_back(step, given, mixed_adjoint),
        pulled_back(step, given, reverse_adjoint),
        rtol=1e-12,
    )


def test_kinks_are_listed_and_a_lost_gradient_is_reported() -> None:
    model, train, val = task()
    opt = torch.optim.SGD(model.parameters(), lr=0.3)
    bound = torch.tensor(0.2, requires_grad=True)
    found = unrollc.check(
        model,
        opt,
        F.cross_entropy,
        train,
        val,
        grad_transform=lambda p: clip_grad_norm_(p, bound),  # clip_grad_norm_ takes float(bound)
    )
    kinks = {(kink.op, kink.where.short) for kink in found["0.weight"].II.kinks}
    assert {op for op, _ in kinks} == {"clamp", "linalg_vector_norm"}
    assert {where.partition(":")[0] for _, where in kinks} == {"test_grad_transform.py"}
    assert found[bound].status == "undefined"
    assert "float(bound)" in found[bound].where.text
