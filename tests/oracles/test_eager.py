"""The eager oracle against real training, finite differences, a closed form and ``higher``."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.oracles import cases, eager, finite, ordinary
from tests.oracles.compare import assert_close, flattened, relative_error
from tests.oracles.models import MLP, DropoutMLP, TiedAutoencoder
from tests.oracles.objectives import Objective, unstack

pytestmark = pytest.mark.usefixtures("float64")

VARIANTS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd, weight decay": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "sgd, maximize": (torch.optim.SGD, {"lr": 0.1, "maximize": True, "weight_decay": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "dampening": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.4}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"lr": 0.05}),
    "adam, weight decay": (torch.optim.Adam, {"lr": 0.05, "weight_decay": 0.1, "eps": 1e-3}),
    "amsgrad": (torch.optim.Adam, {"lr": 0.05, "amsgrad": True, "betas": (0.5, 0.6)}),
    "adam, maximize": (torch.optim.Adam, {"lr": 0.05, "maximize": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.2}),
    "adamw, amsgrad": (torch.optim.AdamW, {"lr": 0.05, "amsgrad": True, "maximize": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01}),
    "rmsprop, centered": (torch.optim.RMSprop, {"lr": 0.01, "centered": True, "eps": 1e-3}),
    "rmsprop, all": (
        torch.optim.RMSprop,
        {"lr": 0.01, "centered": True, "momentum": 0.8, "weight_decay": 0.1, "maximize": True},
    ),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
    "adagrad, all": (
        torch.optim.Adagrad,
        {"lr": 0.1, "lr_decay": 0.3, "initial_accumulator_value": 0.2, "weight_decay": 0.1},
    ),
}


def assert_same_training(unrolled: eager.Unrolled, trained: ordinary.Trained) -> None:
    assert_close(unrolled.params, trained.params, rtol=1e-12)
    assert_close(unrolled.buffers, trained.buffers, rtol=1e-12)
    assert relative_error(unrolled.inner_losses, trained.inner_losses) < 1e-12
    state = flattened(trained.opt_state)
    assert_close(
        flattened(unrolled.opt_state),
        {key: value for key, value in state.items() if not key.endswith(".step")},
        rtol=1e-12,
    )
    if trained.loss is not None:
        assert relative_error(unrolled.loss, trained.loss) < 1e-12


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "warm"])
def test_every_rule_trains_as_torch_optim_does(variant: str, warm: bool) -> None:
    build, options = VARIANTS[variant]
    model = MLP()
    opt = build(model.parameters(), **options)
    train, val = cases.batches((5, 4), 7, seed=1), cases.batches((5, 4), 1, seed=2)
    if warm:
        trained = ordinary.train(model, opt, F.cross_entropy, unstack(train)[:2])
        model, opt = trained.model, trained.opt
    batches = unstack(train)[2:]
    unrolled = eager.unroll(model, opt, F.cross_entropy, batches, unstack(val)[0])
    trained = ordinary.train(model, opt, F.cross_entropy, batches, unstack(val)[0])
    assert_same_training(unrolled, trained)


@pytest.mark.parametrize("model", cases.MODELS)
@pytest.mark.parametrize("optimizer", cases.OPTIMIZERS)
def test_every_case_trains_as_torch_optim_does(model: str, optimizer: str) -> None:
    case = cases.build(model, optimizer, steps=4)
    assert_same_training(case.unroll(), case.train_ordinarily())


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [
        *(("mlp", optimizer) for optimizer in cases.OPTIMIZERS),
        ("conv", "sgd-momentum"),
        ("transformer", "adam"),
        ("lstm", "adamw"),
    ],
)
def test_meta_gradients_match_differences_of_ordinary_training(model: str, optimizer: str) -> None:
    case = cases.build(model, optimizer, steps=3)
    gradients = case.unroll().gradients(list(case.meta.values()))

    def loss() -> Tensor:
        loss = case.train_ordinarily().loss
        assert loss is not None
        return loss

    # A small first step: ReLU and max-pooling have kinks, and a rate must not reach 0.
    step = 1e-3 if model == "conv" else 2e-3
    for tensor, gradient in zip(case.meta.values(), gradients, strict=True):
        assert gradient is not None
        finite.assert_gradient(loss, tensor, gradient, directions=1, step=step)


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_a_momentum_buffer_that_starts_detached_is_caught(dampening: float) -> None:
    """The broken twin: what SGD does with differentiable=True in eager PyTorch."""

    def detached(param, grad, state, step, group):
        if state:
            return eager.sgd(param, grad, state, step, group)
        buffer = eager.direction(param, grad, group).detach()
        return param - group["lr"] * buffer, {"momentum_buffer": buffer}

    case = cases.build("mlp", "sgd-momentum", steps=3)
    for group in case.opt.param_groups:
        group["dampening"] = dampening
    theta = case.model.hidden.weight
    right = case.unroll()
    wrong = case.unroll(rules={torch.optim.SGD: detached})
    assert_close(wrong.params, right.params, rtol=1e-12)  # the training is the same

    def loss() -> Tensor:
        return case.train_ordinarily().loss

    finite.assert_gradient(loss, theta, right.gradients([theta])[0])
    with pytest.raises(AssertionError, match="finite differences"):
        finite.assert_gradient(loss, theta, wrong.gradients([theta])[0])


def test_closed_form_of_a_quadratic() -> None:
    """ℓ(θ) = a θ²/2 under SGD: θ_T = (1 - lr a)^T θ_0, and Lval = θ_T."""

    class Weight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.tensor(1.3))

    model, T, a = Weight(), 6, 0.7
    lr = torch.tensor(0.2, requires_grad=True)
    opt = torch.optim.SGD(model.parameters(), lr=lr)
    curvature = torch.full((T,), a, requires_grad=True)
    unrolled = eager.unroll(
        model,
        opt,
        Objective(lambda model, batch: batch * model.theta**2 / 2),
        list(curvature),
        torch.tensor(0.0),
        val_loss=Objective(lambda model, batch: model.theta + batch),
    )
    factor = 1 - 0.2 * a
    expected = {
        "loss": torch.tensor(factor**T * 1.3),
        "theta": torch.tensor(factor**T),
        "lr": torch.tensor(-a * T * factor ** (T - 1) * 1.3),
        "a": torch.full((T,), -0.2 * factor ** (T - 1) * 1.3),
    }
    theta, rate, each = unrolled.gradients([model.theta, lr, curvature])
    found = {"loss": unrolled.loss, "theta": theta, "lr": rate, "a": each}
    assert_close(found, expected, rtol=1e-14)


def test_a_decay_of_zero_still_has_a_gradient() -> None:
    case = cases.build("mlp", "sgd", steps=3)
    with torch.no_grad():
        case.meta["weight_decay"].zero_()
    (gradient,) = case.unroll().gradients([case.meta["weight_decay"]])
    finite.assert_gradient(lambda: case.unroll().loss, case.meta["weight_decay"], gradient)


@pytest.mark.parametrize(
    "build",
    [
        lambda groups: torch.optim.SGD(groups, lr=0.1),
        lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
        # Its Adam adds eps before the bias correction, PyTorch's after: no eps, no difference.
        lambda groups: torch.optim.Adam(groups, lr=0.05, eps=0.0),
        lambda groups: torch.optim.Adagrad(groups, lr=0.1, eps=1e-3),
    ],
    ids=["sgd", "momentum", "adam", "adagrad"],
)
def test_higher_agrees(build: cases.BuildOptimizer) -> None:
    higher = pytest.importorskip("higher")
    model = MLP()
    opt = build([{"params": list(model.parameters())}])
    lr = torch.tensor(opt.param_groups[0]["lr"], requires_grad=True)
    train = unstack(cases.batches((5, 4), 4, seed=1))
    val = unstack(cases.batches((5, 4), 1, seed=2))[0]
    tensors = [*model.parameters(), lr]
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False, override={"lr": [lr]}) as (
        fast,
        differentiable,
    ):
        for inputs, target in train:
            differentiable.step(F.cross_entropy(fast(inputs), target))
        loss = F.cross_entropy(fast(val[0]), val[1])
        expected = torch.autograd.grad(loss, tensors)
    opt.param_groups[0]["lr"] = lr
    found = eager.unroll(model, opt, F.cross_entropy, train, val).gradients(tensors)
    names = [*dict(model.named_parameters()), "lr"]
    assert_close(
        dict(zip(names, found, strict=True)), dict(zip(names, expected, strict=True)), rtol=1e-12
    )


def test_first_order_takes_inner_gradients_for_constants() -> None:
    """θ_T = θ_0 - Σ lr G_j with constant G_j: the gradient in θ_0 is that in θ_T."""
    case = cases.build("mlp", "sgd", steps=3)
    case.opt.param_groups[0]["weight_decay"] = 0
    unrolled = case.unroll(first_order=True)
    weight = case.model.hidden.weight
    last = torch.autograd.grad(unrolled.loss, [unrolled.params["hidden.weight"]], retain_graph=True)
    assert relative_error(unrolled.gradients([weight])[0], last[0]) < 1e-14
    assert unrolled.gradients([case.meta["loss.weight"]]) == (None,)


def test_truncated_keeps_the_last_steps_alone() -> None:
    case = cases.build("mlp", "adam", steps=5)
    exact, truncated = case.unroll(), case.unroll(truncated=2)
    assert_close(truncated.params, exact.params, rtol=1e-14)
    weight, rates, lr = case.model.hidden.weight, case.meta["lr per step"], case.meta["lr"]
    assert truncated.gradients([weight]) == (None,)
    (found,), (expected,) = truncated.gradients([rates]), exact.gradients([rates])
    assert found[:3].abs().max() == 0
    assert relative_error(found[3:], expected[3:]) < 1e-14
    assert relative_error(truncated.gradients([lr])[0], exact.gradients([lr])[0]) > 1e-3

    # The last two steps, started by ordinary training from where the first three end.
    start = ordinary.train(
        case.model,
        case.opt,
        case.loss,
        unstack(case.train)[:3],
        per_step={(1, "lr"): rates[:3]},
    )
    start.opt.param_groups[0]["lr"] = lr
    start.opt.param_groups[0]["weight_decay"] = case.meta["weight_decay"]
    tail = eager.unroll(
        start.model,
        start.opt,
        case.loss,
        unstack(case.train)[3:],
        case.val,
        val_loss=case.val_loss,
        per_step={(1, "lr"): rates[3:]},
    )
    assert relative_error(truncated.gradients([lr])[0], tail.gradients([lr])[0]) < 1e-12


def test_tied_parameters_are_one() -> None:
    model = TiedAutoencoder()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    inputs = torch.randn(3, 5, 4)
    train = [(x, x) for x in inputs]
    unrolled = eager.unroll(model, opt, F.mse_loss, train, train[0])
    trained = ordinary.train(model, opt, F.mse_loss, train, train[0])
    assert_same_training(unrolled, trained)
    weight = model.encoder.weight

    def loss() -> Tensor:
        return ordinary.train(model, opt, F.mse_loss, train, train[0]).loss

    finite.assert_gradient(loss, weight, unrolled.gradients([weight])[0])


def test_frozen_and_unheld_parameters_stay() -> None:
    model = MLP()
    model.hidden.bias.requires_grad_(False)
    held = [model.hidden.weight, model.hidden.bias, model.output.weight]
    opt = torch.optim.SGD(held, lr=0.1, weight_decay=0.1)
    train = unstack(cases.batches((5, 4), 3, seed=1))
    unrolled = eager.unroll(model, opt, F.cross_entropy, train, train[0])
    assert unrolled.params["hidden.bias"] is model.hidden.bias
    assert unrolled.params["output.bias"] is model.output.bias
    assert_same_training(unrolled, ordinary.train(model, opt, F.cross_entropy, train, train[0]))

    def loss() -> Tensor:
        return ordinary.train(model, opt, F.cross_entropy, train, train[0]).loss

    (gradient,) = unrolled.gradients([model.output.bias])
    finite.assert_gradient(loss, model.output.bias, gradient)


def test_nothing_given_is_changed() -> None:
    case = cases.build("conv", "adam", steps=3)
    before = copy.deepcopy(case.model.state_dict())
    case.unroll().loss.backward()
    case.train_ordinarily()
    for name, value in case.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not case.opt.state
    assert case.opt.param_groups[0]["lr"] is case.meta["lr"]


def test_dropout_is_reproducible() -> None:
    model = DropoutMLP()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    train = unstack(cases.batches((5, 4), 3, seed=1))

    def loss(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return eager.unroll(model, opt, F.cross_entropy, train, train[0]).loss

    assert torch.equal(loss(1), loss(1))
    assert not torch.equal(loss(1), loss(2))
