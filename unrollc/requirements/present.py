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
        undefined: (operand, op) without a finite derivative, with the reason.
    """

    saturated: dict[Edge, str]
    undefined: dict[Edge, str]


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
    slopes = _slopes(node, known, operands, 0.0)
    for operand, slope in slopes.items():
        here = _shown(known[operand])
        if not torch.isfinite(slope).all():
            found.undefined[operand, node] = (
                f"{op_name(node)} has no finite derivative at the present value {here}"
            )
        elif op_name(node) in KINKS and not slope.any():
            aside = [_slopes(node, known, operands, side)[operand] for side in (-_ASIDE, _ASIDE)]
            if any(slope.any() for slope in aside):
                found.undefined[operand, node] = (
                    f"{op_name(node)} has a kink at the present value {here}"
                )
            else:
                found.saturated[operand, node] = (
                    f"{op_name(node)} is flat at the present value {here}: "
                    "its derivative is zero there"
                )


#: How far to look to both sides of a present value, relative to it or to 1.
_ASIDE = 1e-4


def _slopes(
    node: fx.Node, known: Mapping[fx.Node, Any], operands: list[fx.Node], aside: float
) -> dict[fx.Node, Tensor]:
    """The derivatives of an op in those operands in which it has one."""
    with torch.enable_grad():
        leaves = {}
        for operand in operands:
            value = known[operand].detach()
            leaves[operand] = (value + aside * value.abs().clamp(min=1.0)).requires_grad_()
        result = _evaluate(node, lambda operand: leaves.get(operand, known[operand]))
        result = next(iter(result)) if isinstance(result, tuple | list) else result
        if not isinstance(result, Tensor) or not result.requires_grad:
            return {}
        slopes = torch.autograd.grad(
            result, list(leaves.values()), _weights(result), allow_unused=True
        )
    return {
        operand: slope for operand, slope in zip(leaves, slopes, strict=True) if slope is not None
    }


def _weights(result: Tensor) -> Tensor:
    """A cotangent under which the slopes of several elements do not cancel."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(result.shape, generator=generator, dtype=torch.float64)
    return (0.5 + drawn).to(dtype=result.dtype, device=result.device)


def _shown(tensor: Tensor) -> str:
    return f"{tensor.item():.6g}" if tensor.numel() == 1 else f"of shape {list(tensor.shape)}"
