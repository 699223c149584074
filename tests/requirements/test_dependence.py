"""Verdicts by dependence: what exists, what is zero, what is undefined, with reason and line."""

import functools
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unrollc
from tests.oracles import cases, finite, ordinary
from tests.oracles.models import MLP, WeightedLoss
from tests.oracles.objectives import unstack
from tests.requirements import lines

pytestmark = pytest.mark.usefixtures("float64")

T = 3


line_of = functools.partial(lines.line_of, __file__)


def tensor(value: float) -> Tensor:
    return torch.tensor(value, requires_grad=True)


class Problem:
    """An MLP, its optimizer, a loss and data; everything may be replaced."""

    def __init__(
        self,
        model: nn.Module | None = None,
        loss: Any = F.cross_entropy,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        **hyper: Any,
    ) -> None:
        self.model = MLP() if model is None else model
        self.opt = optimizer(self.model.parameters(), **{"lr": 0.1, **hyper})
        self.loss = loss
        self.train = cases.batches((5, 4), T, seed=1)
        inputs, target = cases.batches((5, 4), 1, seed=2)
        self.val = (inputs[0], target[0])

    def compile(self, **options: Any) -> Any:
        return unrollc.compile(self.model, self.opt, self.loss, **options)

    def check(self, **options: Any) -> Any:
        return unrollc.check(self.model, self.opt, self.loss, self.train, self.val, **options)

    def refused(self, **options: Any) -> unrollc.RequirementError:
        """The error that lowering raises; a check of the same raises nothing."""
        assert not self.check(**options).ok
        with pytest.raises(unrollc.RequirementError) as caught:
            self.compile(**options).lower(self.train, self.val)
        return caught.value


# --- what exists ------------------------------------------------------------------------------


def test_every_kind_of_meta_parameter_exists() -> None:
    lr = tensor(0.1)
    problem = Problem(loss=WeightedLoss(), lr=lr)
    problem.train[0].requires_grad_()
    problem.val[0].requires_grad_()
    found = problem.check()
    assert found.ok
    assert {v.label for v in found} == {
        "hidden.weight",
        "hidden.bias",
        "output.weight",
        "output.bias",
        "loss.weight",
        "loss.smoothing",
        'param_groups[0]["lr"]',
        "train.inputs",
        "val.inputs",
    }
    assert all(v.status == "exists" and v.requested and v.reason for v in found)
    assert all(v.I.holds and v.II.holds for v in found)
    theta, rate = found["hidden.weight"], found[lr]
    assert theta.IIIa.holds is None and theta.IIIb.holds
    assert "Hessian" in theta.reason
    assert rate.IIIa.holds and rate.IIIb.holds is None
    assert "through the update" in rate.reason
    learned = found["loss.smoothing"]
    assert learned.IIIb.holds
    assert "through the inner gradient" in learned.reason and "directly in Lval" in learned.reason
    assert found["val.inputs"].reason == "directly in Lval"


def test_the_verdicts_are_what_differentiation_finds() -> None:
    """A verdict of "exists" has a gradient behind it."""
    lr = tensor(0.1)
    problem = Problem(loss=WeightedLoss(), lr=lr)
    assert problem.check().ok
    problem.compile()(problem.train, problem.val).loss.backward()
    for leaf in (lr, *problem.model.parameters(), *problem.loss.parameters()):
        assert leaf.grad is not None and leaf.grad.abs().sum() > 0


def test_look_up_by_tensor_and_by_label() -> None:
    lr = tensor(0.1)
    problem = Problem(lr=lr)
    found = problem.check()
    weight = problem.model.hidden.weight
    assert found[weight] is found["hidden.weight"]
    assert found[lr] is found['param_groups[0]["lr"]']
    assert len(found) == 5
    for stranger in ("nothing", torch.zeros(2)):
        with pytest.raises(KeyError, match=r"not a meta-parameter; these are: hidden\.weight"):
            found[stranger]


