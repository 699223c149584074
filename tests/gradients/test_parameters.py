"""Which parameters are fast weights: frozen, outside the optimizer, tied, grouped, unused."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unrollc
from tests.gradients.programs import assert_equals_eager
from tests.oracles import cases, eager, ordinary
from tests.oracles.compare import assert_close
from tests.oracles.models import MLP, ConvNet, TiedAutoencoder, TwoInputs
from tests.oracles.objectives import Loss, unstack

pytestmark = pytest.mark.usefixtures("float64")

SHAPE = (5, 4)


def check(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    meta: dict[str, Tensor],
    *,
    train: tuple[Tensor, Tensor] | None = None,
    loss: Loss = F.cross_entropy,
) -> None:
    """Compare a program with the eager run, all of whose meta-parameters are in ``meta``."""
    train = cases.batches(SHAPE, 4, seed=1) if train is None else train
    batches = unstack(train)
    expected = eager.unroll(model, opt, loss, batches, batches[0])
    result = unrollc.compile(model, opt, loss)(train, batches[0])
    assert_equals_eager(result, expected, meta)


def test_a_frozen_parameter_is_a_constant() -> None:
    model = MLP()
    model.hidden.weight.requires_grad_(False)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    meta = {name: p for name, p in model.named_parameters() if p.requires_grad}
    check(model, opt, meta)
    assert model.hidden.weight.grad is None


def test_parameters_outside_the_optimizer_are_meta_parameters() -> None:
    """The head is fast, the body slow: the body's meta-gradient goes through every step."""
    model = MLP()
    opt = torch.optim.Adam(model.output.parameters(), lr=0.05, eps=1e-2)
    check(model, opt, dict(model.named_parameters()))


def test_a_frozen_parameter_outside_the_optimizer() -> None:
    model = MLP()
    model.hidden.bias.requires_grad_(False)
    opt = torch.optim.SGD([model.hidden.weight, model.output.bias], lr=0.1)
    check(model, opt, {n: p for n, p in model.named_parameters() if p.requires_grad})
    assert model.hidden.bias.grad is None


def test_tied_parameters_are_one_fast_weight() -> None:
    model = TiedAutoencoder()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8)
    inputs = torch.randn(4, *SHAPE)
    check(model, opt, dict(model.named_parameters()), train=(inputs, inputs), loss=F.mse_loss)


def test_param_groups_have_their_own_hyperparameters() -> None:
    model = ConvNet()
    groups = [
        {"params": [model.conv1.weight, model.conv2.weight], "lr": 0.1, "momentum": 0.5},
        {"params": list(model.output.parameters()), "lr": 0.02, "nesterov": True},
        {"params": list(model.norm1.parameters()), "lr": 0.2, "weight_decay": 0.3, "momentum": 0},
    ]
    opt = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    rates = {f"lr {i}": torch.tensor(0.03 * (i + 1), requires_grad=True) for i in range(2)}
    for group, rate in zip(opt.param_groups, rates.values(), strict=False):
        group["lr"] = rate
    # norm2 is in no group: constant in the inner loop, and a meta-parameter.
    meta = {**dict(model.named_parameters()), **rates}
    check(model, opt, meta, train=cases.batches((6, 1, 4, 4), 4, seed=1))


def test_one_tensor_as_the_rate_of_two_groups() -> None:
    model = MLP()
    groups = [{"params": model.hidden.parameters()}, {"params": model.output.parameters()}]
    opt = torch.optim.SGD(groups, lr=0.1)
    lr = torch.tensor(0.1, requires_grad=True)
    for group in opt.param_groups:
        group["lr"] = lr
    check(model, opt, {**dict(model.named_parameters()), "lr": lr})


def test_a_learning_rate_per_tensor() -> None:
    model = MLP()
    groups = [{"params": [param]} for param in model.parameters()]
    opt = torch.optim.Adam(groups, lr=0.1, eps=1e-2)
    rates = {
        f"lr of {name}": torch.tensor(0.05, requires_grad=True)
        for name, _ in model.named_parameters()
    }
    for group, rate in zip(opt.param_groups, rates.values(), strict=True):
        group["lr"] = rate
    check(model, opt, {**dict(model.named_parameters()), **rates})


class WithSpare(MLP):
    """Has a parameter that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.ones(3))


def test_a_parameter_that_nothing_uses_stays() -> None:
    """Ordinary training leaves it alone, weight decay or not, because its .grad is None."""
    model = WithSpare()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    train = cases.batches(SHAPE, 3, seed=1)
    batches = unstack(train)
    trained = ordinary.train(model, opt, F.cross_entropy, batches)
    with pytest.raises(unrollc.RequirementError, match="spare"):
        unrollc.compile(model, opt, F.cross_entropy)(train, batches[0])
    used = [param for name, param in model.named_parameters() if name != "spare"]
    result = unrollc.compile(model, opt, F.cross_entropy, meta=used)(train, batches[0])
    assert_close(result.params, trained.params, rtol=1e-12)
    result.loss.backward()
    assert model.spare.grad is None
    assert model.hidden.weight.grad is not None


def test_an_optimizer_that_has_already_taken_steps() -> None:
    """Its state is where the run starts: Adam's moments and step count, SGD's momentum."""
    for build in (
        lambda params: torch.optim.Adam(params, lr=0.05, eps=1e-2),
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.3),
    ):
        model = MLP()
        train = cases.batches(SHAPE, 3, seed=4)
        warm = ordinary.train(model, build(model.parameters()), F.cross_entropy, unstack(train))
        check(warm.model, warm.opt, dict(warm.model.named_parameters()))


def test_a_model_of_two_inputs() -> None:
    model = TwoInputs()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    left, right = torch.randn(3, 5, 4, requires_grad=True), torch.randn(3, 5, 2)
    target = torch.randint(3, (3, 5))
    meta = {**dict(model.named_parameters()), "left": left}
    check(model, opt, meta, train=((left, right), target))


def test_evaluation_mode() -> None:
    """BatchNorm by its running statistics, which stay as they are."""
    model = ConvNet()
    model(torch.randn(20, 1, 4, 4))
    model.eval()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    check(model, opt, dict(model.named_parameters()), train=cases.batches((6, 1, 4, 4), 3, seed=1))
    assert not model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_of_another_dtype_than_the_default(dtype: torch.dtype) -> None:
    """The step counters of torch.optim take the default dtype; the bias correction must not."""
    torch.set_default_dtype(torch.float32 if dtype == torch.float64 else torch.float64)
    model = MLP().to(dtype)
    opt = torch.optim.Adam(model.parameters(), lr=0.05, eps=1e-2)
    inputs, target = cases.batches(SHAPE, 4, seed=1)
    train = (inputs.to(dtype), target)
    batches = unstack(train)
    expected = eager.unroll(model, opt, F.cross_entropy, batches, batches[0])
    trained = ordinary.train(model, opt, F.cross_entropy, batches)
    result = unrollc.compile(model, opt, F.cross_entropy)(train, batches[0])
    result.loss.backward()
    # In float32: the rounding of four steps, each worth about 1e-6 of a gradient.
    exact = dtype == torch.float64
    assert_close(result.params, trained.params, rtol=1e-12 if exact else 1e-6)
    names = dict(model.named_parameters())
    found = {name: param.grad for name, param in names.items()}
    wanted = dict(zip(names, expected.gradients(list(names.values())), strict=True))
    assert_close(found, wanted, rtol=1e-10 if exact else 2e-5)
    assert all(grad.dtype == dtype for grad in found.values())
