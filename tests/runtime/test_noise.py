"""Dropout: reproducible, different at each step, and with the gradient of the noise it drew."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unrollc
from tests.oracles import cases, eager, finite
from tests.oracles.compare import assert_close
from tests.oracles.models import DropoutMLP
from tests.oracles.objectives import unstack

pytestmark = pytest.mark.usefixtures("float64")

T = 4


class Noisy:
    def __init__(self) -> None:
        self.model = DropoutMLP()
        self.opt = torch.optim.SGD(self.model.parameters(), lr=0.2, momentum=0.8)
        self.lr = torch.tensor(0.2, requires_grad=True)
        self.opt.param_groups[0]["lr"] = self.lr
        self.train = cases.batches((5, 4), T, seed=1)
        self.val = unstack(cases.batches((5, 4), 1, seed=2))[0]
        self.meta = {**dict(self.model.named_parameters()), "lr": self.lr}
        self.program = unrollc.compile(self.model, self.opt, F.cross_entropy)

    def run(self, seed: int | None) -> dict[str, Tensor]:
        if seed is not None:
            torch.manual_seed(seed)
        result = self.program(self.train, self.val)
        found = torch.autograd.grad(result.loss, list(self.meta.values()))
        return {"loss": result.loss.detach(), **dict(zip(self.meta, found, strict=True))}


@pytest.fixture
def noisy() -> Iterator[Noisy]:
    yield Noisy()


def test_one_seed_one_result(noisy: Noisy) -> None:
    assert_close(noisy.run(seed=3), noisy.run(seed=3), rtol=0)


def test_another_seed_another_result(noisy: Noisy) -> None:
    first, second = noisy.run(seed=3), noisy.run(seed=4)
    assert all(not torch.equal(first[name], second[name]) for name in first)


def test_calls_without_a_new_seed_differ(noisy: Noisy) -> None:
    first, second = noisy.run(seed=3), noisy.run(seed=None)
    assert not torch.equal(first["loss"], second["loss"])


def test_a_sequence_of_calls_is_reproducible(noisy: Noisy) -> None:
    first = [noisy.run(seed=3), noisy.run(seed=None)]
    again = [noisy.run(seed=3), noisy.run(seed=None)]
    for left, right in zip(first, again, strict=True):
        assert_close(left, right, rtol=0)


def test_lowering_draws_no_noise(noisy: Noisy) -> None:
    """The first call, which lowers, and a later one give the same under one seed."""
    torch.manual_seed(5)
    state = torch.get_rng_state()
    noisy.program.lower(noisy.train, noisy.val)
    assert torch.equal(torch.get_rng_state(), state)
    fresh = Noisy()
    fresh.model.load_state_dict(noisy.model.state_dict())
    assert_close(fresh.run(seed=3), noisy.run(seed=3), rtol=0)


def test_the_gradient_is_that_of_the_noise_drawn(noisy: Noisy) -> None:
    found = noisy.run(seed=3)

    def loss() -> Tensor:
        torch.manual_seed(3)
        with torch.no_grad():
            return noisy.program(noisy.train, noisy.val).loss

    assert torch.equal(loss(), found["loss"])
    for name, tensor in noisy.meta.items():
        finite.assert_gradient(loss, tensor, found[name], step=2e-3)


def test_noise_between_call_and_backward_does_not_matter(noisy: Noisy) -> None:
    wanted = noisy.run(seed=3)
    torch.manual_seed(3)
    result = noisy.program(noisy.train, noisy.val)
    torch.manual_seed(99)
    torch.rand(7)
    noisy.program(noisy.train, noisy.val)
    found = torch.autograd.grad(result.loss, list(noisy.meta.values()))
    found = {"loss": result.loss.detach(), **dict(zip(noisy.meta, found, strict=True))}
    assert_close(found, wanted, rtol=0)


def test_each_step_draws_anew() -> None:
    """With lr = 0 and one batch, only the noise tells the inner losses apart."""
    noisy = Noisy()
    noisy.opt.param_groups[0]["lr"] = 0.0
    batch = unstack(noisy.train)[0]
    result = noisy.program(unrollc.repeat(batch, 6), noisy.val)
    assert len(set(result.inner_losses.tolist())) == 6


class OnlyDropout(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.drop(x)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_the_distribution_is_dropouts(p: float) -> None:
    """The mean and the mean square of what 40 steps let through, at five standard errors."""
    steps, count = 40, 1000
    model = OnlyDropout(p)
    opt = torch.optim.SGD(model.parameters(), lr=0.0)
    batch = (torch.ones(count), torch.zeros(count))
    kept = 1 - p
    for power, mean, variance in (
        (1, 1.0, 1 / kept - 1),
        (2, 1 / kept, 1 / kept**3 - 1 / kept**2),
    ):
        program = unrollc.compile(model, opt, lambda y, _, power=power: (y**power).mean())
        losses = program(unrollc.repeat(batch, steps), batch).inner_losses
        assert abs(losses.mean() - mean) < 5 * (variance / (steps * count)) ** 0.5
        assert 0.3 < losses.var() / (variance / count) < 2.5


def test_evaluation_mode_has_no_noise(noisy: Noisy) -> None:
    noisy.run(seed=3)
    noisy.model.eval()
    first, second = noisy.run(seed=3), noisy.run(seed=4)
    assert_close(first, second, rtol=0)
    expected = eager.unroll(
        noisy.model, noisy.opt, F.cross_entropy, unstack(noisy.train), noisy.val
    )
    wanted = dict(zip(noisy.meta, expected.gradients(list(noisy.meta.values())), strict=True))
    assert_close({name: first[name] for name in wanted}, wanted)


def test_without_noise_the_generator_is_left_alone() -> None:
    case = cases.build("mlp", "sgd", T)
    program = unrollc.compile(case.model, case.opt, case.loss)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    program(case.train, case.val).loss.backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_random_operators_of_the_users_own() -> None:
    """Noise on the inputs, drawn inside the loss, in the training steps alone."""
    model = nn.Linear(4, 3)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    sigma = torch.tensor(0.3, requires_grad=True)
    train = cases.batches((5, 4), T, seed=1)

    def noisy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, target = batch
        return F.cross_entropy(model(inputs + sigma * torch.randn_like(inputs)), target)

    program = unrollc.compile(model, opt, unrollc.objective(noisy), val_loss=F.cross_entropy)
    val = unstack(train)[0]

    def loss() -> Tensor:
        torch.manual_seed(7)
        return program(train, val).loss

    (gradient,) = torch.autograd.grad(loss(), [sigma])
    assert gradient.abs() > 1e-6
    finite.assert_gradient(lambda: loss().detach(), sigma, gradient)
