"""Losses as functions of a model and a batch, which all oracles share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = Any
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """A loss that sees the model and the whole batch: ``fn(model, batch)`` is a scalar."""

    fn: Callable[[nn.Module, Batch], Tensor]


def as_objective(loss: Loss | Objective) -> Objective:
    """``loss(prediction, target)`` as an :class:`Objective` on batches ``(inputs, target)``."""
    if isinstance(loss, Objective):
        return loss

    def supervised(model: nn.Module, batch: Batch) -> Tensor:
        inputs, target = batch
        arguments = inputs if isinstance(inputs, tuple) else (inputs,)
        return loss(model(*arguments), target)

    return Objective(supervised)


def unstack(batches: tuple[Any, Tensor]) -> list[Batch]:
    """A list of T batches from tensors that are stacked on a leading dimension T."""
    inputs, target = batches
    steps = target.shape[0]
    if isinstance(inputs, tuple):
        return [(tuple(part[j] for part in inputs), target[j]) for j in range(steps)]
    return [(inputs[j], target[j]) for j in range(steps)]


class MathAttention:
    """The attention kernel that has a double backward; the fused ones have none."""

    def __enter__(self) -> None:
        self._context = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        self._context.__enter__()

    def __exit__(self, *details: Any) -> None:
        self._context.__exit__(*details)
