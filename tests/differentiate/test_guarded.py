"""Norms, roots and selections at zero: what a selection drops contributes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unrollc
from tests.differentiate.steps import captured, pulled_back
from tests.gradients.programs import gradients
from tests.oracles import ordinary
from tests.oracles.compare import assert_close
from unrollc.differentiate import reverse
from unrollc.differentiate.mixed import mixed_adjoint
from unrollc.differentiate.reverse import reverse_adjoint

pytestmark = pytest.mark.usefixtures("float64")

LR = 0.1


def linear(prediction: Tensor, target: Tensor) -> Tensor:
    return prediction


class Weights(nn.Module):
    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(start)

    def forward(self, x: Tensor) -> Tensor:
        return (self.w * x).sum()


class Rows(nn.Module):
    """Weights with two rows of zeros, read by a function; every term has a Hessian."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3))
        self.scale = nn.Parameter(torch.randn(()))
        self.function = function
        with torch.no_grad():
            self.w[:2] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.function(self.w) + (x * self.w).sum() ** 2


def safe_root(w: Tensor) -> Tensor:
    kept = w.abs() > 0
    return torch.where(kept, torch.where(kept, w.abs(), 1.0).sqrt(), 0.0).sum()


def distance(w: Tensor) -> Tensor:
    return F.pairwise_distance(w, torch.zeros(4, 3), eps=0.0).sum()


#: Functions of rows whose gradient in eager PyTorch is finite at zero rows, with the reason why
#: nothing flows there: PyTorch's formula (or the user's `where`) drops the zero rows.
DROPPED: dict[str, Callable[[Tensor], Tensor]] = {
    "vector norm": lambda w: torch.linalg.vector_norm(w[0]),
    "norm of rows": lambda w: torch.linalg.vector_norm(w, dim=1).sum(),
    "squared norms of rows": lambda w: w.norm(dim=1).square().sum(),
    "third norm of rows": lambda w: w.norm(3, dim=1).sum(),
    "pairwise distance": distance,
    "standard deviation": lambda w: w.std(1).sum(),
    "safe root": safe_root,
}


#: The same functions of the rows that are not zero.
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: lambda w, function=function: function(w[2:]) for name, function in DROPPED.items()},
    "vector norm": lambda w: 0.0 * w.sum(),
    "pairwise distance": lambda w: w[2:].norm(dim=1).sum(),
    "safe root": lambda w: w[2:].abs().sqrt().sum(),
}


@pytest.mark.parametrize("name", DROPPED)
def test_a_dropped_branch_contributes_zero(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hessian is that of the other rows alone, in both modes; PyTorch's is NaN."""
    model = Rows(DROPPED[name])
    x = torch.randn(4, 3)
    opt = torch.optim.SGD([model.w], lr=LR)
    step = captured(model, opt, linear, (x, torch.zeros(())))
    given = {"w": model.w.detach(), "scale": model.scale.detach(), "train.inputs": x}
    found = pulled_back(step, given, reverse_adjoint)
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert_close(pulled_back(step, given, mixed_adjoint), found, rtol=1e-13)
    model.function = OTHERS[name]
    other = captured(model, opt, linear, (x, torch.zeros(())))
    assert_close(found, pulled_back(other, given, reverse_adjoint), rtol=1e-12)
    # The broken twin: the same without guards.
    monkeypatch.setattr(reverse, "guards_of", lambda step: {})
    plain = pulled_back(step, given, reverse_adjoint)
    assert name == "safe root" or any(tensor.isnan().any() for tensor in plain.values())


@pytest.mark.parametrize(
    "function",
    [
        lambda w: (F.normalize(w, dim=1) * torch.arange(3.0)).sum(),
        lambda w: F.cosine_similarity(w, torch.ones(4, 3)).sum(),
    ],
    ids=["normalize", "cosine similarity"],
)
def test_scaling_by_a_norm_at_zero(function: Callable[[Tensor], Tensor]) -> None:
    """Both divide by max(‖w‖, eps): linear around zero, at a slope of 1/eps."""
    model = Rows(function)
    x, zero = torch.randn(4, 3), torch.zeros(())
    opt = torch.optim.SGD([model.w], lr=1e-9)
    program = unrollc.compile(model, opt, linear)
    found = gradients(
        program(unrollc.repeat((x, zero), 2), (x, zero)).loss, {"w": model.w, "s": model.scale}
    )
    assert all(gradient.isfinite().all() for gradient in found.values())


@pytest.mark.parametrize(
    "function",
    [
        lambda w: (w**2).sum(1).sqrt().sum(),
        lambda w: torch.where(w.abs() > 0, w.abs().sqrt(), 0.0).sum(),
        lambda w: torch.hypot(w[:, 0], w[:, 1]).sum(),
    ],
    ids=["root of squares", "unsafe where", "hypot"],
)
def test_training_that_is_nan_stays_nan(function: Callable[[Tensor], Tensor]) -> None:
    """θ_T is what ordinary training gives, entry for entry."""
    model = Rows(function)
    opt = torch.optim.SGD([model.w], lr=LR)
    batch = (torch.randn(4, 3), torch.zeros(()))
    trained = ordinary.train(model, opt, linear, [batch]).params["w"]
    with torch.no_grad():
        result = unrollc.compile(model, opt, linear)(unrollc.repeat(batch, 1), batch)
    assert torch.equal(result.params["w"].isnan(), trained.isnan())
    assert trained.isnan().any()


def test_a_kept_entry_is_not_cut() -> None:
    """``where`` keeps the root at zero, where 0 · ∞ stands for one: no zero is made up."""
    model = Weights(torch.ones(3))
    opt = torch.optim.SGD(model.parameters(), lr=LR)
    x = torch.tensor([0.0, 0.4, -0.3], requires_grad=True)

    def outer(bound: Callable[[Tensor], Tensor]) -> Tensor:
        def value(prediction: Tensor, x: Tensor) -> Tensor:
            return prediction + torch.where(bound(x), x.sqrt() ** 2, 0.0).sum()

        program = unrollc.compile(model, opt, lambda p, t: p**2, val_loss=value, meta=[x])
        ones = torch.ones(3)
        (found,) = torch.autograd.grad(program([(ones, ones)], (ones, x)).loss, [x])
        return found

    kept, cut = outer(lambda x: x >= 0), outer(lambda x: x > 0)
    assert kept[0].isnan() and cut[0] == 0
    assert torch.allclose(kept[1:], torch.tensor([1.0, 0.0])) and torch.equal(kept[1:], cut[1:])
