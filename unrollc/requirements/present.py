"""Slopes at the present values of meta-parameters: clips that saturate, roots at zero.

What depends on hyperparameters and loss parameters alone has a value before anything runs. An op
there whose derivative is zero in every element holds its operand still; one whose derivative is
infinite leaves no meta-gradient. Both are facts about the present values, and are said to be so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from unrollc.requirements.dependence import op_name
from unrollc.requirements.edges import is_projection
from unrollc.requirements.kinks import KINKS
from unrollc.step import Role, StepGraph

#: Ops with an infinite slope somewhere.
_SINGULAR = frozenset(["sqrt", "rsqrt", "pow", "log", "log2", "log10", "div", "reciprocal"])

#: Larger values are left alone; a hyperparameter or a loss's weights are small.
_MOST_ELEMENTS = 1_000_000

Edge = tuple[fx.Node, fx.Node]


@dataclass(frozen=True)
class PresentSlopes:
    """What the present values decide.

    Attributes:
        saturated: (operand, op) with derivative zero, with the reason.
        infinite: (operand, op) with an infinite or undefined derivative, with the reason.
    """

    saturated: dict[Edge, str]
    infinite: dict[Edge, str]


def present_slopes(step: StepGraph, values: Mapping[tuple[Role, str], Tensor]) -> PresentSlopes:
    """Evaluate what depends on known values alone, with the slopes of its kinked ops.

    Args:
        step: A captured graph.
        values: The user's tensors by role and label; those of a loop-changing state or of a
            batch must not be among them.
    """
    known: dict[fx.Node, Any] = {}
    moving: set[fx.Node] = set()
    for value, node in zip(step.inputs, step.placeholders, strict=True):
        if value.role is Role.CONSTANT:
            known[node] = step.constants[value.name]
        elif (value.role, value.label) in values:
            tensor = values[value.role, value.label].detach()
            if tensor.numel() <= _MOST_ELEMENTS and tensor.device.type != "meta":
                known[node] = tensor
                moving.add(node)
    found = PresentSlopes({}, {})
    with torch.no_grad():
        for node in step.graph.nodes:
            if node.op != "call_function" or not moving.intersection(node.all_input_nodes):
                continue
            if any(operand not in known for operand in node.all_input_nodes):
                continue
            moving.add(node)
            known[node] = _evaluate(node, known.__getitem__)
            if not is_projection(node) and op_name(node) in (*KINKS, *_SINGULAR):
                _look(node, known, moving, found)
    return found


def _evaluate(node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    target: Any = node.target
    return target(*args, **kwargs)


def _look(
    node: fx.Node, known: Mapping[fx.Node, Any], moving: set[fx.Node], found: PresentSlopes
) -> None:
    operands = [
        operand
        for operand in node.all_input_nodes
        if operand in moving and known[operand].is_floating_point()
    ]
    with torch.enable_grad():
        leaves = {operand: known[operand].detach().requires_grad_() for operand in operands}
        result = _evaluate(node, lambda operand: leaves.get(operand, known[operand]))
        result = next(iter(result)) if isinstance(result, tuple | list) else result
        if not isinstance(result, Tensor) or not result.requires_grad:
            return
        slopes = torch.autograd.grad(result.sum(), list(leaves.values()), allow_unused=True)
    for operand, slope in zip(leaves, slopes, strict=True):
        here = _shown(known[operand])
        if slope is None:
            continue
        if not torch.isfinite(slope).all():
            found.infinite[operand, node] = (
                f"{op_name(node)} has no finite derivative at the present value {here}"
            )
        elif op_name(node) in KINKS and not slope.any():
            found.saturated[operand, node] = (
                f"{op_name(node)} is flat at the present value {here}: its derivative is zero there"
            )


def _shown(tensor: Tensor) -> str:
    return f"{tensor.item():.6g}" if tensor.numel() == 1 else f"of shape {list(tensor.shape)}"
