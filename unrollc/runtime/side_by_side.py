"""Many tasks in one run: their tensors in a row, and each task's part of what comes back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unrollc.optimize.congruence import Key
from unrollc.runtime.task_plan import Joint
from unrollc.runtime.tasks import Share
from unrollc.step import Role


def joint_inputs(joint: Joint, each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a program of many tasks reads, by label (detached).

    Data are stacked, and where the state starts is repeated.

    Args:
        joint: The program.
        each: What it would read for each task alone.
    """
    batched = _batch_labels(joint)
    with torch.no_grad():
        return {
            label: _stacked([inputs[label] for inputs in each], _axis(joint, label))
            if label in batched
            else _repeated(value, len(each))
            if label in joint.tasks.own
            else value
            for label, value in each[0].items()
        }


def _batch_labels(joint: Joint) -> set[str]:
    graphs = (*joint.tasks.loop.steps, joint.tasks.val)
    return {value.label for graph in graphs for value, _ in graph.inputs_with(Role.BATCH)}


def _axis(joint: Joint, label: str) -> int:
    """The axis of the tasks; that of the steps comes before it."""
    return int(label in joint.executor.lowered.pieces.stacked)


def _stacked(values: list[Any], axis: int) -> Any:
    if isinstance(values[0], list):
        return [torch.stack(step).contiguous() for step in zip(*values, strict=True)]
    return torch.stack(values, axis).contiguous()


def _repeated(value: Tensor, count: int) -> Tensor:
    return value.detach().expand(count, *value.shape).contiguous()


def shares(
    joint: Joint, each: Sequence[Mapping[str, Any]], separate: bool, gradients: Iterable[Any]
) -> Iterator[Share]:
    """The gradients of a run as those of the user's tensors.

    Args:
        joint: The program.
        each: What it would read for each task alone.
        separate: Whether each task's gradient is wanted, or their sum.
        gradients: In the order of `Run.meta`.
    """
    found = iter(gradients)
    batched = _batch_labels(joint)
    for label in joint.executor.lowered.pieces.wanted:
        first = each[0][label]
        many = isinstance(first, list)
        for step in range(len(first) if many else 1):
            gradient = next(found)
            given = [inputs[label][step] if many else inputs[label] for inputs in each]
            if label in batched:
                parts = _parts(gradient, _axis(joint, label), len(each))
                yield from zip(range(len(each)), given, parts, strict=True)
            elif label not in joint.tasks.own:
                yield 0, given[0], gradient
            elif separate:
                yield from zip(range(len(each)), given, _parts(gradient, 0, len(each)), strict=True)
            else:
                yield 0, given[0], None if gradient is None else gradient.sum(0)


def _parts(gradient: Tensor | None, axis: int, count: int) -> Sequence[Tensor | None]:
    return [None] * count if gradient is None else gradient.unbind(axis)


def state_of_each(joint: Joint, state: Mapping[Key, Tensor]) -> list[dict[Key, Tensor]]:
    """The last state of each task, in memory of its own."""
    return [
        {key: (t[at] if key in joint.tasks.state else t).clone() for key, t in state.items()}
        for at in range(joint.tasks.count)
    ]