def test_look_up_of_a_value_per_step() -> None:
    rates = unrollc.PerStep(torch.full((T,), 0.1, requires_grad=True))
    problem = Problem()
    problem.opt.param_groups[0]["lr"] = rates
    found = problem.check()
    assert found[rates] is found[rates.per_step] is found['param_groups[0]["lr"]']
    assert found[rates].status == "exists"


# --- what is zero -----------------------------------------------------------------------------


def accuracy(prediction: Tensor, target: Tensor) -> Tensor:
    hits = prediction.argmax(-1) == target  # the metric
    return hits.double().mean()


def test_an_argmax_metric_fails_requirement_one() -> None:
    problem = Problem(lr=tensor(0.1))
    found = problem.check(val_loss=accuracy)
    assert not found.ok
    for v in found:
        assert v.status == "zero" and v.I.holds is False
        assert v.where is not None and v.where.short == line_of("the metric")
        assert v.remedy
    error = problem.refused(val_loss=accuracy)
    assert line_of("the metric").split(":")[1] in str(error.where)
    assert "Requirement I)" in str(error)
    # The repaired twin.
    assert problem.check(val_loss=F.cross_entropy).ok


def test_a_validation_without_the_weights_fails_requirement_one() -> None:
    problem = Problem()
    found = problem.check(val_loss=lambda prediction, target: target.double().sum())
    assert not found.ok
    assert "does not use the adapted weights" in found["hidden.weight"].I.reason


class WithSpare(MLP):
    """A parameter that the forward does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.ones(2))


class SpareLoss(nn.Module):
    """A loss with a parameter, which is read or not."""

    def __init__(self, read: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.read = read

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(prediction, target)
        return loss * self.scale if self.read else loss


def test_a_parameter_that_nothing_uses_is_zero() -> None:
    problem = Problem(loss=SpareLoss(read=False))
    verdict = problem.check()["loss.scale"]
    assert verdict.status == "zero"
    assert verdict.reason == "neither the inner steps nor the validation loss depend on it"
    assert "loss.scale" in str(problem.refused())
    assert problem.check(meta=["hidden.weight"]).ok
    assert Problem(loss=SpareLoss(read=True)).check().ok


def test_a_weight_that_no_loss_reads_is_zero() -> None:
    problem = Problem(WithSpare())
    found = problem.check()
    assert found["spare"].status == "zero"
    assert found["hidden.weight"].status == "exists"


class Through(nn.Module):
    """A loss whose scale goes through a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.function = function

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction, target) * self.function(self.scale)


def stopped(x: Tensor) -> Tensor:
    return x.detach() * 2  # the stop


def rounded(x: Tensor) -> Tensor:
    return torch.round(x * 2)  # the rounding


def as_integer(x: Tensor) -> Tensor:
    whole = x.to(torch.int64)  # the cast
    return whole.double()


def compared(x: Tensor) -> Tensor:
    return torch.where(x > 1, 2.0, 3.0)  # the comparison


@pytest.mark.parametrize(
    ("function", "marker", "reason"),
    [
        (stopped, "the stop", "detach() or no_grad stops the gradient"),
        (rounded, "the rounding", "the derivative of round is zero everywhere it exists"),
        (as_integer, "the cast", "integers or truth values"),
        (compared, "the comparison", "integers or truth values"),
        (torch.ones_like, "", "only the shape is used"),
    ],
)
def test_an_op_that_cuts_the_path_is_named(
    function: Callable[[Tensor], Tensor], marker: str, reason: str
) -> None:
    problem = Problem(loss=Through(function))
    verdict = problem.check()["loss.scale"]
    assert verdict.status == "zero"
    assert reason in verdict.reason
    assert verdict.IIIb.holds is False
    assert verdict.where is not None
    if marker:
        assert verdict.where.short == line_of(marker)
    error = problem.refused()
    assert error.where == verdict.where
    assert "Requirement IIIb" in str(error)


