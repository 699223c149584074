"""What can be a meta-parameter, and how it is asked for."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unrollc
from tests.gradients.programs import assert_equals_eager, compiled, gradients
from tests.oracles import cases, eager
from tests.oracles.cases import Case
from tests.oracles.compare import assert_close
from tests.oracles.models import MLP
from tests.oracles.objectives import unstack

pytestmark = pytest.mark.usefixtures("float64")

T = 4
SHAPE = (5, 4)


@pytest.fixture
def case() -> Case:
    return cases.build("mlp", "sgd-momentum", T)


def plain() -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    train, val = cases.batches(SHAPE, T, seed=1), cases.batches(SHAPE, 1, seed=2)
    return MLP(), train, (val[0][0], val[1][0])


# --- meta= ----------------------------------------------------------------------------------------


def test_a_list_of_tensors(case: Case) -> None:
    expected = gradients(case.unroll().loss, case.meta)
    asked = ["lr", "theta_0.hidden.weight", "train inputs", "loss.weight"]
    program = compiled(case, meta=[case.meta[name] for name in asked])
    program(case.train, case.val).loss.backward()
    found = {name: tensor.grad for name, tensor in case.meta.items()}
    assert_close(found, {name: expected[name] if name in asked else None for name in case.meta})


def test_a_list_of_names(case: Case) -> None:
    expected = gradients(case.unroll().loss, case.meta)
    program = compiled(case, meta=["hidden.weight", "output.bias"])
    program(case.train, case.val).loss.backward()
    found = {name: tensor.grad for name, tensor in case.meta.items()}
    asked = {"theta_0.hidden.weight", "theta_0.output.bias"}
    assert_close(found, {name: expected[name] if name in asked else None for name in case.meta})


def test_names_and_tensors_together(case: Case) -> None:
    expected = gradients(case.unroll().loss, case.meta)
    program = compiled(case, meta=["hidden.bias", case.meta["weight_decay"]])
    program(case.train, case.val).loss.backward()
    found = {name: tensor.grad for name, tensor in case.meta.items()}
    asked = {"theta_0.hidden.bias", "weight_decay"}
    assert_close(found, {name: expected[name] if name in asked else None for name in case.meta})


def test_what_does_not_require_grad_gets_none() -> None:
    case = cases.build("mlp", "adam", T)
    for name in ("lr", "train inputs", "loss.weight"):
        case.meta[name].requires_grad_(False)
    wanted = {name: tensor for name, tensor in case.meta.items() if tensor.requires_grad}
    expected = case.unroll()
    assert_equals_eager(compiled(case)(case.train, case.val), expected, wanted)
    assert case.meta["lr"].grad is None
    assert case.train[0].grad is None


# --- batches --------------------------------------------------------------------------------------


def test_a_list_of_batches_whose_tensors_require_grad() -> None:
    model, train, val = plain()
    batches = [(x.clone().requires_grad_(j != 1), y) for j, (x, y) in enumerate(unstack(train))]
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = eager.unroll(model, opt, F.cross_entropy, batches, val)
    meta = {f"batch {j}": x for j, (x, _) in enumerate(batches) if x.requires_grad}
    result = unrollc.compile(model, opt, F.cross_entropy)(batches, val)
    assert_equals_eager(result, expected, meta | dict(model.named_parameters()))
    assert batches[1][0].grad is None


def test_one_tensor_in_several_batches_gets_the_sum() -> None:
    model, train, val = plain()
    inputs = train[0][0].clone().requires_grad_()
    batches = [(inputs, y) for y in train[1]]
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = eager.unroll(model, opt, F.cross_entropy, batches, val)
    result = unrollc.compile(model, opt, F.cross_entropy)(batches, val)
    assert_equals_eager(result, expected, {"inputs": inputs})


def test_a_repeated_batch_whose_tensor_requires_grad() -> None:
    model, train, val = plain()
    batch = (train[0][0].clone().requires_grad_(), train[1][0])
    opt = torch.optim.Adam(model.parameters(), lr=0.05, eps=1e-2)
    expected = eager.unroll(model, opt, F.cross_entropy, [batch] * T, val)
    result = unrollc.compile(model, opt, F.cross_entropy)(unrollc.repeat(batch, T), val)
    assert_equals_eager(result, expected, {"inputs": batch[0]})


def test_soft_targets_and_validation_inputs_that_require_grad() -> None:
    model, train, _ = plain()
    soft = torch.randn(T, SHAPE[0], 3).softmax(-1).requires_grad_()
    val = (torch.randn(SHAPE, requires_grad=True), soft.detach()[0])
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = eager.unroll(model, opt, F.cross_entropy, unstack((train[0], soft)), val)
    result = unrollc.compile(model, opt, F.cross_entropy)((train[0], soft), val)
    assert_equals_eager(result, expected, {"targets": soft, "val inputs": val[0]})


def test_one_tensor_for_training_and_validation() -> None:
    model, train, _ = plain()
    inputs = train[0].clone().requires_grad_()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    val = (inputs[0], train[1][0])
    expected = eager.unroll(model, opt, F.cross_entropy, unstack((inputs, train[1])), val)
    result = unrollc.compile(model, opt, F.cross_entropy)((inputs, train[1]), val)
    assert_equals_eager(result, expected, {"inputs": inputs})


# --- hyperparameters ------------------------------------------------------------------------------

HYPERPARAMETERS = [
    (torch.optim.SGD, {"momentum": 0.8, "dampening": 0.3}, "momentum", 0.8),
    (torch.optim.SGD, {"momentum": 0.8, "dampening": 0.3}, "dampening", 0.3),
    (torch.optim.SGD, {"momentum": 0.8, "nesterov": True}, "momentum", 0.8),
    (torch.optim.SGD, {"maximize": True}, "weight_decay", 0.1),
    (torch.optim.Adam, {"eps": 1e-2}, "weight_decay", 0.1),
    (torch.optim.Adam, {"eps": 1e-2}, "eps", 1e-2),
    (torch.optim.Adam, {"eps": 1e-2, "amsgrad": True}, "lr", 0.05),
    (torch.optim.AdamW, {"eps": 1e-2}, "weight_decay", 0.1),
    (torch.optim.RMSprop, {"eps": 1e-2}, "alpha", 0.9),
    (torch.optim.RMSprop, {"eps": 1e-2, "centered": True, "momentum": 0.8}, "momentum", 0.8),
    (torch.optim.RMSprop, {"eps": 1e-2, "centered": True}, "eps", 1e-2),
    (torch.optim.Adagrad, {"initial_accumulator_value": 0.1, "lr_decay": 0.2}, "lr_decay", 0.2),
    (torch.optim.Adagrad, {"initial_accumulator_value": 0.1, "eps": 1e-2}, "eps", 1e-2),
]


@pytest.mark.parametrize(
    ("build", "options", "key", "value"),
    HYPERPARAMETERS,
    ids=[f"{build.__name__}-{key}-{i}" for i, (build, _, key, _) in enumerate(HYPERPARAMETERS)],
)
def test_any_float_of_a_param_group(
    build: type[torch.optim.Optimizer], options: dict[str, float], key: str, value: float
) -> None:
    model, train, val = plain()
    opt = build(model.parameters(), **{"lr": 0.05, **options})
    tensor = torch.tensor(value, requires_grad=True)
    opt.param_groups[0][key] = tensor
    expected = eager.unroll(model, opt, F.cross_entropy, unstack(train), val)
    result = unrollc.compile(model, opt, F.cross_entropy)(train, val)
    assert_equals_eager(result, expected, {**dict(model.named_parameters()), key: tensor})


def test_the_elements_of_betas() -> None:
    model, train, val = plain()
    opt = torch.optim.Adam(model.parameters(), lr=0.05, eps=1e-2)
    betas = (torch.tensor(0.8, requires_grad=True), torch.tensor(0.95, requires_grad=True))
    opt.param_groups[0]["betas"] = betas
    expected = eager.unroll(model, opt, F.cross_entropy, unstack(train), val)
    result = unrollc.compile(model, opt, F.cross_entropy)(train, val)
    assert_equals_eager(result, expected, dict(zip(("beta1", "beta2"), betas, strict=True)))


def test_adam_as_it_comes() -> None:
    """eps = 1e-8: the first update is nearly g / |g|, whose derivative eps / g² is what is left
    after eight digits cancel. The tolerance leaves those digits out; see cases.OPTIMIZERS."""
    model, train, val = plain()
    opt = torch.optim.Adam(model.parameters())
    lr = torch.tensor(1e-2, requires_grad=True)
    opt.param_groups[0]["lr"] = lr
    expected = eager.unroll(model, opt, F.cross_entropy, unstack(train), val)
    result = unrollc.compile(model, opt, F.cross_entropy)(train, val)
    meta = {**dict(model.named_parameters()), "lr": lr}
    assert_equals_eager(result, expected, meta, rtol=1e-8)


@pytest.mark.parametrize("key", ["lr", "weight_decay", "momentum"])
def test_a_value_per_step(key: str) -> None:
    model, train, val = plain()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8, weight_decay=0.1)
    values = torch.linspace(0.05, 0.2, T, requires_grad=True)
    expected = eager.unroll(
        model, opt, F.cross_entropy, unstack(train), val, per_step={(0, key): values}
    )
    opt.param_groups[0][key] = unrollc.PerStep(values)
    result = unrollc.compile(model, opt, F.cross_entropy)(train, val)
    assert_equals_eager(result, expected, {**dict(model.named_parameters()), key: values})


def test_a_value_per_step_that_is_constant_data() -> None:
    """A schedule: no gradient asked for, but the values must be used."""
    model, train, val = plain()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    values = torch.linspace(0.05, 0.2, T)
    expected = eager.unroll(
        model, opt, F.cross_entropy, unstack(train), val, per_step={(0, "lr"): values}
    )
    opt.param_groups[0]["lr"] = unrollc.PerStep(values)
    result = unrollc.compile(model, opt, F.cross_entropy)(train, val)
    assert_equals_eager(result, expected, dict(model.named_parameters()))


def test_a_decay_of_zero_has_a_gradient() -> None:
    """The optimizer's ``if weight_decay != 0`` must not cut the gradient of a tensor 0."""
    model, train, val = plain()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    decay = torch.tensor(0.0, requires_grad=True)
    opt.param_groups[0]["weight_decay"] = decay
    expected = eager.unroll(model, opt, F.cross_entropy, unstack(train), val)
    result = unrollc.compile(model, opt, F.cross_entropy)(train, val)
    assert_equals_eager(result, expected, {"weight_decay": decay})


