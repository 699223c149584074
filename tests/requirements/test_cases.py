"""What users meet: each failure with its verdict, reason and line, and its repaired twin."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unrollc
from tests.oracles import cases
from tests.requirements import lines
from unrollc.requirements.edges import _KNOWN
from unrollc.requirements.verdict import Requirements, Verdict

pytestmark = pytest.mark.usefixtures("float64")

T = 3


line_of = functools.partial(lines.line_of, __file__)


def tensor(value: float) -> Tensor:
    return torch.tensor(value, requires_grad=True)


class Net(nn.Module):
    """Two layers; what happens between them is given."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


class Learned(nn.Module):
    """A loss with one parameter, used by a function."""

    def __init__(self, use: Callable[[Tensor, Tensor, Tensor], Tensor], value: float = 1.3) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.tensor(value))
        self.use = use

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.use(self.phi, prediction, target)


class Descent(torch.optim.Optimizer):
    """θ ← θ − direction(G, θ, η, λ)."""

    def __init__(self, params: Any, direction: Callable[..., Tensor], **hyper: Any) -> None:
        super().__init__(params, hyper)
        self.direction = direction

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            hyper = {k: v for k, v in group.items() if k != "params"}
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(self.direction(param.grad, param, **hyper))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=tensor(0.1))


def check(
    model: nn.Module | None = None,
    loss: Any = F.cross_entropy,
    optimizer: Callable[[Any], torch.optim.Optimizer] = sgd,
    **options: Any,
) -> Requirements:
    """The verdicts; lowering must agree with them."""
    model = Net() if model is None else model
    opt = optimizer(list(model.parameters()))
    train = cases.batches((5, 4), T, seed=1)
    inputs, target = cases.batches((5, 4), 1, seed=2)
    val = (inputs[0], target[0])
    found = unrollc.check(model, opt, loss, train, val, **options)
    program = unrollc.compile(model, opt, loss, **options)
    if found.ok:
        program.lower(train, val)
    else:
        with pytest.raises(unrollc.RequirementError):
            program.lower(train, val)
    return found


def blamed(verdict: Verdict, marker: str) -> bool:
    return verdict.where is not None and verdict.where.short == line_of(marker)


# --- Requirement I ----------------------------------------------------------------------------


def accuracy(prediction: Tensor, target: Tensor) -> Tensor:
    hits = prediction.argmax(-1) == target  # accuracy
    return hits.double().mean()


def rounded(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction.round() - 1.0).square().mean()  # rounding


def whole(prediction: Tensor, target: Tensor) -> Tensor:
    return prediction.long().double().mean()  # the integer cast


