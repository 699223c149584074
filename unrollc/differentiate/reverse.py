"""Reverse-over-reverse: the captured step, gradient included, differentiated by autograd."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, fx

from unrollc.differentiate.adjoint import (
    Key,
    StepAdjoint,
    cotangent_inputs,
    differentiable_inputs,
    finish,
)
from unrollc.differentiate.guarded import guards_of
from unrollc.differentiate.replay import Replay, calls, start
from unrollc.errors import CaptureError
from unrollc.step import Phase, Role, StepGraph, Value


def reverse_adjoint(
    step: StepGraph,
    wanted: frozenset[Key],
    live: frozenset[Key],
    *,
    first_order: bool = False,
    reason: str = "",
) -> StepAdjoint:
    """``step --> adjoint`` in reverse mode, exact for any captured step.

    Args:
        step: One inner step.
        wanted: Meta-parameters among hyper, context and batch inputs.
        live: State outputs whose cotangent is not structurally zero.
        first_order: Take the inner gradient as a constant (first-order MAML).
        reason: Why this mode is used.
    """
    recorder, inputs = start(step)
    cot_values, cot_tensors, cot_nodes = cotangent_inputs(step, live, recorder)
    targets = differentiable_inputs(step, wanted)

    def run(*tensors: Tensor) -> list[Tensor | None]:
        given, cotangents = tensors[: len(inputs)], tensors[len(inputs) :]
        replay = Replay(recorder, guards_of(step))
        replay.bind(step.placeholders, given)
        with torch.enable_grad():
            leaves = [replay.values[node].requires_grad_() for _, node in targets]
            nodes = calls(step, *Phase)
            replay.run(_stopping_at_gradients(step, replay) if first_order else nodes)
            return vector_jacobian(recorder, replay, cot_nodes, leaves, list(cotangents))

    grads = recorder.run(run, [*inputs, *cot_tensors])
    contributions = [(value, grad) for (value, _), grad in zip(targets, grads, strict=True)]
    graph = finish(step, recorder, [*step.inputs, *cot_values], contributions)
    return StepAdjoint(graph, "reverse", reason)


def _stopping_at_gradients(step: StepGraph, replay: Replay) -> Any:
    """Nodes in order; each inner gradient is detached as soon as it is there."""
    stops = {node for _, node in step.outputs_with(Role.GRADIENT) if node is not None}
    for node in calls(step, *Phase):
        if node.meta["phase"] is Phase.UPDATE:
            for stop in stops:
                replay.values[stop] = replay.values[stop].detach()
            stops = set()
        yield node


def vector_jacobian(
    recorder: Any,
    replay: Replay,
    outputs: list[fx.Node],
    leaves: list[Tensor],
    cotangents: list[Tensor],
) -> list[Tensor | None]:
    """Cotangents of `leaves`, None where no path leads to them."""
    recorder.origin = None
    recorder.phase = Phase.ADJOINT
    reached = [
        (replay.values[node], cotangent)
        for node, cotangent in zip(outputs, cotangents, strict=True)
        if replay.values[node].requires_grad
    ]
    if not reached or not leaves:
        return [None for _ in leaves]
    try:
        found = torch.autograd.grad(
            [out for out, _ in reached],
            leaves,
            [cotangent for _, cotangent in reached],
            allow_unused=True,
        )
    except (NotImplementedError, RuntimeError) as error:
        _explain_missing(error, replay)
        raise
    return list(found)


#: How autograd says that an op has no derivative.
_MISSING = re.compile(r"derivative for '?(?:aten::)?(\w+?)'? is not implemented")


def _explain_missing(error: Exception, replay: Replay) -> None:
    """Raise a `CaptureError` at the user's line where an op without a derivative is in the way."""
    match = _MISSING.search(str(error))
    if match is None:
        return
    name = match[1]
    sources = [
        node.meta.get("source")
        for sought in (name, name.removesuffix("_backward"))
        for node in replay.values
        if getattr(getattr(node.target, "_schema", None), "name", "") == f"aten::{sought}"
    ]
    raise CaptureError(
        f"{name} has no derivative in PyTorch",
        where=next((source for source in sources if source is not None), None),
        why="the meta-gradient differentiates every op of the inner step, those of its gradient "
        "included",
        remedy="replace the op by others that have a (second) derivative, or leave the "
        "meta-parameters that need it out of meta=",
    ) from error


def loss_gradient(graph: StepGraph, wanted: frozenset[Key]) -> StepGraph:
    """``(inputs) -> loss`` becomes ``(inputs) -> loss, B_T, contributions`` (cotangent 1).

    Args:
        graph: The validation loss.
        wanted: Inputs besides the state whose cotangent is asked for.
    """
    recorder, inputs = start(graph)
    targets = differentiable_inputs(graph, wanted)
    (loss,) = graph.results
    assert loss is not None

    def run(*tensors: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        replay = Replay(recorder, guards_of(graph))
        replay.bind(graph.placeholders, tensors)
        with torch.enable_grad():
            leaves = [replay.values[node].requires_grad_() for _, node in targets]
            replay.run(calls(graph, *Phase))
            value = replay.values[loss]
            recorder.phase = Phase.ADJOINT
            one = torch.ones_like(value)
            return value.detach(), vector_jacobian(recorder, replay, [loss], leaves, [one])

    value, grads = recorder.run(run, inputs)
    contributions = [(v, grad) for (v, _), grad in zip(targets, grads, strict=True)]
    extra = [(Value(Role.LOSS, "val_loss", "val_loss"), value)]
    return finish(graph, recorder, list(graph.inputs), contributions, extra)
