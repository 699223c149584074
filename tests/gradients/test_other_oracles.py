"""Meta-gradients against oracles that share no code with eager unrolling."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unrollc
from tests.gradients.programs import compiled, gradients
from tests.oracles import cases, finite
from tests.oracles.compare import assert_close, relative_error
from tests.oracles.models import MLP
from tests.oracles.objectives import unstack

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [
        ("mlp", "sgd-momentum"),
        ("mlp", "sgd-dampening"),
        ("conv", "adam"),
        ("transformer", "sgd-nesterov"),
        ("lstm", "rmsprop"),
    ],
)
def test_differences_of_ordinary_training(model: str, optimizer: str) -> None:
    """The real model and the real optimizer, trained again for every difference."""
    case = cases.build(model, optimizer, steps=3)
    found = gradients(compiled(case)(case.train, case.val).loss, case.meta)

    def loss() -> Tensor:
        loss = case.train_ordinarily().loss
        assert loss is not None
        return loss

    step = 1e-3 if model == "conv" else 2e-3  # ReLU and max-pooling have kinks
    for name, tensor in case.meta.items():
        gradient = found[name]
        assert gradient is not None, name
        finite.assert_gradient(loss, tensor, gradient, directions=1, step=step)


def test_differences_of_the_program_itself() -> None:
    case = cases.build("mlp", "adamw", steps=4)
    program = compiled(case)
    found = gradients(program(case.train, case.val).loss, case.meta)

    def loss() -> Tensor:
        with torch.no_grad():
            return program(case.train, case.val).loss

    for name, tensor in case.meta.items():
        finite.assert_gradient(loss, tensor, found[name], directions=1, step=2e-3)


def test_a_wrong_gradient_does_not_pass() -> None:
    """The broken twin of the two tests above: first order in place of exact."""
    case = cases.build("mlp", "sgd-momentum", steps=3)
    weight = case.model.hidden.weight
    program = compiled(case, gradient=unrollc.FirstOrder(), val_loss=None, meta=[weight])
    found = gradients(program(case.train, case.val).loss, {"weight": weight})

    def loss() -> Tensor:
        with torch.no_grad():
            return program(case.train, case.val).loss

    with pytest.raises(AssertionError, match="finite differences"):
        finite.assert_gradient(loss, weight, found["weight"])


def test_higher_agrees() -> None:
    higher = pytest.importorskip("higher")
    model = MLP()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    lr = torch.tensor(0.1, requires_grad=True)
    train, val = cases.batches((5, 4), 4, seed=1), cases.batches((5, 4), 1, seed=2)
    meta = {**dict(model.named_parameters()), "lr": lr}
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False, override={"lr": [lr]}) as (
        fast,
        differentiable,
    ):
        for inputs, target in unstack(train):
            differentiable.step(F.cross_entropy(fast(inputs), target))
        expected = gradients(F.cross_entropy(fast(val[0][0]), val[1][0]), meta)
    opt.param_groups[0]["lr"] = lr
    program = unrollc.compile(model, opt, F.cross_entropy)
    found = gradients(program(train, (val[0][0], val[1][0])).loss, meta)
    assert_close(found, expected)


class Weight(nn.Module):
    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta))

    def forward(self, x: Tensor) -> Tensor:
        return self.theta * x


def test_closed_form_of_a_quadratic() -> None:
    """ℓ_j(θ) = a_j θ²/2 under SGD: θ_T = Π (1 - lr a_j) θ_0, and Lval = θ_T."""
    model, start, rate = Weight(1.3), 1.3, 0.2
    lr = torch.tensor(rate, requires_grad=True)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    opt.param_groups[0]["lr"] = lr
    a = torch.tensor([0.7, -0.4, 1.1, 0.2], requires_grad=True)
    program = unrollc.compile(
        model,
        opt,
        unrollc.objective(lambda model, batch: batch[1] * model(batch[0]) ** 2 / 2),
        val_loss=unrollc.objective(lambda model, batch: model(batch[0]) * batch[1]),
    )
    result = program((torch.ones(4), a), (torch.tensor(1.0), torch.tensor(1.0)))
    factors = 1 - rate * a.detach()
    product = factors.prod()
    expected = {
        "theta": product,
        "lr": -start * product * (a.detach() / factors).sum(),
        "a": -start * product * rate / factors,
    }
    assert relative_error(result.loss, start * product) < 1e-14
    found = gradients(result.loss, {"theta": model.theta, "lr": lr, "a": a})
    assert_close(found, expected, rtol=1e-13)
