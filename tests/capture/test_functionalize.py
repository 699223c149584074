"""In-place writes to tensors from outside, and to values that share memory with a parameter."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unrollc
from tests.oracles import eager
from tests.oracles.compare import assert_close
from tests.oracles.objectives import Objective

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 3


def compare(model: nn.Module, fn: object) -> None:
    """Three steps against eager double backward."""
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    train, val = torch.randn(STEPS, 2, 3), torch.randn(2, 3)
    program = unrollc.compile(model, opt, unrollc.objective(fn))  # type: ignore[arg-type]
    result = program(list(train), val)
    names, tensors = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(result.loss, tensors)
    unrolled = eager.unroll(model, opt, Objective(fn), list(train), val)  # type: ignore[arg-type]
    wanted = unrolled.gradients(tensors)
    assert_close(
        {"loss": result.loss.detach(), **dict(zip(names, found, strict=True))},
        {"loss": unrolled.loss.detach(), **dict(zip(names, wanted, strict=True))},
    )


def test_a_mask_from_outside_becomes_an_additive_one_in_place() -> None:
    mask = torch.tensor([False, True, False])

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        added = torch.zeros_like(mask, dtype=x.dtype).masked_fill_(mask, -torch.inf)
        return (F.softmax(model(x) + added, -1)[:, 0] ** 2).sum()

    compare(nn.Linear(3, 3), loss)


def test_a_tensor_from_outside_is_not_changed_in_place() -> None:
    seen = torch.zeros(())
    model = nn.Linear(3, 3)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        seen.add_(1)  # the write
        return model(x).square().sum() * seen

    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    program = unrollc.compile(model, opt, unrollc.objective(loss))
    with pytest.raises(unrollc.CaptureError, match="would mutate a captured Tensor") as caught:
        program(list(torch.randn(STEPS, 2, 3)), torch.randn(2, 3))
    assert caught.value.where is not None and caught.value.where.text.endswith("# the write")
    assert seen == 0


COUNT = torch.zeros(())


class Counting(torch.optim.SGD):
    """Counts its steps in a tensor of its module, which no step hands to the next."""

    def __init__(self, parameters: Iterable[nn.Parameter], used: bool) -> None:
        super().__init__(parameters, lr=0.1)
        self._used = used

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        COUNT.add_(1)  # the write
        for parameter in self.param_groups[0]["params"]:
            rate = 0.1 / COUNT if self._used else 0.1
            parameter.sub_(rate * parameter.grad)


def test_a_tensor_from_outside_an_optimizer_is_not_changed_in_place() -> None:
    model = nn.Linear(3, 3)
    data = list(torch.randn(STEPS, 2, 3)), torch.randn(2, 3)
    loss = unrollc.objective(lambda model, x: model(x).square().sum())
    opt = Counting(model.parameters(), used=True)
    with pytest.raises(unrollc.CaptureError, match="changes a tensor from outside") as caught:
        unrollc.compile(model, opt, loss)(*data)
    assert caught.value.where is not None and caught.value.where.text.endswith("# the write")
    unused = Counting(model.parameters(), used=False)
    unrollc.compile(model, unused, loss)(*data)
    assert COUNT == 0


def clipped(model: nn.Module, x: Tensor) -> Tensor:
    """As an embedding with ``max_norm`` does: the values change, the history does not."""
    with torch.no_grad():
        model.weight.detach().clamp_(-0.3, 0.3)
    return (model(x) ** 2).sum()


def doubled(model: nn.Module, x: Tensor) -> Tensor:
    hidden = model(x)
    shared = hidden.detach()
    shared.mul_(2)
    return (hidden.exp() * shared).sum()


@pytest.mark.parametrize("fn", [clipped, doubled])
def test_what_is_written_behind_autograd_keeps_its_derivative(fn: object) -> None:
    compare(nn.Linear(3, 3), fn)


def test_a_weight_that_its_forward_changes_is_what_the_update_starts_from() -> None:
    """One step with rate 0: θ_1 is the clipped θ_0, and its derivative is the identity."""
    model = nn.Linear(3, 3)
    opt = torch.optim.SGD(model.parameters(), lr=0.0)
    program = unrollc.compile(model, opt, unrollc.objective(clipped))
    result = program(list(torch.randn(1, 2, 3)), torch.randn(2, 3))
    assert torch.equal(result.params["weight"], model.weight.detach().clamp(-0.3, 0.3))
