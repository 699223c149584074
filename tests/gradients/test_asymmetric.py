"""Models whose inner gradient is not the gradient of a scalar: mixed mode would be wrong.

The oracle is eager double backward, whose conventions they are: a stop-gradient is a constant in
every order of differentiation, and a custom backward is the truth about its function.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unrollc
from tests.gradients.programs import assert_equals_eager
from tests.oracles import eager, finite, ordinary
from tests.oracles.compare import assert_close
from tests.oracles.models import CLASSES, MLP
from tests.oracles.objectives import Loss, unstack

pytestmark = pytest.mark.usefixtures("float64")

T = 4


def check(model: nn.Module, inputs: Tensor, loss: Loss = F.cross_entropy) -> None:
    target = torch.randint(CLASSES, (T, inputs.shape[1]))
    opt = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5, weight_decay=0.1)
    batches = unstack((inputs, target))
    expected = eager.unroll(model, opt, loss, batches, batches[0])
    result = unrollc.compile(model, opt, loss)((inputs, target), batches[0])
    meta = {name: param for name, param in model.named_parameters() if param.requires_grad}
    assert_equals_eager(result, expected, meta)


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4, padding_idx=2)
        nn.init.normal_(self.table.weight)
        self.output = nn.Linear(4, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(torch.tanh(self.table(tokens).sum(1)))


class PaddedAndTied(Padded):
    """The masked row is also read outside the embedding, so it has a gradient of its own."""

    def forward(self, tokens: Tensor) -> Tensor:
        shift = (self.table.weight[2] * self.table.weight[1]).sum()
        return super().forward(tokens) + shift * torch.arange(CLASSES)


@pytest.mark.parametrize("build", [Padded, PaddedAndTied])
def test_padding_idx(build: type[nn.Module]) -> None:
    check(build(), torch.randint(6, (T, 5, 3)))


def test_padding_idx_by_differences() -> None:
    """Every row but the padding row has its true meta-gradient. At the padding row the mask says
    zero by convention, though ordinary training does depend on it through the other rows."""
    model, inputs = Padded(), torch.randint(6, (T, 5, 3))
    target = torch.randint(CLASSES, (T, 5))
    opt = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
    batches = unstack((inputs, target))
    result = unrollc.compile(model, opt, F.cross_entropy)((inputs, target), batches[0])
    (gradient,) = torch.autograd.grad(result.loss, [model.table.weight])
    assert not gradient[2].any()

    def loss() -> Tensor:
        trained = ordinary.train(model, opt, F.cross_entropy, batches, batches[0])
        assert trained.loss is not None
        return trained.loss

    direction = torch.randn(6, 4)
    at_padding = torch.zeros(6, 4)
    at_padding[2] = direction[2]
    direction[2] = 0
    estimate = finite.directional_derivative(loss, model.table.weight, direction, step=2e-3)
    assert abs((gradient * direction).sum() - estimate.value) < 1e-8
    masked = finite.directional_derivative(loss, model.table.weight, at_padding, step=2e-3)
    assert abs(masked.value) > 1e-4


def test_detach_in_the_loss() -> None:
    def distilled(prediction: Tensor, target: Tensor) -> Tensor:
        teacher = prediction.detach().roll(1, 0).softmax(-1)
        return F.cross_entropy(prediction, target) + F.cross_entropy(2 * prediction, teacher)

    check(MLP(), torch.randn(T, 5, 4), distilled)


class Function(nn.Module):
    """An MLP with a function of the hidden layer between its layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 6)
        self.output = nn.Linear(6, CLASSES)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.function(torch.tanh(self.hidden(x))))


class Detached(Function):
    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.hidden(x))
        return self.output(hidden * hidden.detach().flip(1))


def test_detach_in_the_model() -> None:
    check(Detached(nn.Identity()), torch.randn(T, 5, 4))


def test_a_straight_through_estimator_by_detach() -> None:
    def rounded(x: Tensor) -> Tensor:
        return x + ((x * 4).round() / 4 - x).detach()

    check(Function(rounded), torch.randn(T, 5, 4))


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class ScaledGradient(torch.autograd.Function):
    """The identity, whose backward depends on the input in a way that is no derivative."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * x.flip(1).exp()


@pytest.mark.parametrize("function", [StraightThrough, ScaledGradient])
def test_a_custom_function(function: type[torch.autograd.Function]) -> None:
    check(Function(function.apply), torch.randn(T, 5, 4))


def test_a_gradient_hook() -> None:
    """A hook edits the inner gradient, and the meta-gradient is that of the loop that runs.

    Eager double backward would run the hook on the outer cotangents as well, which is the
    derivative of nothing; finite differences of the loop are the oracle here.
    """

    def scaled(x: Tensor) -> Tensor:
        x = x * 1.0
        if x.requires_grad:
            x.register_hook(lambda grad: grad * 0.5 + grad**3)
        return x

    model = Function(scaled)
    inputs = torch.randn(T, 5, 4)
    target = torch.randint(CLASSES, (T, 5))
    opt = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5, weight_decay=0.1)
    program = unrollc.compile(model, opt, F.cross_entropy)
    val = (inputs[0], target[0])
    result = program((inputs, target), val)
    weight = model.hidden.weight
    trained = ordinary.train(model, opt, F.cross_entropy, unstack((inputs, target)))
    assert_close(result.params, trained.params, rtol=1e-12)
    (found,) = torch.autograd.grad(result.loss, [weight])

    def loss() -> Tensor:
        with torch.no_grad():
            return program((inputs, target), val).loss

    finite.assert_gradient(loss, weight, found)
