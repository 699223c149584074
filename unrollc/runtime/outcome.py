"""From the end of a run to a `Result`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from unrollc.capture.averaging import averaged_labels
from unrollc.capture.layout import Layout, filler, plain_number, write_back
from unrollc.capture.problem import Problem, take_stock
from unrollc.capture.schedule import put_back
from unrollc.capture.trees import rebuild
from unrollc.errors import NonFiniteError
from unrollc.optimize.congruence import Key
from unrollc.runtime.bridge import Run
from unrollc.runtime.given import Given
from unrollc.runtime.lowering import Lowered
from unrollc.runtime.result import Result
from unrollc.step import STATE_ROLES, Role


def last_state(lowered: Lowered, run: Run) -> dict[Key, Tensor]:
    """The last state as the user knows it; nothing of it is a tensor of the user's."""
    last = lowered.pieces.steps[lowered.pieces.sequence[-1]]
    leaves = pytree.tree_leaves(dict(run.inputs))
    owned = {_storage(t) for t in leaves if isinstance(t, Tensor)}
    values = [value for value, _ in last.outputs_with(*STATE_ROLES)]
    own = [t.detach().clone() if _storage(t) in owned else t for t in run.state]
    return lowered.packing.unpacked(values, own)


def _storage(tensor: Tensor) -> int:
    """What tells whose memory it is; a row of a batch is the batch's."""
    storage: int = tensor.untyped_storage()._cdata
    return storage


def result_of(
    problem: Problem,
    lowered: Lowered,
    given: Given,
    state: Mapping[Key, Tensor],
    losses: tuple[Tensor, Tensor],
    *,
    debug: bool,
) -> Result:
    """What a call returns.

    Args:
        problem: The user's objects.
        lowered: The program.
        given: What the call started from.
        state: The last state (`last_state`).
        losses: The validation loss, and those of the inner steps.
        debug: Whether to look for NaN and infinity.

    Raises:
        NonFiniteError: If there is some.
    """
    loss, inner_losses = losses
    stock = given.stock
    after: dict[Role, dict[str, Tensor]] = {role: {} for role in STATE_ROLES}
    for (role, label), tensor in state.items():
        after[role][label] = tensor
    buffers = {
        k: after[Role.BUFFER][k] if k in after[Role.BUFFER] else t.detach().clone()
        for k, t in stock.buffers.items()
    }
    own_buffers = {name for name, _ in problem.model.named_buffers()}
    layout = lowered.loop.layout
    start = {**stock.theta, **stock.context, **stock.opt_state}
    held: dict[str, Any] = {**start, **after[Role.OPT_STATE]}
    held |= {label: plain_number(held[label]) for label in layout.traced}
    made: dict[Any, Any] = {"self": problem.opt}
    kept = {owner: rebuild(tree, filler(held), made) for owner, tree in layout.state}
    result = Result(
        loss=loss,
        params={
            name: after[Role.THETA].get(name, parameter.detach())
            for name, parameter in problem.model.named_parameters()
        },
        buffers={k: t for k, t in buffers.items() if k in own_buffers},
        other_buffers={k: t for k, t in buffers.items() if k not in own_buffers},
        opt_state=kept,
        inner_losses=inner_losses,
        average=_average(given.problem, after[Role.AVERAGE]),
        scheduler=None if given.schedule is None else given.schedule.state,
        _write=functools.partial(_apply, problem, given, layout, after),
    )
    if debug:
        _check_result(result)
    return result


def _apply(
    problem: Problem,
    given: Given,
    layout: Layout,
    after: Mapping[Role, dict[str, Tensor]],
    result: Result,
) -> None:
    stock = take_stock(problem)
    by_label: dict[Any, Any] = {**stock.theta, **stock.context}
    with torch.no_grad():
        for label in stock.theta:
            by_label[label].copy_(result.params[label])
        for label, tensor in {**result.buffers, **result.other_buffers}.items():
            stock.buffers[label].copy_(tensor)
        for label, tensor in after[Role.AVERAGE].items():
            stock.average[label].copy_(tensor)
    own = {label: tensor.detach().clone() for label, tensor in after[Role.OPT_STATE].items()}
    write_back(problem.opt, layout, {**given.stock.opt_state, **own}, by_label)
    if given.schedule is not None:
        assert problem.scheduler is not None
        put_back(given.schedule, problem.opt, problem.scheduler)


def _average(problem: Problem, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The averaged tensors by the names that they have in the model."""
    if problem.average is None:
        return None
    return {label: tensors[its] for label, its in averaged_labels(problem).items()}


def _check_result(result: Result) -> None:
    bad = (~torch.isfinite(result.inner_losses)).nonzero()
    if len(bad):
        raise NonFiniteError(
            f"the inner loss of step {int(bad[0])} is {result.inner_losses[bad[0]].item()}",
            remedy="lower the learning rate, or look at the step's batch",
        )
    for label, tensor in result.params.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(
                f"the adapted parameter {label} holds NaN or infinity",
                remedy="lower the learning rate",
            )
    if not bool(torch.isfinite(result.loss)):
        raise NonFiniteError(f"the validation loss is {result.loss.item()}")
