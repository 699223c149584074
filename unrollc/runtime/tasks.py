"""Batches of tasks: what runs together goes forward and backward before the next begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unrollc.errors import InputError
from unrollc.runtime.bridge import Run, pulled_back
from unrollc.runtime.result import Result

REDUCTIONS = ("mean", "sum", "none")

#: A task's place among those that run together, a meta-parameter, and its gradient.
Share = tuple[int, Tensor, Tensor | None]


@dataclass(frozen=True)
class Task:
    """One task that is ready to run, or several that run together.

    Attributes:
        places: Their places in the batch.
        run: The call of the program.
        finish: ``loss -> results``, once it has run.
        share: ``gradients -> meta-parameters of the tasks with their gradients``; the gradients
            are in the order of `Run.meta`.
    """

    places: tuple[int, ...]
    run: Run
    finish: Callable[[Tensor], list[Result]]
    share: Callable[[Iterable[Tensor | None]], Iterator[Share]]


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


def check_reduction(reduction: str) -> None:
    """
    Raises:
        InputError: If there is no such reduction.
    """
    if reduction not in REDUCTIONS:
        raise InputError(f"reduction={reduction!r}", remedy='pass "mean", "sum" or "none"')


def batch_of_tasks(
    tasks: Iterable[Task], count: int, reduction: str
) -> tuple[Tensor, list[Result]]:
    """Run tasks one by one, or as many together as a `Task` has.

    Args:
        tasks: They are made as they are reached.
        count: The number of tasks.
        reduction: See `Program.batched`.

    Returns:
        The reduced loss, with its gradient, and the result of each task.
    """
    batch = _Batch(count, separate=reduction == "none")
    for task in tasks:
        batch.add(task)
    results = [batch.results[place] for place in range(count)]
    losses = torch.stack([result.loss for result in results])
    if batch.targets:
        losses = _Scaled.apply(batch, losses, *batch.targets)  # type: ignore[no-untyped-call]
    if reduction == "none":
        return losses, results
    return (losses.sum() if reduction == "sum" else losses.sum() / count), results


class _Batch:
    """Results and meta-gradients of the tasks that have run.

    Args:
        count: The number of tasks.
        separate: Whether each task's gradient is kept; otherwise their sum is.
    """

    def __init__(self, count: int, *, separate: bool) -> None:
        self.separate = separate
        self.targets: list[Tensor] = []
        self.gradients: list[dict[int, Tensor]] = [{} for _ in range(count if separate else 1)]
        self.results: dict[int, Result] = {}
        self._numbers: dict[int, int] = {}

    def add(self, task: Task) -> None:
        run = task.run
        with torch.no_grad():
            loss = run.adapt()
            self.results.update(zip(task.places, task.finish(loss), strict=True))
            if not run.wanted:
                run.forget()
                return
            with torch.autocast(run.device, enabled=False):
                for at, tensor, gradient in task.share(pulled_back(run, run.prepared, again=False)):
                    number = self._number(tensor)
                    if gradient is not None:
                        sums = self.gradients[task.places[at] if self.separate else 0]
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
    def forward(ctx: Any, batch: _Batch, losses: Tensor, *targets: Tensor) -> Tensor:
        ctx.gradients, ctx.separate, ctx.count = batch.gradients, batch.separate, len(targets)
        return losses.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangents: Tensor) -> tuple[Tensor | None, ...]:
        totals: list[Tensor | None] = [None] * ctx.count
        for gradients, cotangent in zip(ctx.gradients, cotangents, strict=ctx.separate):
            for number, gradient in gradients.items():
                scaled = gradient * cotangent.to(gradient.dtype)
                known = totals[number]
                totals[number] = scaled if known is None else known + scaled
        return (None, None, *totals)