def stopped(prediction: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(prediction.detach(), target)  # detach in the metric


@pytest.mark.parametrize(
    ("metric", "marker", "op", "reason"),
    [
        (accuracy, "accuracy", "argmax", "integers or truth values"),
        (rounded, "rounding", "round", "the derivative of round is zero everywhere it exists"),
        (whole, "the integer cast", "_to_copy", "integers or truth values"),
        (stopped, "detach in the metric", "detach", "stops the gradient"),
    ],
)
def test_a_metric_without_derivative(metric: Any, marker: str, op: str, reason: str) -> None:
    found = check(val_loss=metric)
    assert not found.ok and found.I.holds is False
    assert reason in found.I.reason
    for verdict in found:
        assert verdict.status == "zero" and blamed(verdict, marker)
        assert str(verdict.I) == "fails" and str(verdict.II) == "holds"
        assert (
            "detach()" if op == "detach" else "differentiable validation loss"
        ) in verdict.remedy
    repaired = check(val_loss=lambda prediction, target: (prediction - 1.0).square().mean())
    assert repaired.ok and str(repaired.I) == "holds"


def test_weights_that_the_validation_does_not_use() -> None:
    found = check(val_loss=lambda prediction, target: target.double().mean())
    assert not found.ok
    assert found.I.reason == "Lval does not use the adapted weights"
    assert check(val_loss=F.cross_entropy).ok


# --- kinks are listed, not failed --------------------------------------------------------------


def bent(x: Tensor) -> Tensor:
    return F.relu(x)  # the relu


def pooled(x: Tensor) -> Tensor:
    return F.max_pool1d(x, 1)  # the pool


@pytest.mark.parametrize(
    ("between", "marker", "op", "at"),
    [
        (bent, "the relu", "relu", "0"),
        (pooled, "the pool", "max_pool2d_with_indices", "ties within a window"),
    ],
)
def test_kinks_are_listed(between: Any, marker: str, op: str, at: str) -> None:
    found = check(Net(between), loss=lambda p, t: p.square().mean())
    assert found.ok
    first = found["first.weight"]
    assert first.status == "exists"
    assert str(first.I) == str(first.IIIb) == "holds almost everywhere"
    (kink,) = first.kinks
    assert (kink.op, kink.at) == (op, at)
    assert kink.where is not None and kink.where.short == line_of(marker)
    assert f"kink: {kink}" in str(found)
    # The last layer's gradient does not pass the kink again.
    assert str(found["second.bias"].IIIb) == "holds"
    smooth = check(Net(), loss=lambda p, t: p.square().mean())
    assert all(
        str(verdict.IIIb) == "holds" and not verdict.kinks
        for verdict in smooth
        if verdict.IIIb.holds
    )


# --- Requirement II: updates ------------------------------------------------------------------


def by_sign(gradient: Tensor, param: Tensor, lr: Any) -> Tensor:
    return lr * gradient.sign()  # the sign


def by_gradient(gradient: Tensor, param: Tensor, lr: Any) -> Tensor:
    return lr * gradient


@pytest.mark.parametrize("name", ["sign descent", "Rprop"])
def test_sign_updates_hand_on_nothing_through_the_gradient(name: str) -> None:
    lr = tensor(0.01)

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        if name == "Rprop":
            return torch.optim.Rprop(parameters, lr=lr)
        return Descent(parameters, by_sign, lr=lr)

    learned = Learned(lambda phi, p, t: phi * F.cross_entropy(p, t))
    found = check(loss=learned, optimizer=optimizer, val_loss=F.cross_entropy)
    assert found.II.holds is False and "sign" in found.II.reason
    assert found[lr].status == "exists" and str(found[lr].IIIa).startswith("holds")
    verdict = found["loss.phi"]
    assert verdict.status == "zero" and verdict.IIIb.holds
    assert {cut.op for cut in verdict.cuts} == {"sign"}
    assert verdict.reason == "the derivative of sign is zero everywhere it exists"
    assert "differentiable in the gradient" in verdict.remedy
    if name == "Rprop":
        assert verdict.where is not None and verdict.where.short.startswith("rprop.py:")
    else:
        assert blamed(verdict, "the sign")
    assert check(
        loss=learned,
        optimizer=lambda parameters: Descent(parameters, by_gradient, lr=lr),
        val_loss=F.cross_entropy,
    ).ok


def test_a_loss_linear_in_the_weights_has_no_hessian() -> None:
    found = check(nn.Linear(4, 3), loss=lambda p, t: p.mean())
    assert found.ok
    weight = found["weight"]
    assert weight.status == "exists" and weight.IIIb.holds is False
    assert "Hessian is zero" in weight.reason and "∂opt/∂θ" in weight.reason
    curved = check(nn.Linear(4, 3), loss=lambda p, t: p.square().mean())
    assert curved["weight"].IIIb.holds and "the Hessian" in curved["weight"].reason


# --- Requirement III: hyperparameters -----------------------------------------------------------


def decayed_nothing(gradient: Tensor, param: Tensor, lr: Any, decay: Any) -> Tensor:
    return lr * (gradient + decay * torch.zeros_like(param))  # decay times zero


def decayed(gradient: Tensor, param: Tensor, lr: Any, decay: Any) -> Tensor:
    return lr * (gradient + decay * param)


def test_a_hyperparameter_that_multiplies_zero() -> None:
    decay = tensor(0.1)

    def optimizer(direction: Any) -> Callable[[Any], torch.optim.Optimizer]:
        return lambda parameters: Descent(parameters, direction, lr=0.1, decay=decay)

    verdict = check(optimizer=optimizer(decayed_nothing))[decay]
    assert verdict.status == "zero" and verdict.reason == "it is multiplied by zero"
    assert verdict.IIIa.holds is False and blamed(verdict, "decay times zero")
    assert check(optimizer=optimizer(decayed)).ok


def test_steps_that_do_not_use_a_hyperparameter_yet() -> None:
    """RAdam rectifies from the sixth step on; before, the second moments are only kept."""
    beta, eps = tensor(0.99), tensor(1e-8)

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.RAdam(parameters, betas=(0.9, beta), eps=eps)  # type: ignore[arg-type]

    found = check(optimizer=optimizer)
    assert found[beta].status == found[eps].status == "zero"
    assert "optimizer state alone" in found[beta].reason
    assert "a branch that is not taken" in found[eps].reason


def test_a_decay_of_parameters_without_inner_gradient() -> None:
    """Optimizers skip a parameter whose gradient is None, its weight decay with it."""

    class Unread(Net):
        def __init__(self, read: bool) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.ones(3))
            self.read = read

        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return out + self.shift if self.read or not self.training else out

    decay = tensor(0.1)

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        (*_,) = parameters
        shift = next(p for p in parameters if p.shape == (3,) and bool((p == 1).all()))
        others = [p for p in parameters if p is not shift]
        return torch.optim.SGD(
            [{"params": [shift], "weight_decay": decay}, {"params": others}], lr=0.1
        )

    verdict = check(Unread(read=False), optimizer=optimizer)[decay]
    assert verdict.status == "zero" and "parameters without inner gradient" in verdict.reason
    assert check(Unread(read=True), optimizer=optimizer).ok


