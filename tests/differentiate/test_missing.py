"""Ops without a derivative: decomposed where PyTorch can, otherwise an error at the user's line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import unrollc
from tests.oracles import finite, ordinary

pytestmark = pytest.mark.usefixtures("float64")

aten = torch.ops.aten


def distances(x: Tensor) -> Tensor:
    return aten.cdist(x, x + 1).sum()  # the op


def margins(x: Tensor) -> Tensor:
    return aten.multi_margin_loss(x, torch.tensor([0, 1]))  # the op


@pytest.mark.parametrize(
    ("op", "name"),
    [(distances, "_cdist_backward"), (margins, "multi_margin_loss_backward")],
)
def test_an_op_without_a_derivative_is_named_with_its_line(
    op: Callable[[Tensor], Tensor], name: str
) -> None:
    model = nn.Linear(3, 3)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    program = unrollc.compile(model, opt, unrollc.objective(lambda model, x: op(model(x))))
    with pytest.raises(unrollc.CaptureError, match=f"{name} has no derivative") as caught:
        program(list(torch.randn(2, 2, 3)), torch.randn(2, 3))
    assert caught.value.where is not None
    assert caught.value.where.text.endswith("# the op")


def test_an_op_with_a_decomposition_is_differentiated_by_it() -> None:
    """The derivative of hardsigmoid has no formula in PyTorch, only a decomposition."""
    model = nn.Linear(3, 3)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = unrollc.objective(lambda model, x: nn.functional.hardsigmoid(model(x)).square().sum())
    train, val = torch.randn(2, 2, 3), torch.randn(2, 3)
    result = unrollc.compile(model, opt, loss)(list(train), val)
    (found,) = torch.autograd.grad(result.loss, [model.weight])

    def final() -> Tensor:
        trained = ordinary.train(model, opt, ordinary.Objective(loss.fn), list(train), val)
        assert trained.loss is not None
        return trained.loss

    finite.assert_gradient(final, model.weight, found, step=2e-3)
