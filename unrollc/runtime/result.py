"""What a call of a program returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unrollc.runtime.task_plan import TaskPlan


@dataclass(frozen=True)
class Result:
    """The adapted model and its validation loss.

    Attributes:
        loss: Validation loss, 0-dim; ``loss.backward()`` fills ``.grad`` of the meta-parameters.
        params: All parameters of the model by name, detached: θ_T, and those that the optimizer
            does not hold as they are.
        buffers: Buffers of the model after the last step by name.
        other_buffers: Those of losses, of a gradient transform and of the optimizer's networks, by
            label.
        opt_state: The optimizer's state after the last step: ``{name: {key: value}}``; what it
            keeps under a name of its own stands under that name.
        inner_losses: Training losses of the inner steps, shape ``[T]``, detached.
        average: Averaged parameters and buffers by their names in the model, detached; None where
            there is no average. The validation loss is that of these.
        scheduler: The scheduler's ``state_dict()`` after T steps, or None where there is none.
    """

    loss: Tensor
    params: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    other_buffers: Mapping[str, Tensor]
    opt_state: Mapping[Any, Any]
    inner_losses: Tensor
    average: Mapping[str, Tensor] | None
    scheduler: Mapping[str, Any] | None
    _write: Callable[[Result], None] = field(repr=False)

    def apply(self) -> None:
        """Write θ_T, buffers and optimizer state back into the user's model and optimizer.

        A scheduler goes on from where it is after T steps, and its rates stand in the param
        groups; where one was a tensor, a new tensor takes its place. An average gets its weights
        and the number of models that it is of.
        """
        self._write(self)


@dataclass(frozen=True)
class BatchedResult:
    """The adapted models of many tasks.

    Attributes:
        loss: Mean or sum of the validation losses, 0-dim, or each of them, shape ``[tasks]``;
            ``loss.backward()`` fills ``.grad`` of the meta-parameters.
        tasks: The result of each task; its own loss is detached.
        plan: Which tasks ran side by side, which one by one, and why; ``str()`` is a table.
    """

    loss: Tensor
    tasks: tuple[Result, ...]
    plan: TaskPlan

    @property
    def losses(self) -> Tensor:
        """Validation losses, shape ``[tasks]``, detached."""
        return torch.stack([task.loss for task in self.tasks])