# --- computed from other tensors ------------------------------------------------------------------


def test_a_rate_computed_from_another_tensor() -> None:
    """The rate is not a leaf, and is computed anew before each outer step."""
    model, train, val = plain()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    log_rate = torch.tensor(-2.0, requires_grad=True)
    program = unrollc.compile(model, opt, F.cross_entropy)
    for outer in range(3):
        opt.param_groups[0]["lr"] = log_rate.exp()
        meta = {"log_rate": log_rate, **dict(model.named_parameters())}
        expected = eager.unroll(model, opt, F.cross_entropy, unstack(train), val)
        wanted = gradients(expected.loss, meta)
        found = gradients(program(train, val).loss, meta)
        assert_close(found, wanted)
        with torch.no_grad():
            log_rate -= 0.3 * (outer + 1)


def test_per_step_values_and_inputs_computed_from_other_tensors() -> None:
    model, train, val = plain()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    slope = torch.tensor(0.3, requires_grad=True)
    scale = torch.tensor(1.5, requires_grad=True)
    values = 0.05 * (1 + slope * torch.arange(T))
    inputs = train[0] * scale
    expected = eager.unroll(
        model,
        opt,
        F.cross_entropy,
        unstack((inputs, train[1])),
        val,
        per_step={(0, "lr"): values},
    )
    opt.param_groups[0]["lr"] = unrollc.PerStep(values)
    result = unrollc.compile(model, opt, F.cross_entropy)((inputs, train[1]), val)
    meta = {"slope": slope, "scale": scale}
    assert_close(gradients(result.loss, meta), gradients(expected.loss, meta))


def test_a_loss_that_closes_over_a_tensor() -> None:
    model, train, val = plain()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    weight = torch.tensor([0.5, 1.0, 2.0], requires_grad=True)

    def weighted(prediction: Tensor, target: Tensor) -> Tensor:
        each = F.cross_entropy(prediction, target, reduction="none")
        return (weight[target] * each).mean()

    expected = eager.unroll(model, opt, weighted, unstack(train), val, val_loss=F.cross_entropy)
    result = unrollc.compile(model, opt, weighted, val_loss=F.cross_entropy)(train, val)
    assert_equals_eager(result, expected, {**dict(model.named_parameters()), "weight": weight})
