"""The loops of the generated program: the forward pass, and the schedule of the backward pass."""

from __future__ import annotations

import inspect

from torch import Tensor

from unrollc.codegen.forward import BACKWARD, without_tangents
from unrollc.plan.binomial import checkpoints, stride
from unrollc.plan.pieces import Pieces
from unrollc.plan.schedule import Schedule
from unrollc.step import Role, StepGraph


def render_constants(pieces: Pieces) -> list[str]:
    """The dtype of the inner losses, and the schedule's numbers."""
    schedule = pieces.schedule
    lines = [f"LOSS_DTYPE = {_loss(pieces.steps[0]).dtype}", f"STEPS = {schedule.steps}"]
    if not schedule.differentiates:
        return lines
    lines.append(f"STOP = {schedule.stop}  # the first step that is reversed")
    if schedule.segment is not None:
        lines.append(f"SEGMENT = {schedule.segment}  # so many steps are reversed by themselves")
    slots = _slots(schedule)
    if slots is not None:
        lines.append(f"SLOTS = {slots}  # states kept at once besides the first")
    return lines


def _slots(schedule: Schedule) -> int | None:
    return schedule.segment if schedule.slots is None else schedule.slots


def render_loops(pieces: Pieces) -> list[str]:
    """The functions that run the schedule."""
    parts = _loops(pieces)
    if pieces.prologue is not None:
        parts = [part.replace(_PLAIN_INPUTS, _PREPARED_INPUTS) for part in parts]
    return [*parts, _both(pieces)] if pieces.differentiates else parts


#: What functions inside the program say of their inputs.
_PLAIN_INPUTS = "inputs: Tensors by label."
_PREPARED_INPUTS = "inputs: Tensors by label, as returned by `prepare`."


def _loops(pieces: Pieces) -> list[str]:
    schedule = pieces.schedule
    parts = [_FORWARD_RECORDING if schedule.records else _FORWARD]
    if pieces.directions:
        return [*parts, _adapt(pieces, "()"), BACKWARD]
    if not schedule.differentiates:
        return [*parts, _adapt(pieces, "()")]
    if _slots(schedule) is None:
        return [*parts, _adapt(pieces, "range(STOP, STEPS)"), _REVERSE_KEPT, _BACKWARD]
    parts += [inspect.getsource(stride).rstrip(), _REVERSE_BINOMIAL]
    if schedule.segment is not None:
        return [*parts, _adapt(pieces, "range(STOP, STEPS, SEGMENT)"), _BACKWARD_SEGMENTS]
    kept = "set(checkpoints(STOP, STEPS, SLOTS))"
    parts.insert(2, inspect.getsource(checkpoints).rstrip())
    return [*parts, _adapt(pieces, kept), _BACKWARD]


def _adapt(pieces: Pieces, kept: str) -> str:
    losses = ", ".join(map(str, ("STEPS", *_loss(pieces.steps[0]).shape)))
    shape = f"({losses})" if "," in losses else losses
    head, last = _ADAPT.replace("KEPT", kept).replace("LOSSES", shape).rsplit("\n", 1)
    return "\n".join([head, *(f"    {line}" for line in without_tangents(pieces)), last])


def _both(pieces: Pieces) -> str:
    lines = [_BOTH, *(["    inputs = prepare(inputs)"] if pieces.prologue else [])]
    lines.append("    loss, _, _, kept, cotangents, totals = adapt(inputs, seed)")
    gradients = "backward(inputs, seed, kept, cotangents, totals)"
    result = f"conclude(inputs, {gradients})" if pieces.epilogue else gradients
    return "\n".join([*lines, f"    return loss, {result}"])


def _loss(step: StepGraph) -> Tensor:
    ((_, node),) = step.outputs_with(Role.LOSS)
    assert node is not None
    loss: Tensor = node.meta["val"]
    return loss


_FORWARD = '''\
@torch.no_grad()
def forward(inputs, seed, state, losses, kept, keep, first, last):
    """Run the inner steps `first` to `last` - 1 from `state`, which is taken over.

    Args:
        inputs: Tensors by label.
        seed: Integer from which all noise of the run follows.
        state: The state that step `first` starts from.
        losses: Receives the inner losses; a tensor of shape [STEPS].
        kept: Receives the states whose numbers are in `keep`.

    Returns:
        The state after step `last` - 1.
    """
    for j in range(first, last):
        if j in keep:
            kept[j] = list(state)
        state, losses[j] = advance(inputs, seed, j, state)
    return state'''