def clipped(phi: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    return phi.clamp(0.0, 1.0) * F.cross_entropy(prediction, target)  # the clip


def test_a_clip_that_saturates() -> None:
    verdict = check(loss=Learned(clipped, 1.3), val_loss=F.cross_entropy)["loss.phi"]
    assert verdict.status == "zero" and blamed(verdict, "the clip")
    assert verdict.reason == "clamp is flat at the present value 1.3: its derivative is zero there"
    assert "inside the bounds" in verdict.remedy
    repaired = check(loss=Learned(clipped, 0.5), val_loss=F.cross_entropy)
    assert repaired.ok and str(repaired["loss.phi"].IIIb) == "holds almost everywhere"
    assert [kink.at for kink in repaired["loss.phi"].kinks] == ["its bounds"]


def rooted(phi: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    return phi.sqrt() * F.cross_entropy(prediction, target)  # the root


def test_a_root_at_zero_is_undefined() -> None:
    verdict = check(loss=Learned(rooted, 0.0), val_loss=F.cross_entropy)["loss.phi"]
    assert verdict.status == "undefined" and blamed(verdict, "the root")
    assert "no finite derivative at the present value 0" in verdict.reason
    assert check(loss=Learned(rooted, 0.5), val_loss=F.cross_entropy).ok


SCALE = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)


def read(prediction: Tensor, target: Tensor) -> Tensor:
    return float(SCALE) * F.cross_entropy(prediction, target)  # the float


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")
def test_a_closure_tensor_that_python_reads() -> None:
    verdict = check(loss=read, val_loss=F.cross_entropy, meta=[SCALE])[SCALE]
    assert verdict.status == "undefined" and blamed(verdict, "the float")
    assert "Python number" in verdict.reason
    assert check(loss=lambda p, t: SCALE * F.cross_entropy(p, t), val_loss=F.cross_entropy).ok


class Counted(nn.Module):
    """A loss with an integer parameter."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        count = torch.tensor(2, dtype=dtype)
        self.count = nn.Parameter(count, requires_grad=dtype.is_floating_point)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction, target) * self.count


def test_integer_meta_parameters() -> None:
    found = check(loss=Counted(torch.int64), meta=["loss.count"])
    verdict = found["loss.count"]
    assert verdict.status == "undefined" and verdict.IIIa.holds is False
    assert verdict.reason == "it is int64: integers and truth values have no derivative"
    assert "floating-point" in verdict.remedy
    assert check(loss=Counted(torch.float64), meta=["loss.count"]).ok


# --- Requirement III(b): what acts through the inner gradient ------------------------------------


def weighted(phi: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    return phi * F.cross_entropy(prediction, target)


def divided_out(phi: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    losses = phi * F.cross_entropy(prediction, target, reduction="none")
    return (losses * losses / losses.norm()).sum() / losses.sum()  # divided out


def by_a_constant(phi: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    losses = phi * F.cross_entropy(prediction, target, reduction="none")
    return (losses * losses / losses.norm()).sum() / losses.sum().detach()


def test_a_scale_that_is_normalised_away() -> None:
    verdict = check(loss=Learned(divided_out), val_loss=F.cross_entropy)["loss.phi"]
    assert verdict.status == "zero" and blamed(verdict, "divided out")
    assert "the scale is divided out again" in verdict.reason
    # A stopped normaliser counts as a constant, so the scale has a derivative.
    assert check(loss=Learned(by_a_constant), val_loss=F.cross_entropy).ok
    assert check(loss=Learned(weighted), val_loss=F.cross_entropy).ok


def ignoring(phi: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    return phi.square() + 0.0 * target.sum()  # without the prediction


def test_a_learned_loss_that_ignores_the_prediction() -> None:
    found = check(loss=Learned(ignoring), val_loss=F.cross_entropy)
    verdict = found["loss.phi"]
    assert verdict.status == "zero" and blamed(verdict, "without the prediction")
    assert "does not depend on the weights" in verdict.reason
    assert found.II.holds is False
    assert found.II.reason == "the inner loss does not use the fast weights"
    assert found.idle and not found.ok
    # θ_T is θ_0 then: its gradient exists, through the identity.
    assert found["first.weight"].status == "exists"
    assert check(loss=Learned(weighted), val_loss=F.cross_entropy).ok


def test_a_term_that_only_adds() -> None:
    added = Learned(lambda phi, p, t: F.cross_entropy(p, t) + phi.square())
    found = check(loss=added, val_loss=F.cross_entropy)
    assert found["loss.phi"].status == "zero" and found.II.holds
    assert "does not depend on the weights" in found["loss.phi"].reason


def cut(x: Tensor) -> Tensor:
    return torch.tanh(x.detach())  # detach in the model


def frozen(x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.tanh(x)  # no_grad in the model


@pytest.mark.parametrize(
    ("between", "marker"), [(cut, "detach in the model"), (frozen, "no_grad in the model")]
)
def test_a_stop_in_the_model(between: Any, marker: str) -> None:
    found = check(Net(between))
    assert found["second.weight"].status == "exists"
    for label in ("first.weight", "first.bias"):
        verdict = found[label]
        assert verdict.status == "zero" and blamed(verdict, marker)
        assert verdict.reason == "detach() or no_grad stops the gradient"
        assert [c.op for c in verdict.cuts] == ["detach"]
        assert "remove the detach() or no_grad" in verdict.remedy
    assert check(Net(torch.tanh)).ok


def stop_in_loss(phi: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    return phi.detach() * F.cross_entropy(prediction, target)  # detach in the loss


def test_a_stop_in_the_loss() -> None:
    verdict = check(loss=Learned(stop_in_loss), val_loss=F.cross_entropy)["loss.phi"]
    assert verdict.status == "zero" and blamed(verdict, "detach in the loss")
    assert verdict.IIIb.holds is False
    assert check(loss=Learned(weighted), val_loss=F.cross_entropy).ok


class Extra(Net):
    """A parameter that training does not read and validation does, or neither."""

    def __init__(self, validated: bool) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.ones(3))
        self.validated = validated

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_a_parameter_without_inner_gradient() -> None:
    model = Extra(validated=True)

    def with_extra(net: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(net(batch[0]) + net.extra, batch[1])

    found = check(model, val_loss=unrollc.objective(with_extra))
    verdict = found["extra"]
    assert verdict.status == "exists" and verdict.IIIb.holds is False
    assert "∂opt/∂θ" in verdict.reason
    unused = check(Extra(validated=False))["extra"]
    assert unused.status == "zero"
    assert unused.reason == "neither the inner steps nor the validation loss depend on it"


def test_two_cuts_in_parallel_are_both_named() -> None:
    def twice(phi: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
        low = phi.floor()  # first of two
        high = (phi > 1.0).double()  # second of two
        return (low + high + 1.0) * F.cross_entropy(prediction, target)

    verdict = check(loss=Learned(twice), val_loss=F.cross_entropy)["loss.phi"]
    assert [c.op for c in verdict.cuts] == ["floor", "gt"]
    lines = [c.where.short for c in verdict.cuts if c.where]
    assert lines == [line_of("first of two"), line_of("second of two")]


# --- what the hostile user tries ----------------------------------------------------------------


class Normed(nn.Module):
    """BatchNorm, in training mode while it trains, with its statistics in validation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x))


