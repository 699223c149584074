"""Hooks around an optimizer's step, run on traced tensors.

The step of a copy runs them by itself. Here user code inside is given what gradient transforms
are given (its own parameters mean the fast weights), and what would be lost is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from unrollc.capture.fingerprint import step_hooks_of
from unrollc.capture.gradients import unchanged
from unrollc.capture.model import in_place_of_users
from unrollc.capture.outside import NoOutsideWrites
from unrollc.capture.problem import Problem, Stock
from unrollc.capture.record import Recorder
from unrollc.errors import CaptureError


@contextlib.contextmanager
def step_hooks(
    problem: Problem,
    stock: Stock,
    recorder: Recorder,
    tensors: dict[str, Tensor],
    hyper: Mapping[str, Tensor],
) -> Iterator[None]:
    """While the optimizer's step is captured: its hooks, and those of all optimizers.

    Args:
        problem, stock: The user's objects and their tensors.
        recorder: What the step is recorded by.
        tensors: Traced parameters and buffers by label; buffers that a hook changes are updated
            in it.
        hyper: Traced hyperparameters by label.

    Raises:
        CaptureError: If a hook keeps Python state, changes the user's own optimizer, or writes
            to a tensor hyperparameter.
    """
    registered = step_hooks_of(problem.opt)
    if not registered:
        yield
        return
    groups = [dict(group) for group in problem.opt.param_groups]
    nodes = {label: recorder.node_of(tensor) for label, tensor in hyper.items()}
    with contextlib.ExitStack() as stack:
        for hook in registered:
            stack.enter_context(unchanged(hook, "a hook of the optimizer's step"))
        stack.enter_context(NoOutsideWrites(recorder))
        stack.enter_context(in_place_of_users(problem, stock, recorder, tensors))
        try:
            yield
        finally:
            touched = [
                g
                for g, was in zip(problem.opt.param_groups, groups, strict=True)
                if not _same_entries(g, was)
            ]
            for group, was in zip(problem.opt.param_groups, groups, strict=True):
                group.clear()
                group.update(was)
    if touched:
        raise CaptureError(
            "a hook of the optimizer's step changes the param groups of the user's optimizer",
            why="the step is captured on a copy, which the hook gets as its argument",
            remedy="use the hook's first argument in place of the optimizer's name",
        )
    for label, tensor in hyper.items():
        if recorder.node_of(tensor) is not nodes[label]:
            raise CaptureError(
                f"a hook of the optimizer's step writes to the tensor {label}",
                why="a hyperparameter is the same at every inner step",
                remedy="use scheduler=, unrollc.PerStep, or keep the value in optimizer.state",
            )


def _same_entries(group: dict[str, Any], was: dict[str, Any]) -> bool:
    return group.keys() == was.keys() and all(group[key] is was[key] for key in was)
