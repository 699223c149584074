"""A meta-loop written by hand with the interface of a generated program.

Least squares by SGD with momentum, with dropout on the inputs. φ is a learning rate a step and one
momentum. State: weights [8], velocity [8], the number of steps done (an int64 scalar).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

STEPS = 60
STOP = 0
SEGMENT = 7
LOSS_DTYPE = torch.float64


def make_inputs(steps: int = STEPS) -> dict[str, Any]:
    """Tensors by label, the same at every call."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return {
        "weights": normal(8),
        "lr": 0.01 + 0.02 * torch.rand(steps, dtype=torch.float64, generator=generator),
        "momentum": torch.tensor(0.7, dtype=torch.float64),
        "x": normal(steps, 5, 8),
        "y": normal(steps, 5),
        "val.x": normal(9, 8),
        "val.y": normal(9),
    }


def start(inputs: dict[str, Any]) -> list[Tensor]:
    weights = inputs["weights"]
    return [weights, torch.zeros_like(weights), torch.zeros((), dtype=torch.int64)]


def _batch(inputs: dict[str, Any], seed: int, j: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed * 1000003 + j)
    mask = torch.bernoulli(torch.full((8,), 0.8, dtype=torch.float64), generator=generator)
    return inputs["x"][j] * mask, inputs["y"][j]


def _step(
    inputs: dict[str, Any], seed: int, j: int, state: list[Tensor]
) -> tuple[list[Tensor], Tensor]:
    weights, velocity, count = state
    x, y = _batch(inputs, seed, j)
    error = x @ weights - y
    velocity = inputs["momentum"] * velocity + x.T @ error
    weights = weights - inputs["lr"][j] * velocity
    return [weights, velocity, count + 1], error.square().sum() / 2


def forward(
    inputs: dict[str, Any],
    seed: int,
    state: list[Tensor],
    losses: Tensor,
    kept: dict[int, list[Tensor]],
    keep: Any,
    first: int,
    last: int,
) -> list[Tensor]:
    for j in range(first, last):
        if j in keep:
            kept[j] = list(state)
        given = list(state)
        state.clear()  # it is taken over
        state, losses[j] = _step(inputs, seed, j, given)
    return state


def finish(
    inputs: dict[str, Any], seed: int, state: list[Tensor]
) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
    weights = state[0]
    state.clear()
    error = inputs["val.x"] @ weights - inputs["val.y"]
    cotangents = [inputs["val.x"].T @ error, torch.zeros_like(weights)]
    totals = {
        "lr": torch.zeros_like(inputs["lr"]),
        "momentum": torch.zeros_like(inputs["momentum"]),
        "y": [None] * STEPS,
    }
    return error.square().sum() / 2, cotangents, totals


def reverse(
    inputs: dict[str, Any],
    seed: int,
    kept: dict[int, list[Tensor]],
    first: int,
    last: int,
    cotangents: list[Tensor],
    totals: dict[str, Any],
) -> list[Tensor]:
    states = [kept.pop(first)]
    assert int(states[0][2]) == first
    for j in range(first, last - 1):
        states.append(_step(inputs, seed, j, states[-1])[0])
    for j in reversed(range(first, last)):
        x, _ = _batch(inputs, seed, j)
        given = states.pop()
        moved = _step(inputs, seed, j, given)[0][1]
        for_weights, for_velocity = cotangents
        cotangents.clear()
        through = for_velocity - inputs["lr"][j] * for_weights
        totals["lr"][j] = -(for_weights @ moved)
        totals["momentum"] += through @ given[1]
        totals["y"][j] = -(x @ through)
        cotangents = [for_weights + x.T @ (x @ through), inputs["momentum"] * through]
    return cotangents


def gradients(cotangents: list[Tensor], totals: dict[str, Any]) -> dict[str, Any]:
    if STOP == 0:
        totals["weights"] = cotangents[0]
    return totals