_FORWARD_RECORDING = '''\
@torch.no_grad()
def forward(inputs, seed, state, losses, kept, keep, first, last):
    """Run the inner steps `first` to `last` - 1 from `state`, which is taken over.

    Args:
        inputs: Tensors by label.
        seed: Integer from which all noise of the run follows.
        state: The state that step `first` starts from.
        losses: Receives the inner losses; a tensor of shape [STEPS].
        kept: Receives the states whose numbers are in `keep`, with the residuals of their steps.

    Returns:
        The state after step `last` - 1.
    """
    for j in range(first, last):
        begin = list(state) if j in keep else []
        state, losses[j], residuals = advance(inputs, seed, j, state)
        if j in keep:
            kept[j] = begin + residuals
        del begin, residuals
    return state'''

_ADAPT = '''\
def adapt(inputs, seed):
    """Run the inner steps and the validation loss.

    Args:
        inputs: Tensors by label.
        seed: Integer from which all noise of the run follows.

    Returns:
        The validation loss, the state after the last step, the inner losses, the kept states,
        the cotangents B_T and the direct parts of the meta-gradients.
    """
    state, kept = start(inputs), {}
    losses = state[0].new_empty(LOSSES, dtype=LOSS_DTYPE)
    state = forward(inputs, seed, state, losses, kept, KEPT, 0, STEPS)
    loss, cotangents, totals = finish(inputs, seed, state)
    return loss, state, losses, kept, cotangents, totals'''

_REVERSE_KEPT = '''\
@torch.no_grad()
def reverse(inputs, seed, kept, first, last, cotangents, totals):
    """Pull B_last back to B_first; every state on the way is in `kept`, which is emptied."""
    for j in reversed(range(first, last)):
        cotangents = pull_back(inputs, seed, j, kept.pop(j), cotangents, totals)
    return cotangents'''

_REVERSE_BINOMIAL = '''\
@torch.no_grad()
def reverse(inputs, seed, kept, first, last, cotangents, totals):
    """Pull B_last back to B_first by binomial checkpointing (Griewank and Walther 2000).

    `kept` holds state `first`, and maybe some of those behind it; it is emptied. Where the state
    of a step is not kept, the steps before it run again from the newest state that is.
    """
    for j in reversed(range(first, last)):
        at = next(reversed(kept))
        state = kept.pop(at) if at == j else list(kept[at])
        while at < j:
            middle = at + stride(j + 1 - at, SLOTS + 1 - len(kept))
            for i in range(at, middle):
                state, _ = advance(inputs, seed, i, state)
            at = middle
            if at < j:
                kept[at] = list(state)
        cotangents = pull_back(inputs, seed, j, state, cotangents, totals)
    return cotangents'''

_BACKWARD = '''\
def backward(inputs, seed, kept, cotangents, totals):
    """Pull B_T back through the inner steps.

    Args:
        inputs, seed: As given to `adapt`.
        kept, cotangents, totals: As returned by `adapt`; they are taken over.

    Returns:
        Meta-gradients by label.
    """
    cotangents = reverse(inputs, seed, kept, STOP, STEPS, cotangents, totals)
    return gradients(cotangents, totals)'''

_BACKWARD_SEGMENTS = '''\
def backward(inputs, seed, kept, cotangents, totals):
    """Pull B_T back through the inner steps, segment by segment.

    Args:
        inputs, seed: As given to `adapt`.
        kept, cotangents, totals: As returned by `adapt`; they are taken over.

    Returns:
        Meta-gradients by label.
    """
    for first in reversed(range(STOP, STEPS, SEGMENT)):
        last = min(first + SEGMENT, STEPS)
        segment = {first: kept.pop(first)}
        cotangents = reverse(inputs, seed, segment, first, last, cotangents, totals)
    return gradients(cotangents, totals)'''

_BOTH = '''\
def loss_and_gradients(inputs, seed=0):
    """The validation loss and its meta-gradients.

    Args:
        inputs: Tensors by label.
        seed: Integer from which all noise follows.

    Returns:
        The loss (0-dim) and a dictionary of meta-gradients by label.
    """'''
