"""A hand-written inner loop of momentum SGD with what surrounds its update.

Everything is on one autograd graph: learning rates that a schedule yields, a transform of the
gradients, what happens to the weights before and after the update, and an average of the weights.
Nothing in it comes from the package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.oracles.compare import assert_close, relative_error

T = 3
Weights = list[Tensor]


def task(seed: int = 0) -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A small classifier in float64, T stacked batches and a validation batch."""
    generator = torch.Generator().manual_seed(seed)

    def batch(*shape: int) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(*shape, 3, generator=generator, dtype=torch.float64)
        return inputs, torch.randint(2, shape, generator=generator)

    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.6)
    return model, batch(T, 5), batch(5)


@dataclass(frozen=True)
class Unrolled:
    """Validation loss, θ_T and the averaged weights, on the graph of the leaves."""

    loss: Tensor
    theta: Weights
    average: Weights


def unroll(
    model: nn.Module,
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    *,
    rates: Sequence[Any],
    momentum: Sequence[Any] | float = 0.0,
    buffers: Weights | None = None,
    transform: Callable[[Weights, Weights], Weights] = lambda theta, gradients: gradients,
    after: Callable[[Weights], Weights] = lambda theta: theta,
    average: Callable[[Tensor, Tensor, int], Tensor] | None = None,
    averaged: tuple[Weights, int] = ([], 0),
) -> Unrolled:
    """Train with ``θ -= rate · m``, ``m = momentum · m + transform(G)``, and validate.

    Args:
        model: Its parameters are the leaves θ_0.
        rates: One learning rate a step.
        momentum: One value, or one a step; the first step has no buffer to multiply unless
            `buffers` brings one.
        transform: From weights and gradients to the gradients that the optimizer sees.
        after: What becomes of the weights after each update.
        average: From averaged weight, weight and number of averaged models to the new average;
            Lval is then that of the averaged weights. The first model is copied.
        averaged: Where the average starts.
    """
    names = [name for name, _ in model.named_parameters()]
    theta: Weights = list(model.parameters())
    mean, count = averaged

    def loss_of(weights: Weights, inputs: Tensor, target: Tensor) -> Tensor:
        prediction = torch.func.functional_call(
            model, dict(zip(names, weights, strict=True)), (inputs,)
        )
        return F.cross_entropy(prediction, target)

    for j, rate in enumerate(rates):
        inner = loss_of(theta, train[0][j], train[1][j])
        gradients = list(torch.autograd.grad(inner, theta, create_graph=True))
        gradients = transform(theta, gradients)
        beta = momentum if isinstance(momentum, float) else momentum[j]
        if buffers is None:
            buffers = gradients
        else:
            buffers = [beta * m + g for m, g in zip(buffers, gradients, strict=True)]
        theta = after([w - rate * m for w, m in zip(theta, buffers, strict=True)])
        if average is not None:
            pairs = zip(mean, theta, strict=True)
            mean = [average(a, w, count) for a, w in pairs] if count else list(theta)
            count += 1
    return Unrolled(loss_of(mean if average else theta, *val), theta, list(mean))


def assert_agrees(result: Any, expected: Unrolled, leaves: dict[str, Tensor]) -> None:
    """Hold a program's loss and meta-gradients against the hand-written loop."""
    assert relative_error(result.loss, expected.loss) < 1e-12
    found = torch.autograd.grad(result.loss, list(leaves.values()), retain_graph=True)
    wanted = torch.autograd.grad(expected.loss, list(leaves.values()))
    assert_close(
        dict(zip(leaves, found, strict=True)), dict(zip(leaves, wanted, strict=True)), rtol=1e-10
    )