def by_statistics(net: Any, batch: Any) -> Tensor:
    norm = net.norm
    x = F.batch_norm(batch[0], norm.running_mean, norm.running_var, norm.weight, norm.bias)  # stats
    return F.cross_entropy(net.out(x), batch[1])


def test_declared_stops_are_listed() -> None:
    found = check(Normed(), val_loss=unrollc.objective(by_statistics))
    (stop,) = found.stops
    assert stop.reason == "running statistics are constants to autograd"
    assert stop.where is not None and stop.where.short == line_of("stats")
    assert "stop: running statistics" in str(found)
    assert not check(Normed()).stops
    learned = Learned(lambda phi, p, t: phi * F.cross_entropy(p, t) / p.detach().norm())
    (stop,) = check(loss=learned, val_loss=F.cross_entropy).stops
    assert stop.op == "detach"


def test_padding_rows_are_listed() -> None:
    model = nn.Sequential(nn.Embedding(7, 4, padding_idx=0), nn.Flatten(), nn.Linear(8, 3))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    words = (torch.randint(7, (T, 5, 2)), torch.randint(3, (T, 5)))
    found = unrollc.check(model, opt, F.cross_entropy, words, (words[0][0], words[1][0]))
    assert [stop.reason for stop in found.stops] == ["the padding row gets no gradient"]


