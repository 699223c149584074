"""The user's gradient transform: what an ordinary loop does between backward pass and step.

It belongs to the update. The inner gradient itself stays the true one, so what is proved of its
Jacobian holds with a transform as without; opt_j(θ, φ, G) of the GIMLI paper is then the
transform followed by the optimizer.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unrollc.capture.fingerprint import Fingerprint
from unrollc.capture.foreach import ForeachAsLoops
from unrollc.capture.model import in_place_of_users
from unrollc.capture.numbers import numbers_stay_tensors
from unrollc.capture.outside import NoOutsideWrites
from unrollc.capture.problem import Loss, Objective, Problem, Stock
from unrollc.capture.record import Recorder
from unrollc.capture.scalars import ScalarSlots
from unrollc.errors import CaptureError


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


@contextlib.contextmanager
def unchanged(code: Any, what: str) -> Iterator[None]:
    """Refuse code that changes Python values which it reads again at the next step."""

    def parts() -> list[Any]:
        return [code, *_modules_behind(code)]

    with steady(parts, what, "a tensor: a buffer of an nn.Module"):
        yield


@contextlib.contextmanager
def steady(
    parts: Callable[[], Sequence[Any]], what: str, place: str, known: Sequence[nn.Module] = ()
) -> Iterator[None]:
    """Refuse a change of values that no step hands to the next.

    Args:
        parts: Returns the code, and values that it reads.
        what: The code's name.
        place: Where such values belong.
        known: Modules whose attributes are carried from step to step.
    """
    before = Fingerprint(known)
    described = [before.of_code(part) for part in parts()]
    yield
    after = Fingerprint(known)
    if [after.of_code(part) for part in parts()] != described:
        raise CaptureError(
            f"{what} changes Python values that it refers to",
            why="it runs once, when a step is captured, and not at every inner step: a counter or "
            "a list would not grow",
            remedy=f"keep what changes from step to step in {place}",
        )


@contextlib.contextmanager
def steady_loss(problem: Problem, loss: Loss) -> Iterator[None]:
    """Refuse a loss that changes Python values; the attributes of modules are carried."""
    loss = loss.fn if isinstance(loss, Objective) else loss
    known = [child for module in problem.modules.values() for child in module.modules()]
    parts = [] if isinstance(loss, nn.Module) else [loss]
    with steady(lambda: parts, "the loss", "a buffer or an attribute of the model", known):
        yield


def _modules_behind(code: Any) -> list[nn.Module]:
    """Modules that a function reaches by its closure or as globals."""
    if not isinstance(code, types.FunctionType):
        return []
    values = [cell.cell_contents for cell in code.__closure__ or ()]
    values += [code.__globals__.get(name) for name in code.__code__.co_names]
    return [value for value in values if isinstance(value, nn.Module)]
