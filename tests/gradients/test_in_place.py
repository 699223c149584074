"""Models that write in place, against the same model without it and against finite differences."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unrollc
from tests.oracles import eager, finite
from tests.oracles.compare import assert_close
from tests.oracles.objectives import Objective, unstack

pytestmark = pytest.mark.usefixtures("float64")

T = 3


class Between(nn.Module):
    """A function of the hidden layer between two linear ones."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(torch.tanh(self.first(x))))


def column(z: Tensor) -> Tensor:
    y = z * 1
    y[:, 0] = z[:, 1] ** 2
    return y


def column_plain(z: Tensor) -> Tensor:
    return torch.cat([z[:, 1:2] ** 2, z[:, 1:]], 1)


def rows(z: Tensor) -> Tensor:
    out = torch.empty(6, 5)
    for i in range(6):
        out[i] = z[i] * z[i].sum()
    return out


def rows_plain(z: Tensor) -> Tensor:
    return z * z.sum(1, keepdim=True)


def scaled_view(z: Tensor) -> Tensor:
    y = z.clone()
    y[:, 2].mul_(z[:, 3])
    return y


def scaled_view_plain(z: Tensor) -> Tensor:
    return torch.cat([z[:, :2], (z[:, 2] * z[:, 3])[:, None], z[:, 3:]], 1)


def clamped_untracked(z: Tensor) -> Tensor:
    y = z.clone()
    with torch.no_grad():
        y.clamp_(-0.3, 0.3)
    return y * y * z


def clamped_untracked_plain(z: Tensor) -> Tensor:
    y = z + (z.clamp(-0.3, 0.3) - z).detach()
    return y * y * z


def through_data(z: Tensor) -> Tensor:
    return z * (1 + z.data)


def through_data_plain(z: Tensor) -> Tensor:
    return z * (1 + z.detach())


def copied_untracked(z: Tensor) -> Tensor:
    mean = torch.zeros(5)
    with torch.no_grad():
        mean.copy_(z.mean(0))
    return z * (1 + 5 * mean)


def copied_untracked_plain(z: Tensor) -> Tensor:
    return z * (1 + 5 * z.mean(0).detach())


PAIRS = [
    (column, column_plain),
    (rows, rows_plain),
    (scaled_view, scaled_view_plain),
    (clamped_untracked, clamped_untracked_plain),
    (through_data, through_data_plain),
    (copied_untracked, copied_untracked_plain),
]


@pytest.mark.parametrize(("written", "plain"), PAIRS, ids=lambda f: f.__name__)
def test_a_write_is_what_it_computes(
    written: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor]
) -> None:
    train = (torch.randn(T, 6, 4), torch.randint(3, (T, 6)))
    batches = unstack(train)
    model, twin = Between(written), Between(plain)
    opt = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
    other = torch.optim.SGD(twin.parameters(), lr=0.3, momentum=0.5)
    result = unrollc.compile(model, opt, F.cross_entropy)(train, batches[0])
    expected = eager.unroll(twin, other, F.cross_entropy, batches, batches[0])
    found = torch.autograd.grad(result.loss, list(model.parameters()))
    wanted = torch.autograd.grad(expected.loss, list(twin.parameters()))
    names = [name for name, _ in model.named_parameters()]
    assert_close(dict(zip(names, found, strict=True)), dict(zip(names, wanted, strict=True)))


def test_cosine_similarity() -> None:
    """PyTorch clamps its norms in place under ``no_grad``."""

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        return (1 - F.cosine_similarity(prediction, target)).mean()

    assert_differences(nn.Linear(4, 3), loss, torch.randn(T, 6, 3))


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm])
def test_weight_norm(norm: Callable[[nn.Module], nn.Module]) -> None:
    """Eager double backward forgets the norms' own derivative; finite differences do not."""
    model = nn.Sequential(norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))
    assert_differences(model, F.mse_loss, torch.randn(T, 6, 3))


def test_linear_algebra_with_error_checks() -> None:
    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        gram = prediction.T @ prediction + torch.eye(3)
        return torch.linalg.solve(gram, target.mean(0)).square().sum() + torch.logdet(gram)

    assert_differences(nn.Linear(4, 3), loss, torch.randn(T, 6, 3))


