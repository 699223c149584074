"""FirstOrder and Truncated against eager runs that detach the same things."""

import pytest
import torch

import unrollc
from tests.gradients.programs import compiled, gradients
from tests.oracles import cases
from tests.oracles.cases import Case
from tests.oracles.compare import assert_close, relative_error

pytestmark = pytest.mark.usefixtures("float64")

T = 5


def build(optimizer: str, model: str = "mlp") -> Case:
    """The validation loss is the training loss here, so that the loss's weight always counts."""
    case = cases.build(model, optimizer, T)
    return Case(**{**vars(case), "val_loss": case.loss})


@pytest.mark.parametrize("optimizer", ["sgd", "sgd-nesterov", "adam", "adagrad"])
def test_first_order(optimizer: str) -> None:
    case = build(optimizer)
    case.train[0].requires_grad_(False)  # data act through inner gradients alone
    meta = {name: tensor for name, tensor in case.meta.items() if tensor.requires_grad}
    expected = case.unroll(first_order=True)
    wanted = gradients(expected.loss, meta)
    exact = gradients(case.unroll().loss, meta)
    result = compiled(case, gradient=unrollc.FirstOrder())(case.train, case.val)
    assert relative_error(result.loss, expected.loss) < 1e-12
    result.loss.backward()
    assert_close({name: tensor.grad for name, tensor in meta.items()}, wanted)
    weight = "theta_0.hidden.weight"
    assert relative_error(wanted[weight], exact[weight]) > 1e-3  # another number than the exact


def test_first_order_of_a_parameter_outside_the_optimizer() -> None:
    """It acts on the validation loss directly; what it does to inner gradients is left out."""
    case = build("sgd")
    case.opt.param_groups[0]["params"].pop(0)  # hidden.weight
    case.train[0].requires_grad_(False)
    meta = {"hidden.weight": case.model.hidden.weight, "lr": case.meta["lr"]}
    wanted = gradients(case.unroll(first_order=True).loss, meta)
    result = compiled(case, gradient=unrollc.FirstOrder())(case.train, case.val)
    assert_close(gradients(result.loss, meta), wanted)


def test_first_order_has_no_gradient_for_data() -> None:
    case = build("sgd")
    program = compiled(case, gradient=unrollc.FirstOrder(), meta=[case.train[0]])
    with pytest.raises(unrollc.RequirementError):
        program(case.train, case.val)


@pytest.mark.parametrize("optimizer", ["sgd", "sgd-dampening", "adam", "rmsprop"])
@pytest.mark.parametrize("k", [1, 3])
def test_truncated(optimizer: str, k: int) -> None:
    case = build(optimizer)
    expected = case.unroll(truncated=k)
    wanted = gradients(expected.loss, case.meta)
    result = compiled(case, gradient=unrollc.Truncated(k))(case.train, case.val)
    assert relative_error(result.loss, expected.loss) < 1e-12
    result.loss.backward()
    found = {name: tensor.grad for name, tensor in case.meta.items()}
    theta = {name for name in case.meta if name.startswith("theta_0.")}
    assert all(found[name] is None for name in theta)
    others = set(case.meta) - theta
    assert_close({n: found[n] for n in others}, {n: wanted[n] for n in others})
    rates = found["lr per step"]
    assert not rates[: T - k].any()
    assert rates[T - k :].all()


def test_truncated_with_batchnorm() -> None:
    case = build("sgd-momentum", "conv")
    wanted = case.unroll(truncated=2)
    result = compiled(case, gradient=unrollc.Truncated(2))(case.train, case.val)
    others = {n: t for n, t in case.meta.items() if not n.startswith("theta_0.")}
    assert_close(gradients(result.loss, others), gradients(wanted.loss, others))
    assert_close(result.buffers, wanted.buffers, rtol=1e-12)


def test_truncated_reaches_parameters_outside_the_optimizer() -> None:
    """They are constants of every step, not θ_0: the kept steps give them a gradient."""
    case = build("sgd")
    case.opt.param_groups[0]["params"].pop(0)  # hidden.weight
    meta = {"hidden.weight": case.model.hidden.weight}
    wanted = gradients(case.unroll(truncated=2).loss, meta)
    result = compiled(case, gradient=unrollc.Truncated(2))(case.train, case.val)
    assert_close(gradients(result.loss, meta), wanted)


def test_truncating_nothing_is_exact() -> None:
    case = build("sgd-momentum")
    others = {n: t for n, t in case.meta.items() if not n.startswith("theta_0.")}
    wanted = gradients(case.unroll().loss, others)
    result = compiled(case, gradient=unrollc.Truncated(T))(case.train, case.val)
    assert_close(gradients(result.loss, others), wanted)


def test_theta_0_of_a_truncated_program_cannot_be_asked_for() -> None:
    case = build("sgd")
    program = compiled(case, gradient=unrollc.Truncated(2), meta=["hidden.weight"])
    with pytest.raises(unrollc.RequirementError, match=r"hidden\.weight"):
        program(case.train, case.val)


def test_exact_by_name() -> None:
    case = build("sgd")
    wanted = gradients(case.unroll().loss, case.meta)
    result = compiled(case, gradient="exact")(case.train, case.val)
    assert_close(gradients(result.loss, case.meta), wanted)
    assert torch.isfinite(result.loss)