def test_a_guard_at_exactly_zero() -> None:
    """``if decay > 0`` hides the term as ``!= 0`` does; state that the branch brings is welcome."""
    decay, momentum = tensor(0.0), tensor(0.0)

    class Guarded(Descent):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for param in group["params"]:
                    direction = param.grad
                    if group["decay"] > 0:
                        direction = direction + group["decay"] * param
                    param.sub_(0.1 * direction)

    assert check(optimizer=lambda p: Guarded(p, by_gradient, decay=decay))[decay].status == "exists"
    found = check(optimizer=lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=momentum))  # type: ignore[arg-type]
    assert found[momentum].status == "exists"


def test_a_guard_at_zero_that_switches_another_hyperparameter_on() -> None:
    """Without momentum dampening does nothing; with any, it acts at once: a jump."""
    momentum, decay = tensor(0.0), tensor(0.0)

    def damped(dampening: Any) -> Callable[[Any], torch.optim.Optimizer]:
        def build(p: Any) -> torch.optim.Optimizer:
            opt = torch.optim.SGD(p, lr=0.1, dampening=0.5)
            opt.param_groups[0].update(momentum=momentum, dampening=dampening, weight_decay=decay)
            return opt

        return build

    found = check(optimizer=damped(0.5))
    assert found[momentum].status == "undefined" and "exactly zero" in found[momentum].reason
    assert "away from 0" in found[momentum].remedy
    assert found[decay].status == "exists"
    assert check(optimizer=damped(0.0))[momentum].status == "exists"
    # A tensor may have another value at the next call, and momentum then jumps.
    assert check(optimizer=damped(torch.tensor(0.0)))[momentum].status == "undefined"


def test_a_kink_at_the_present_value_is_undefined() -> None:
    def bend(phi: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
        return F.relu(phi) * F.cross_entropy(prediction, target)  # the bend

    verdict = check(loss=Learned(bend, 0.0), val_loss=F.cross_entropy)["loss.phi"]
    assert verdict.status == "undefined" and blamed(verdict, "the bend")
    assert verdict.reason == "relu has a kink at the present value 0"
    flat = check(loss=Learned(bend, -1.0), val_loss=F.cross_entropy)["loss.phi"]
    assert flat.status == "zero" and "flat at the present value -1" in flat.reason
    assert check(loss=Learned(bend, 1.0), val_loss=F.cross_entropy).ok


def test_kinks_of_the_inner_loss_concern_what_acts_through_later_steps() -> None:
    lr = tensor(0.1)
    found = check(
        loss=lambda p, t: p.abs().mean(),
        optimizer=lambda p: torch.optim.SGD(p, lr=lr),
        val_loss=lambda p, t: p.square().mean(),
    )
    assert [kink.op for kink in found[lr].kinks] == ["abs"]


def test_a_comparison_that_multiplies_is_listed() -> None:
    lr = tensor(0.1)
    found = check(
        optimizer=lambda p: torch.optim.SGD(p, lr=lr),
        val_loss=lambda p, t: (p * (p > 0.3)).mean(),
    )
    assert [(kink.op, kink.at) for kink in found[lr].kinks] == [("gt", "equality, where it jumps")]


MARGIN = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)


def hinged(prediction: Tensor, target: Tensor) -> Tensor:
    return F.relu(MARGIN - prediction).mean()  # the hinge


