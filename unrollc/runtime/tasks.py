"""Batches of tasks: each runs forward and backward before the next begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unrollc.errors import InputError
from unrollc.runtime.bridge import Run, pulled_back
from unrollc.runtime.result import Result

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class Task:
    """A task that is ready to run.

    Attributes:
        run: The call of the program.
        finish: ``loss -> result``, once it has run.
    """

    run: Run
    finish: Callable[[Tensor], Result]


def task_pairs(tasks: Any) -> list[tuple[Any, Any]]:
    """The pairs ``(train, val)`` of a batch.

    Raises:
        InputError: If that is not what `tasks` is.
    """
    if not isinstance(tasks, Sequence) or isinstance(tasks, str):
        raise InputError(
            f"tasks is {type(tasks).__name__}, not a list of pairs (train, val)",
            remedy="pass [(train, val), ...], each pair as the program takes it",
        )
    for number, task in enumerate(tasks):
        if not isinstance(task, tuple | list) or len(task) != 2:
            found = f"{type(task).__name__} of {len(task)}" if isinstance(task, Sequence) else task
            raise InputError(
                f"tasks[{number}] is {found}, not a pair (train, val)",
                remedy="pass [(train, val), ...], each pair as the program takes it",
            )
    if not tasks:
        raise InputError("tasks is empty", remedy="pass at least one pair (train, val)")
    return [(train, val) for train, val in tasks]


def batch_of_tasks(
    tasks: Iterable[Task], count: int, reduction: str
) -> tuple[Tensor, list[Result]]:
    """Run tasks one by one.

    Args:
        tasks: They are made as they are reached.
        count: Their number.
        reduction: See `Program.batched`.

    Returns:
        The reduced loss, with its gradient, and the result of each task.

    Raises:
        InputError: If there is no such reduction.
    """
    if reduction not in REDUCTIONS:
        raise InputError(f"reduction={reduction!r}", remedy='pass "mean", "sum" or "none"')
    batch = _Batch(separate=reduction == "none")
    for task in tasks:
        batch.add(task)
    if batch.targets:
        losses: Tensor = _Scaled.apply(batch, *batch.targets)  # type: ignore[no-untyped-call]
    else:
        losses = batch.losses
    if reduction == "none":
        return losses, batch.results
    return (losses.sum() if reduction == "sum" else losses.sum() / count), batch.results


class _Batch:
    """Losses, results and meta-gradients of the tasks that have run.

    Args:
        separate: Whether each task's gradient is kept; otherwise their sum is.
    """

    def __init__(self, *, separate: bool) -> None:
        self.separate = separate
        self.targets: list[Tensor] = []
        self.gradients: list[dict[int, Tensor]] = []
        self.results: list[Result] = []
        self._numbers: dict[int, int] = {}

    @property
    def losses(self) -> Tensor:
        return torch.stack([result.loss for result in self.results])

    def add(self, task: Task) -> None:
        run = task.run
        numbers = [self._number(tensor) for tensor in run.meta]
        with torch.no_grad():
            loss = run.adapt()
            self.results.append(task.finish(loss))
            if not numbers:
                run.forget()
                return
            if self.separate or not self.gradients:
                self.gradients.append({})
            sums = self.gradients[-1]
            with torch.autocast(run.device, enabled=False):
                for number, gradient in zip(
                    numbers, pulled_back(run, run.inputs, again=False), strict=True
                ):
                    if gradient is not None:
                        known = sums.get(number)
                        sums[number] = gradient if known is None else known + gradient

    def _number(self, tensor: Tensor) -> int:
        """The tensor's place among the targets; tasks share θ_0, but not their data."""
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self.targets)
            self.targets.append(tensor)
        return self._numbers[id(tensor)]


class _Scaled(torch.autograd.Function):
    """``(meta-parameters) -> losses [tasks]``, whose gradients are there already."""

    @staticmethod
    def forward(ctx: Any, batch: _Batch, *targets: Tensor) -> Tensor:
        ctx.gradients, ctx.separate, ctx.count = batch.gradients, batch.separate, len(targets)
        return batch.losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangents: Tensor) -> tuple[Tensor | None, ...]:
        totals: list[Tensor | None] = [None] * ctx.count
        for gradients, cotangent in zip(ctx.gradients, cotangents, strict=ctx.separate):
            for number, gradient in gradients.items():
                scaled = gradient * cotangent.to(gradient.dtype)
                known = totals[number]
                totals[number] = scaled if known is None else known + scaled
        return (None, *totals)
