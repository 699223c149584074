"""The user's gradient transform: what an ordinary loop does between backward pass and step.

It belongs to the update. The inner gradient itself stays the true one, so what is proved of its
Jacobian holds with a transform as without; opt_j(θ, φ, G) of the GIMLI paper is then the
transform followed by the optimizer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unrollc.capture.fingerprint import unchanged
from unrollc.capture.foreach import ForeachAsLoops
from unrollc.capture.model import in_place_of_users
from unrollc.capture.numbers import numbers_stay_tensors
from unrollc.capture.outside import NoOutsideWrites
from unrollc.capture.problem import Problem, Stock
from unrollc.capture.record import Recorder
from unrollc.capture.scalars import ScalarSlots


def run_user_transform(
    problem: Problem,
    stock: Stock,
    recorder: Recorder,
    tensors: dict[str, Tensor],
    gradients: dict[str, Tensor],
) -> dict[str, Tensor]:
    """The gradients after the user's transform.

    Args:
        problem, stock: The user's objects and their tensors.
        recorder: Where the transform is recorded.
        tensors: Traced parameters and buffers by label; buffers that the transform changes are
            updated in it.
        gradients: The inner gradients by label; parameters without one are not handed over.

    Raises:
        CaptureError: If the transform keeps Python state, which only the first step would see.
    """
    assert problem.grad_transform is not None
    held = [
        label
        for group in problem.opt.param_groups
        for parameter in group["params"]
        if (label := stock.owners[id(parameter)]) in stock.theta
    ]
    for label in held:
        tensors[label].grad = gradients.get(label)
    handed = [tensors[label] for label in held if label in gradients]
    with (
        unchanged(problem.grad_transform, "grad_transform"),
        NoOutsideWrites(recorder),
        in_place_of_users(problem, stock, recorder, tensors),
        ForeachAsLoops(),
        ScalarSlots(recorder),
        numbers_stay_tensors(recorder, (), ()),
        torch.no_grad(),
    ):
        problem.grad_transform(handed)
    return {label: gradient for label in held if (gradient := tensors[label].grad) is not None}
