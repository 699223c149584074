"""The symmetry checks on true gradients, and on functions that only look like gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.oracles import cases, finite, symmetry
from tests.oracles.models import MLP
from tests.oracles.symmetry import GradientFunction, asymmetry, mode_gap

pytestmark = pytest.mark.usefixtures("float64")

ROUNDING = 1e-13
DIFFERENCES = 1e-9  # what symmetry.difference_product promises, with room
LARGE = 1e-2


def gradient_of(model: nn.Module, loss: Callable[..., Tensor], name: str) -> GradientFunction:
    def scalar(value: Tensor) -> Tensor:
        return loss(lambda *inputs: torch.func.functional_call(model, {name: value}, inputs))

    return torch.func.grad(scalar)


def classifier() -> tuple[GradientFunction, Tensor]:
    model = MLP()
    inputs, target = (part[0] for part in cases.batches((5, 4), 1, seed=1))
    gradient = gradient_of(model, lambda f: F.cross_entropy(f(inputs), target), "hidden.weight")
    return gradient, model.hidden.weight.detach().clone()


def test_a_true_gradient_is_symmetric() -> None:
    gradient, at = classifier()
    assert asymmetry(gradient, at) < DIFFERENCES
    assert asymmetry(gradient, at, product=symmetry.forward_product) < ROUNDING
    assert asymmetry(gradient, at, product=symmetry.reverse_product) < ROUNDING
    assert mode_gap(gradient, at) < ROUNDING


def test_the_three_products_agree() -> None:
    gradient, at = classifier()
    v = torch.randn_like(at)
    exact = symmetry.forward_product(gradient, at, v)
    found = symmetry.difference_product(gradient, at, v)
    assert (found - exact).norm() < DIFFERENCES * exact.norm()
    u = torch.randn_like(at)
    pulled = symmetry.reverse_product(gradient, at, u)
    finite.assert_gradient(lambda: (u * gradient(at)).sum(), at, pulled)


@pytest.mark.parametrize("padding_idx", [None, 1])
def test_padding_idx_is_caught(padding_idx: int | None) -> None:
    """The gradient's row at ``padding_idx`` is masked, though the loss depends on that row."""
    model = nn.Embedding(4, 3, padding_idx=padding_idx)
    nn.init.normal_(model.weight)
    tokens = torch.tensor([0, 1, 2, 1, 3])
    gradient = gradient_of(model, lambda f: f(tokens).sum(0).tanh().square().sum(), "weight")
    at = model.weight.detach()
    if padding_idx is None:
        assert asymmetry(gradient, at) < DIFFERENCES
        assert mode_gap(gradient, at) < ROUNDING
    else:
        assert asymmetry(gradient, at) > LARGE
        assert mode_gap(gradient, at) > LARGE


def test_detach_is_asymmetric_but_both_modes_stop_there() -> None:
    """Moving θ moves the detached value too, so the true Jacobian is not symmetric. Forward and
    reverse mode both hold it fixed, as eager PyTorch does, and so agree with each other."""
    model, inputs = MLP(), torch.randn(5, 4)

    def loss(f: Callable[[Tensor], Tensor]) -> Tensor:
        prediction = f(inputs)
        return (prediction * prediction.detach().roll(1, 0)).tanh().sum()

    gradient, at = gradient_of(model, loss, "hidden.weight"), model.hidden.weight.detach()
    assert asymmetry(gradient, at) > LARGE
    assert mode_gap(gradient, at) < ROUNDING


class StraightThrough(torch.autograd.Function):
    """A cube whose backward says it is the identity."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class ClippedGradient(torch.autograd.Function):
    """The identity, whose backward clips: not even linear in the cotangent."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.clamp(-0.5, 0.5)

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        return tangent


@pytest.mark.parametrize("function", [StraightThrough.apply, ClippedGradient.apply, None])
def test_custom_functions_are_caught(function: Callable[[Tensor], Tensor] | None) -> None:
    weights = torch.randn(6, 6)

    def scalar(x: Tensor) -> Tensor:
        hidden = x.sin()
        hidden = hidden**3 if function is None else function(hidden)
        return (weights @ hidden).tanh().sum()

    found = asymmetry(torch.func.grad(scalar), torch.randn(6))
    if function is None:
        assert found < DIFFERENCES
    else:
        assert found > LARGE


def test_a_function_whose_formulas_disagree_has_a_mode_gap() -> None:
    weights = torch.randn(6, 6)
    gradient = torch.func.grad(lambda x: (weights @ ClippedGradient.apply(x.sin())).tanh().sum())
    assert mode_gap(gradient, torch.randn(6)) > LARGE


def test_a_gradient_hook_is_caught() -> None:
    weights = torch.randn(6, 6)

    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        hidden = x.sin()
        hidden.register_hook(lambda grad: grad.clamp(-0.5, 0.5))
        return torch.autograd.grad((weights @ hidden).tanh().sum(), x)[0]

    assert asymmetry(gradient, torch.randn(6)) > LARGE
