"""Mixed mode: forward over reverse (Kemaev et al. 2025, "Scalable Meta-Learning via Mixed-Mode
Differentiation").

The update is differentiated in reverse mode, which gives w = Oᵀ·B, the cotangent of the inner
gradient. Where the Jacobian of (∇θ ℓ, ∇φ ℓ) is symmetric, one forward pass over the gradient in
direction (w, 0) yields the Hessian product ∇²θ ℓ · w and the mixed product ∇φ∇θ ℓ · w together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import decomposition_table
from torch.utils import _pytree as pytree

from unrollc.capture.nests import is_continuous
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
from unrollc.differentiate.replay import _EQUIVALENTS, Replay, calls, is_projection, start
from unrollc.differentiate.reverse import vector_jacobian
from unrollc.requirements.dependence import dependence
from unrollc.step import STATE_ROLES, Phase, Role, StepGraph, read_besides_gradients

aten = torch.ops.aten

_INNER = (Phase.FORWARD, Phase.LOSS, Phase.GRADIENT)
_ZEROS = ("zeros", "zeros_like", "new_zeros", "_efficientzerotensor")


class NoForwardFormulaError(Exception):
    """An op has no forward-mode derivative, decomposed or not."""


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
            tangents = _Tangents(recorder, given, step)
            for label, direction in directions.items():
                tangents.tangents[thetas[label]] = direction
            tangents.run(calls(step, *_INNER))
            recorder.origin, recorder.phase = None, Phase.ADJOINT
            products = [
                tangents.tangents.get(gradients[value.label]) if value.label in gradients else None
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


class _Tangents(Replay):
    """Forward mode, one node at a time; a node none of whose inputs has a tangent has none.

    Attributes:
        tangents: Tangents by node; a missing one is a structural zero.
    """

    def __init__(self, recorder: Recorder, given: tuple[Tensor, ...], step: StepGraph) -> None:
        super().__init__(recorder)
        self.bind(step.placeholders, given)
        self.tangents: dict[fx.Node, Any] = {}

    def execute(self, node: fx.Node, phase: Phase | None = None) -> Any:
        args, kwargs = self.arguments(node)
        self.recorder.origin = node
        if is_projection(node):
            source, index = node.args
            if source in self.tangents:
                part = self.tangents[source][index]  # type: ignore[index]
                if part is not None:
                    self.tangents[node] = part
            return args[0][index]
        if not any(source in self.tangents for source in node.all_input_nodes):
            self.recorder.phase = node.meta["phase"]
            return self.call(node, args, kwargs)
        self.recorder.phase = Phase.ADJOINT
        return self._push_forward(node, args, kwargs)

    def _push_forward(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        sources, _ = pytree.tree_flatten((node.args, node.kwargs), is_leaf=_is_node)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        moving = [i for i, s in enumerate(sources) if isinstance(s, fx.Node) and s in self.tangents]
        primals = tuple(leaves[i] for i in moving)
        directions = tuple(self.tangents[sources[i]].to(leaves[i].dtype) for i in moving)
        shape: list[bool] = []

        def function(target: Any) -> Any:
            def run(*moved: Tensor) -> Any:
                filled = list(leaves)
                for i, tensor in zip(moving, moved, strict=True):
                    filled[i] = tensor
                new_args, new_kwargs = pytree.tree_unflatten(filled, spec)
                result = target(*new_args, **new_kwargs)
                if isinstance(result, Tensor):
                    return result
                shape[:] = [isinstance(item, Tensor) for item in result]
                return tuple(item for item in result if isinstance(item, Tensor))

            return run

        target = _EQUIVALENTS.get(node.target, node.target)
        value, tangent = self._jvp(node, function, target, primals, directions)
        if isinstance(value, tuple):
            kept = [self._nonzero(v, t) for v, t in zip(value, tangent, strict=True)]
            self.tangents[node] = _spread(kept, shape)
            return _spread(value, shape)
        if (single := self._nonzero(value, tangent)) is not None:
            self.tangents[node] = single
        return value

    def _jvp(
        self, node: fx.Node, function: Any, target: Any, primals: Any, directions: Any
    ) -> tuple[Any, Any]:
        candidates = [target]
        if node.target in decomposition_table:
            candidates.append(decomposition_table[node.target])
        for candidate in candidates:
            try:
                pushed: tuple[Any, Any] = torch.func.jvp(  # type: ignore[assignment]
                    function(candidate), primals, directions
                )
                return pushed
            except (NotImplementedError, RuntimeError) as error:
                if "forward" not in str(error).lower() and "derivative" not in str(error).lower():
                    raise
        raise NoForwardFormulaError(f"{node.target} has no forward-mode derivative")

    def _nonzero(self, value: Any, tangent: Any) -> Tensor | None:
        if not is_continuous(value):
            return None
        node = self.recorder.node_of(tangent)
        assert node is not None
        name = getattr(getattr(node.target, "_schema", None), "name", "").split("::")[-1]
        return None if name in _ZEROS else tangent


def _spread(items: Sequence[Any], present: list[bool]) -> list[Any]:
    """`items` at the positions that hold a tensor, None elsewhere."""
    remaining = iter(items)
    return [next(remaining) if here else None for here in present]


def _is_node(value: Any) -> bool:
    return isinstance(value, fx.Node)