def test_a_margin_moves_only_the_kink() -> None:
    """The mixed derivative is zero almost everywhere, though the loss depends on both."""
    verdict = check(loss=hinged, val_loss=F.cross_entropy, meta=[MARGIN])[MARGIN]
    assert verdict.status == "zero" and blamed(verdict, "the hinge")
    assert [cut.op for cut in verdict.cuts] == ["threshold_backward"]
    assert [kink.op for kink in verdict.kinks] == ["relu"]


def test_a_flat_path_into_lval_is_blamed_on_itself() -> None:
    def clamped(prediction: Tensor, target: Tensor) -> Tensor:
        return SCALE.clamp(0.0, 1.0) * target.double().mean()  # the clamp

    verdict = check(val_loss=clamped, meta=[SCALE])[SCALE]
    assert verdict.status == "zero" and blamed(verdict, "the clamp")


def test_one_hot_targets() -> None:
    found = check(loss=lambda p, t: (p - F.one_hot(t, 3)).square().mean())
    assert found.ok


def test_adamw_alone() -> None:
    """Its step is Adam's; nothing else may have to be imported or made before."""
    assert check(optimizer=lambda p: torch.optim.AdamW(p, lr=0.01)).ok


# --- how it prints ------------------------------------------------------------------------------


def test_a_row_for_each_parameter_and_each_requirement() -> None:
    lr = tensor(0.1)
    found = check(
        Net(bent),
        loss=Learned(stop_in_loss),
        optimizer=lambda p: torch.optim.SGD(p, lr=lr),
        val_loss=F.cross_entropy,
    )
    text = str(found)
    for words in ("I: Lval", "II: opt", "IIIa: opt", "IIIb: G", "a.e.: holds", "exists", "zero"):
        assert words in text
    assert max(map(len, text.splitlines())) <= 110
    data = found.to_dict()["loss.phi"]
    assert data["cuts"][0]["op"] == "detach"
    assert data["IIIb"]["verdict"] == "fails"
    assert data["I"]["kinks"][0] == {
        "op": "relu",
        "reason": "0",
        "where": str(found["loss.phi"].I.kinks[0].where),
    }


def test_what_a_convolution_hands_on_depends_on_what_is_asked_of_it() -> None:
    """A first layer asks for no gradient of its input; that must not stand for later layers."""
    scale = tensor(1.3)

    def scaled(prediction: Tensor, target: Tensor) -> Tensor:
        return scale * F.cross_entropy(prediction, target)

    def status(*layers: nn.Module) -> str:
        net = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), *layers, nn.Flatten(), nn.LazyLinear(3))
        net(torch.zeros(1, 4))
        for parameter in net.parameters():
            parameter.requires_grad_(parameter is layers[0].weight)
        found = check(
            net,
            loss=scaled,
            optimizer=lambda _: torch.optim.SGD([layers[0].weight], lr=0.1),
            val_loss=F.cross_entropy,
        )
        return found[scale].status

    _KNOWN.clear()
    assert status(nn.Conv2d(1, 2, 1)) == "exists"
    assert status(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1)) == "exists"


class Tested(Descent):
    """A step that asks about a hyperparameter where its branches do not meet smoothly."""

    test: Callable[[Any], Any]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            factor = group["factor"]
            for param in group["params"]:
                direction = param.grad * (1 + 0.1 * factor)
                if self.test(factor):
                    direction = direction + (factor - factor.detach().round()) * param
                param.sub_(0.1 * direction)


@pytest.mark.parametrize(
    ("value", "test", "status"),
    [
        (0.0, lambda h: abs(h) > 0, "undefined"),
        (1.0, lambda h: h != 1, "undefined"),
        (1.0, lambda h: h < 1, "undefined"),
        (1.0, lambda h: h >= torch.tensor(1.0), "undefined"),
        (1.5, lambda h: h != 1, "exists"),
        (0.0, lambda h: h < 0, "exists"),  # asks whether h is in bounds
        (0.0, lambda h: h != 0, "exists"),  # both branches are captured
    ],
)
def test_a_value_on_the_boundary_of_a_test_is_undefined(
    value: float, test: Callable[[Any], Any], status: str
) -> None:
    factor = tensor(value)
    kind = type("Tested", (Tested,), {"test": staticmethod(test)})
    found = check(optimizer=lambda p: kind(p, by_gradient, factor=factor))[factor]
    assert found.status == status
    assert status == "exists" or ("boundary" in found.reason and "if self.test" in str(found.where))
