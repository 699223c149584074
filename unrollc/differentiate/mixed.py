"""Mixed mode: forward over reverse (Kemaev et al. 2025, "Scalable Meta-Learning via Mixed-Mode
Differentiation").

The update is differentiated in reverse mode, which gives w = Oᵀ·B, the cotangent of the inner
gradient. Where the Jacobian of (∇θ ℓ, ∇φ ℓ) is symmetric, one forward pass over the gradient in
direction (w, 0) yields the Hessian product ∇²θ ℓ · w and the mixed product ∇φ∇θ ℓ · w together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from unrollc.capture.record import Recorder
from unrollc.differentiate.adjoint import (
    Key,
    StepAdjoint,
    cotangent_inputs,
    differentiable_inputs,
    finish,
    is_counter,
)
from unrollc.differentiate.guarded import guards_of
from unrollc.differentiate.pushforward import Pushforward
from unrollc.differentiate.replay import Replay, calls, start
from unrollc.differentiate.reverse import vector_jacobian
from unrollc.requirements.dependence import dependence
from unrollc.step import STATE_ROLES, Phase, Role, StepGraph, read_besides_gradients

_INNER = (Phase.FORWARD, Phase.LOSS, Phase.GRADIENT)


def mixed_adjoint(step: StepGraph, wanted: frozenset[Key], live: frozenset[Key]) -> StepAdjoint:
    """``step --> adjoint`` in mixed mode; the caller has proved symmetry.

    Raises:
        NoForwardFormulaError: If an op on the way has no forward-mode derivative.
    """
    recorder, inputs = start(step)
    cot_values, cot_tensors, cot_nodes = cotangent_inputs(step, live, recorder)
    targets = differentiable_inputs(step, wanted)
    gradients = {v.label: n for v, n in step.outputs_with(Role.GRADIENT) if n is not None}
    thetas = {v.label: n for v, n in step.inputs_with(Role.THETA)}

    def run(*tensors: Tensor) -> list[Tensor | None]:
        given, cotangents = tensors[: len(inputs)], tensors[len(inputs) :]
        replay = Replay(recorder)
        replay.bind(step.placeholders, given)
        with torch.no_grad():
            replay.run(calls(step, *_INNER))
        through_update, directions = _update_products(
            step, recorder, replay, gradients, targets, cot_nodes, list(cotangents)
        )
        with torch.no_grad():
            moving = {thetas[label]: direction for label, direction in directions.items()}
            pushed = Pushforward(recorder, replay.values, Phase.ADJOINT, moving)
            pushed.run(calls(step, *_INNER))
            recorder.origin, recorder.phase = None, Phase.ADJOINT
            products = [
                pushed.tangents.get(gradients[value.label]) if value.label in gradients else None
                for value, _ in targets
            ]
            return [_sum(a, b) for a, b in zip(through_update, products, strict=True)]

    grads = recorder.run(run, [*inputs, *cot_tensors])
    contributions = [(value, grad) for (value, _), grad in zip(targets, grads, strict=True)]
    graph = finish(step, recorder, [*step.inputs, *cot_values], contributions)
    return StepAdjoint(graph, "mixed", "the inner gradient's Jacobian is proved symmetric")


def mixed_obstacle(step: StepGraph, wanted: frozenset[Key], live: frozenset[Key]) -> str | None:
    """Why mixed mode does not cover this step although its gradient is a true one."""
    for value, node in step.outputs_with(*STATE_ROLES):
        if node is None or (value.role, value.label) not in live:
            continue
        if value.role is Role.BUFFER or node.meta.get("phase") in _INNER:
            return "a buffer carries a cotangent"
    if read_besides_gradients(step):
        return "the update reads a buffer that the forward pass has changed"
    if (state := _state_in_gradient(step)) is not None:
        return f"the inner gradient depends on {state}, which is state"
    with_gradient = {value.label for value, _ in step.outputs_with(Role.GRADIENT)}
    inner = {n for node in calls(step, *_INNER) for n in node.all_input_nodes}
    for value, node in zip(step.inputs, step.placeholders, strict=True):
        if value.role in (Role.HYPER, *STATE_ROLES):
            continue
        if (
            (value.role, value.label) in wanted
            and node in inner
            and value.label not in with_gradient
        ):
            if value.role is Role.INVARIANT:
                return f"{value.label}, computed before the loop, depends on meta-parameters"
            return f"the inner gradient with respect to {value.label} was not captured"
    return None


def _state_in_gradient(step: StepGraph) -> str | None:
    """State besides θ that the inner gradient is a differentiable function of.

    The product ∇s∇θ ℓ · w belongs to its cotangent, and no gradient with respect to s is there.
    """
    inner = {n for node in calls(step, *_INNER) for n in node.all_input_nodes}
    read = {
        node: value.label
        for value, node in step.inputs_with(*STATE_ROLES)
        if value.role is not Role.THETA
        and node in inner
        and node.meta["val"].is_floating_point()
        and not is_counter(node)
    }
    moving = dependence(step).into_gradient if read else set()
    return next((label for node, label in read.items() if node in moving), None)


def _update_products(
    step: StepGraph,
    recorder: Recorder,
    replay: Replay,
    gradients: dict[str, fx.Node],
    targets: list[Any],
    outputs: list[fx.Node],
    cotangents: list[Tensor],
) -> tuple[list[Tensor | None], dict[str, Tensor]]:
    """Reverse mode through the update alone: its direct terms, and w = Oᵀ·B by label."""
    theta_gradients = {
        value.label: node
        for value, node in step.outputs_with(Role.GRADIENT)
        if value.of is Role.THETA and node is not None
    }
    update = Replay(recorder, guards_of(step))
    update.values = {
        node: tensor.detach() if isinstance(tensor, Tensor) else tensor
        for node, tensor in replay.values.items()
    }
    with torch.enable_grad():
        leaves = [update.values[node].requires_grad_() for _, node in targets]
        inner = [update.values[node].requires_grad_() for node in theta_gradients.values()]
        update.run(calls(step, Phase.UPDATE))
        grads = vector_jacobian(recorder, update, outputs, [*leaves, *inner], cotangents)
    direct, pulled = grads[: len(leaves)], grads[len(leaves) :]
    directions = {
        label: w for label, w in zip(theta_gradients, pulled, strict=True) if w is not None
    }
    return direct, directions


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