@pytest.mark.parametrize(
    "function",
    [lambda x: x * 2, lambda x: torch.where(x > 1, x, -x), lambda x: x.float().double()],
)
def test_an_op_that_does_not_cut_passes(function: Callable[[Tensor], Tensor]) -> None:
    """The repaired twins; a cast to another floating type is no cut."""
    assert Problem(loss=Through(function)).check().ok


def test_a_parallel_path_is_enough() -> None:
    assert Problem(loss=Through(lambda x: x.detach() * x)).check().ok


# --- approximations ---------------------------------------------------------------------------


def test_first_order_takes_the_inner_gradient_as_a_constant() -> None:
    lr = tensor(0.1)
    problem = Problem(loss=SpareLoss(read=True), lr=lr)
    found = problem.check(gradient=unrollc.FirstOrder(), val_loss=F.cross_entropy)
    assert found["loss.scale"].status == "zero"
    assert "FirstOrder takes as a constant" in found["loss.scale"].reason
    assert found["loss.scale"].remedy == 'use gradient="exact"'
    assert found[lr].status == found["hidden.weight"].status == "exists"
    problem.refused(gradient=unrollc.FirstOrder(), val_loss=F.cross_entropy)
    assert problem.check(val_loss=F.cross_entropy).ok


def test_truncation_does_not_ask_for_the_initial_weights() -> None:
    lr = tensor(0.1)
    problem = Problem(lr=lr)
    found = problem.check(gradient=unrollc.Truncated(2))
    assert found.ok
    weight = found["hidden.weight"]
    assert not weight.requested and weight.status == "zero"
    assert weight.reason == "Truncated(2) does not go back to θ_0"
    assert found[lr].requested and found[lr].status == "exists"
    assert "not requested" in str(found)
    # All T steps are no truncation.
    assert problem.check(gradient=unrollc.Truncated(T))["hidden.weight"].status == "exists"
    assert "hidden.weight" in str(
        problem.refused(gradient=unrollc.Truncated(2), meta=["hidden.weight"])
    )


# --- optimizers written by hand ---------------------------------------------------------------


class Handmade(torch.optim.Optimizer):
    """Gradient descent whose rate goes through a function of Python."""

    def __init__(self, params: Any, lr: Any, rate: Callable[[Any], Any]) -> None:
        super().__init__(params, {"lr": lr})
        self.rate = rate

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(param.grad * self.rate(group["lr"]))


def by_float(lr: Any) -> Any:
    return float(lr)  # the float


def by_math(lr: Any) -> Any:
    return math.sqrt(lr)  # the root


def by_item(lr: Any) -> Any:
    return lr.item()  # the item


@pytest.mark.parametrize(
    ("rate", "marker"), [(by_float, "the float"), (by_math, "the root"), (by_item, "the item")]
)
def test_a_rate_that_python_reads_is_undefined(rate: Callable[[Any], Any], marker: str) -> None:
    lr = tensor(0.1)
    problem = Problem(optimizer=Handmade, lr=lr, rate=rate)
    verdict = problem.check()[lr]
    assert verdict.status == "undefined"
    assert verdict.IIIa.holds is False
    assert "Python number" in verdict.reason
    assert verdict.where is not None and verdict.where.short == line_of(marker)
    error = problem.refused()
    assert str(line_of(marker).split(":")[1]) in str(error.where)
    assert "Requirement IIIa" in str(error)
    # What does not go through the rate is there.
    assert problem.check()["hidden.weight"].status == "exists"
    assert problem.check(meta=["hidden.weight"]).ok


@pytest.mark.parametrize("rate", [lambda lr: lr, lambda lr: lr**0.5])
def test_a_rate_that_stays_a_tensor_exists(rate: Callable[[Any], Any]) -> None:
    lr = tensor(0.1)
    assert Problem(optimizer=Handmade, lr=lr, rate=rate).check()[lr].status == "exists"


def test_a_detach_in_an_optimizer_is_transparent() -> None:
    lr = tensor(0.1)
    problem = Problem(optimizer=Handmade, lr=lr, rate=lambda rate: rate.detach())
    assert problem.check()[lr].status == "exists"


