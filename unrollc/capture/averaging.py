"""Averages of the weights: ``AveragedModel.update_parameters``, run on traced tensors.

The averaged model's parameters and buffers, and its count of models, are state of the inner loop
in a role of their own. Their labels are ``average.`` and the names of its ``state_dict``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from unrollc.capture.foreach import ForeachAsLoops
from unrollc.capture.gradients import unchanged
from unrollc.capture.model import in_place_of_users, swapped
from unrollc.capture.numbers import numbers_stay_tensors
from unrollc.capture.outside import NoOutsideWrites
from unrollc.capture.problem import Problem, Stock
from unrollc.capture.record import Recorder
from unrollc.capture.scalars import ScalarSlots
from unrollc.errors import InputError


def check_average(average: Any, model: nn.Module) -> None:
    """Refuse what is no average over this model.

    Raises:
        InputError: With what to pass.
    """
    if not isinstance(average, AveragedModel):
        raise InputError(
            f"average is {type(average).__name__}, not a torch.optim.swa_utils.AveragedModel",
            remedy="pass AveragedModel(model), with avg_fn or multi_avg_fn for anything but the "
            "plain mean",
        )
    mine, its = (
        {name: t.shape for name, t in (*m.named_parameters(), *m.named_buffers())}
        for m in (model, average.module)
    )
    for name in sorted(set(mine) | set(its)):
        if mine.get(name) != its.get(name):
            raise InputError(
                f"average is not an average of this model: {name} has shape "
                f"{_shape(its.get(name))} there and {_shape(mine.get(name))} in the model",
                remedy="build it by AveragedModel(model)",
            )
    shared = {id(t) for t in (*model.parameters(), *model.buffers())}
    if any(id(t) in shared for t in (*average.parameters(), *average.buffers())):
        raise InputError(
            "average shares tensors with the model",
            remedy="build it by AveragedModel(model), which copies them",
        )


def _shape(shape: torch.Size | None) -> str:
    return "none" if shape is None else str(list(shape))


def run_user_average(
    problem: Problem,
    stock: Stock,
    recorder: Recorder,
    tensors: dict[str, Tensor],
    average: dict[str, Tensor],
) -> dict[str, Tensor]:
    """The averaged tensors after an inner step.

    Args:
        problem, stock: The user's objects and their tensors.
        recorder: Where the averaging is recorded.
        tensors: Traced parameters and buffers of the model after the step, by label.
        average: Traced tensors of the averaged model before it, by label.

    Raises:
        CaptureError: If the averaging function keeps Python state.
    """
    assert problem.average is not None
    prefix = problem.average_prefix
    own = {label.removeprefix(prefix): tensor for label, tensor in average.items()}
    after = dict(average)
    with (
        unchanged(problem.average.avg_fn, "the averaging function"),
        unchanged(problem.average.multi_avg_fn, "the averaging function"),
        NoOutsideWrites(recorder),
        in_place_of_users(problem, stock, recorder, tensors),
        swapped(problem.average, own, prefix, after),
        ForeachAsLoops(),
        ScalarSlots(recorder),
        numbers_stay_tensors(recorder, (), ()),
        torch.no_grad(),
    ):
        problem.average.update_parameters(problem.model)
    return after


def averaged_labels(problem: Problem) -> dict[str, str]:
    """Labels of the averaged tensors by the label of what they are an average of."""
    prefix = f"{problem.average_prefix}module."
    names = [name for name, _ in problem.model.named_parameters()]
    names += [name for name, _ in problem.model.named_buffers()]
    return {name: prefix + name for name in names}
