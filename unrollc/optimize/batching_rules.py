"""Batching rules of our own: where `torch.func.vmap` has none, or takes more ops than needed.

A rule gets the op's operands and says for which of them the axis of tasks is in front; where it
does not apply, it returns None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


@dataclass(frozen=True)
class Operands:
    """What an op of one task is given, on the tensors of many.

    Attributes:
        node: The op.
        args: The operands; tensors of `own` have the axis in front.
        own: For each operand whether it has.
        dims: The number of dimensions that each has for one task; None for what is no tensor.
        results: Shapes of the results for one task; None for what is no tensor.
        count: The number of tasks.
    """

    node: fx.Node
    args: Sequence[Any]
    own: Sequence[bool]
    dims: Sequence[int | None]
    results: Sequence[torch.Size | None]
    count: int

    def spread(self, at: int) -> Any:
        """An operand with the axis in front."""
        arg = self.args[at]
        return arg if self.own[at] else repeated(arg, self.count)


def repeated(value: Any, count: int) -> Any:
    """``[...] --> [count, ...]``"""
    if not isinstance(value, Tensor):
        return value
    return value.expand(count, *value.shape).contiguous()


def _addmm(given: Operands, target: Any, kwargs: Any) -> Any:
    """``bias + x @ w --> baddbmm``; vmap adds in an op of its own."""
    if not (given.own[1] and given.own[2]):
        return None
    bias = given.spread(0)
    bias = bias.unsqueeze(1) if given.dims[0] == 1 else bias
    return aten.baddbmm.default(bias, given.args[1], given.args[2], **kwargs)


def _batch_norm(given: Operands, target: Any, kwargs: Any) -> Any:
    """The channels of all tasks side by side: each is normalised by itself."""

    def flat(at: int) -> Any:
        value, dims = given.spread(at), given.dims[at]
        if dims is None:
            return value
        if dims < 2:
            return value.reshape(math.prod(value.shape))
        value = value.transpose(0, 1)
        return value.reshape(value.shape[0], -1, *value.shape[3:])

    def apart(value: Tensor | None, shape: torch.Size | None) -> Any:
        if value is None or shape is None:
            return None
        if len(shape) < 2:
            return value.reshape(given.count, *shape)
        return value.reshape(shape[0], given.count, *shape[1:]).transpose(0, 1)

    found = target(*(flat(at) for at in range(len(given.args))), **kwargs)
    return tuple(apart(*pair) for pair in zip(found, given.results, strict=True))


def _layer_norm(given: Operands, target: Any, kwargs: Any) -> Any:
    """``layer norm with weights --> layer norm without, times weight, plus bias``."""
    sizes, weight, bias, eps = given.args[1:]
    out, mean, rstd = target(given.spread(0), sizes, None, None, eps)
    axes = range((given.dims[0] or 0) - len(sizes))
    if weight is not None:
        out = out * _inserted(weight, given.own[2], axes)
    if bias is not None:
        out = out + _inserted(bias, given.own[3], axes)
    return out, mean, rstd


def _layer_norm_backward(given: Operands, target: Any, kwargs: Any) -> Any:
    """The same in its derivative; what it normalises is normalised again, not by saved means."""
    grad, x, sizes, mean, rstd, weight, _, mask = (given.spread(at) for at in range(8))
    forward = _forward_of(given.node)
    if forward is None:
        return None
    axes = range((given.dims[0] or 0) - len(sizes))
    summed = [axis + 1 for axis in range(len(axes))]

    def total(value: Tensor) -> Tensor:
        return value.sum(summed) if summed else value

    normal = grad if weight is None else grad * _inserted(weight, True, axes)
    alone = [mask[0], False, False]
    dx = target(normal, x, sizes, mean, rstd, None, None, alone)[0] if mask[0] else None
    dw = None
    if mask[1]:
        plain = aten.native_layer_norm.default(x, sizes, None, None, forward.args[4])[0]
        dw = total(grad * plain)
    return dx, dw, total(grad) if mask[2] else None


def _forward_of(backward: fx.Node) -> fx.Node | None:
    """The layer norm whose mean its derivative reads."""
    mean = backward.args[3]
    source = mean.args[0] if isinstance(mean, fx.Node) and mean.args else None
    known = isinstance(source, fx.Node) and source.target is aten.native_layer_norm.default
    return source if known else None  # type: ignore[return-value]


def _inserted(value: Tensor, own: bool, axes: range) -> Tensor:
    """A weight of each task against tensors with further axes behind that of tasks."""
    if not own:
        return value
    for _ in axes:
        value = value.unsqueeze(1)
    return value


#: Rules by op.
RULES: dict[Any, Callable[[Operands, Any, Any], Any]] = {
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten.addmm.default: _addmm,
    aten._native_batch_norm_legit_functional.default: _batch_norm,
    aten._native_batch_norm_legit.no_stats: _batch_norm,
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten.native_batch_norm_backward.default: _batch_norm,
}