class SignDescent(torch.optim.Optimizer):
    """Steps by the gradient's sign."""

    def __init__(self, params: Any, lr: Any) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(param.grad.sign() * group["lr"])  # the sign


def test_a_sign_update_hands_nothing_through_the_gradient() -> None:
    lr = tensor(0.1)
    problem = Problem(loss=SpareLoss(read=True), optimizer=SignDescent, lr=lr)
    found = problem.check(val_loss=F.cross_entropy)
    assert found[lr].status == "exists"
    scale = found["loss.scale"]
    assert scale.status == "zero"
    assert scale.II.holds is False and "sign" in scale.II.reason
    assert scale.II.where is not None and scale.II.where.short == line_of("the sign")


# --- hyperparameters at zero ------------------------------------------------------------------


def validation(problem: Problem) -> Tensor:
    trained = ordinary.train(
        problem.model, problem.opt, problem.loss, unstack(problem.train), problem.val
    )
    assert trained.loss is not None
    return trained.loss


def test_weight_decay_at_zero_has_its_gradient() -> None:
    """``if weight_decay != 0`` skips the term, yet the derivative in it is not zero."""
    decay = tensor(0.0)
    problem = Problem(weight_decay=decay)
    assert problem.check()[decay].status == "exists"
    result = problem.compile()(problem.train, problem.val)
    (gradient,) = torch.autograd.grad(result.loss, [decay])
    assert gradient.abs() > 1e-3

    # A copy of the tensor, since finite differences move it to negative values too.
    problem.opt.param_groups[0]["weight_decay"] = moving = decay.detach().clone()
    finite.assert_gradient(lambda: validation(problem), moving, gradient, rtol=1e-8, step=1e-2)


def test_momentum_at_zero_with_dampening_is_undefined() -> None:
    """Momentum brings a buffer with it, and dampening acts from the second step on: the loss
    jumps as momentum leaves zero."""
    momentum = tensor(0.0)
    problem = Problem(momentum=momentum, dampening=0.3)
    verdict = problem.check()[momentum]
    assert verdict.status == "undefined"
    assert "zero" in verdict.reason
    assert verdict.where is not None and verdict.where.short.startswith("sgd.py:")
    problem.refused()
    # Away from zero it exists.
    elsewhere = tensor(0.5)
    assert Problem(momentum=elsewhere, dampening=0.3).check()[elsewhere].status == "exists"


# --- how verdicts print -----------------------------------------------------------------------


def test_the_table_names_everything() -> None:
    problem = Problem(loss=Through(stopped), lr=tensor(0.1))
    found = problem.check()
    text = str(found)
    for label in ("hidden.weight", "output.bias", "loss.scale"):
        assert label in text
    # Long labels are folded into their column.
    column = "".join(line.split("│")[1].strip() for line in text.splitlines() if "│" in line)
    assert 'param_groups[0]["lr"]' in column
    for word in ("exists", "zero", "holds", "fails"):
        assert word in text
    assert max(len(line) for line in text.splitlines()) <= 110


def test_verdicts_are_plain_data() -> None:
    problem = Problem(loss=Through(stopped), lr=tensor(0.1))
    found = problem.check()
    data = json.loads(json.dumps(found.to_dict()))
    assert set(data) == {v.label for v in found}
    scale = data["loss.scale"]
    assert scale["status"] == "zero"
    assert line_of("the stop").split(":")[1] in scale["where"]
    assert scale["IIIb"]["holds"] is False
    assert data["hidden.weight"]["where"] is None
    assert {"I", "II", "IIIa", "IIIb"} <= set(scale)


def test_an_error_says_what_where_why_and_what_to_do() -> None:
    error = Problem(loss=Through(stopped)).refused()
    what, where, why, fix = str(error).splitlines()
    assert what == "no meta-gradient reaches loss.scale: it is zero"
    assert where.startswith("  at ") and "return x.detach() * 2" in where
    assert why.startswith("  detach() or no_grad stops the gradient")
    assert fix.startswith("  Fix: ")