def assert_differences(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], target: Tensor
) -> None:
    train = (torch.randn(T, 6, 4), target)
    val = (torch.randn(6, 4), target[0])
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    program = unrollc.compile(model, opt, loss)
    parameters = list(model.parameters())
    found = torch.autograd.grad(program(train, val).loss, parameters)

    def scalar() -> Tensor:
        with torch.no_grad():
            return program(train, val).loss

    for parameter, gradient in zip(parameters, found, strict=True):
        finite.assert_gradient(scalar, parameter, gradient)


def test_validation_in_evaluation_mode() -> None:
    """Train with batch statistics, validate with running ones, which carry no gradient."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    train = (torch.randn(T, 6, 4), torch.randint(3, (T, 6)))

    def evaluate(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, target = batch
        model.eval()
        loss = F.cross_entropy(model(inputs), target)
        model.train()
        return loss

    val = unstack(train)[0]
    objective = unrollc.objective(evaluate)
    result = unrollc.compile(model, opt, F.cross_entropy, val_loss=objective)(train, val)
    expected = eager.unroll(
        model, opt, F.cross_entropy, unstack(train), val, val_loss=Objective(evaluate)
    )
    found = torch.autograd.grad(result.loss, list(model.parameters()))
    wanted = torch.autograd.grad(expected.loss, list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    assert_close(dict(zip(names, found, strict=True)), dict(zip(names, wanted, strict=True)))


class Averaging(nn.Module):
    """A running average that the forward updates without tracking and reads in the same step."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear, self.in_place = nn.Linear(4, 3), in_place
        self.register_buffer("average", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.linear(x))
        if self.in_place:
            with torch.no_grad():
                self.average.mul_(0.5).add_(z.mean(0))
        else:
            self.average = 0.5 * self.average + z.mean(0).detach()
        return z * (1 + self.average)


def test_a_buffer_updated_in_place_under_no_grad_hands_on_no_derivative() -> None:
    train = (torch.randn(T, 6, 4), torch.randint(3, (T, 6)))
    gradients = {}
    for in_place in (True, False):
        model = Averaging(in_place)
        opt = torch.optim.SGD(model.parameters(), lr=0.5)
        result = unrollc.compile(model, opt, F.cross_entropy)(train, unstack(train)[0])
        found = torch.autograd.grad(result.loss, list(model.parameters()))
        gradients[in_place] = dict(zip(("weight", "bias"), found, strict=True))
    expected = Averaging(in_place=False)
    theta, average = dict(expected.linear.named_parameters()), torch.zeros(3)
    losses = []
    for x, y in [*unstack(train), unstack(train)[0]]:
        z = torch.tanh(F.linear(x, **theta))
        average = 0.5 * average + z.mean(0).detach()
        losses.append(F.cross_entropy(z * (1 + average), y))
        steps = torch.autograd.grad(losses[-1], list(theta.values()), create_graph=True)
        theta = {k: p - 0.5 * g for (k, p), g in zip(theta.items(), steps, strict=True)}
    wanted = torch.autograd.grad(losses[-1], list(expected.linear.parameters()))
    for found in gradients.values():
        assert_close(found, dict(zip(("weight", "bias"), wanted, strict=True)))


def test_an_optimizer_that_writes_into_gradients() -> None:
    class Tripled(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad.mul_(3.0)
            return super().step(closure)

    model = nn.Linear(4, 3)
    train = (torch.randn(T, 6, 4), torch.randint(3, (T, 6)))
    val = unstack(train)[0]
    tripled = Tripled(model.parameters(), lr=0.1)
    plain = torch.optim.SGD(model.parameters(), lr=0.3)
    losses = [unrollc.compile(model, o, F.cross_entropy)(train, val).loss for o in (tripled, plain)]
    grads = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("build", [torch.optim.ASGD, torch.optim.RAdam, torch.optim.NAdam])
def test_optimizers_that_read_their_counters(build: type[torch.optim.Optimizer]) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    opt = build(model.parameters(), lr=0.05)
    train = (torch.randn(8, 6, 4), torch.randint(3, (8, 6)))
    val = unstack(train)[0]
    program = unrollc.compile(model, opt, F.cross_entropy)
    weight = model[0].weight
    (found,) = torch.autograd.grad(program(train, val).loss, [weight])

    def scalar() -> Tensor:
        with torch.no_grad():
            return program(train, val).loss

    finite.assert_gradient(scalar, weight, found, rtol=1e-6)  # eps = 1e-8 bends the first step
