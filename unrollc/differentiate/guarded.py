"""Values of which a selection drops entries: ``where`` and ``masked_fill`` guard what they read.

PyTorch's own formulas guard their singular points so. The gradient of a norm is
``(x / norm).masked_fill(norm == 0, 0)``: where the norm is zero, nothing depends on the quotient.
Reverse mode nevertheless runs through it, and the zero cotangent that the selection hands back
becomes 0/0. What a selection drops has derivative zero, whatever the dropped value's own slope
is. So for every singular op it is decided here, from the graph alone, which of its entries are
dropped on all paths; the replay cuts the cotangent there.

A path counts as far as its ops are elementwise, since entries keep their places there. An entry
that a selection *keeps* is never cut: ``where(x >= 0, sqrt(x) ** 2, 0)`` is x at and above zero,
and the zero cotangent that reaches the root at x = 0 stands for 0 · ∞ = 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from unrollc.capture.nests import is_continuous
from unrollc.step import StepGraph

aten = torch.ops.aten

_NAMES = """
acos acosh asin atan2 atanh digamma div erfinv exp exp2 expm1 hypot lgamma log log10 log1p log2
logit pow reciprocal rsqrt sqrt xlogy
"""

#: Elementwise ops with poles, infinite slopes, or a derivative that overflows.
_SINGULAR = frozenset(_NAMES.split())


@dataclass(frozen=True)
class Selection:
    """What one selection drops of a value.

    Attributes:
        mask: The truth values by which it selects.
        drops: The truth value at which the guarded value is dropped.
        shapes: Shapes on the way from the selection back to the value, without repetition.
    """

    mask: fx.Node
    drops: bool
    shapes: tuple[tuple[int, ...], ...]

    def of(self, shape: tuple[int, ...]) -> Selection:
        """The same selection, one operand of this shape further back."""
        return replace(self, shapes=(*self.shapes, shape))

    def dropped(self, values: Mapping[fx.Node, Any]) -> Tensor:
        """Where the value is dropped; an entry used several times, where all uses are."""
        mask: Tensor = values[self.mask]
        found = mask if self.drops else mask.logical_not()
        for shape, target in itertools.pairwise(self.shapes):
            found = _everywhere(found, shape, target)
        return found


Guards = Mapping[fx.Node, tuple[Selection, ...]]


def guards_of(step: StepGraph) -> Guards:
    """The selections that stand between a singular op and everything that depends on it."""
    known: dict[fx.Node, tuple[Selection, ...]] = {}
    for node in reversed(step.graph.nodes):
        if node.op == "call_function" and (found := _selections(node, known)):
            known[node] = found
    return {node: found for node, found in known.items() if _is_singular(node)}


def dropped(selections: tuple[Selection, ...], values: Mapping[fx.Node, Any]) -> Tensor:
    """Where a value is dropped by all of `selections`."""
    first, *rest = (selection.dropped(values) for selection in selections)
    for mask in rest:
        first = first.logical_and(mask)
    return first


def is_elementwise(node: fx.Node) -> bool:
    """Whether each entry of the result depends on the same entry of the operands alone."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def _is_singular(node: fx.Node) -> bool:
    if not is_elementwise(node):
        return False
    target: Any = node.target
    name = target._schema.name.split("::")[-1]
    if name == "div" and not (len(node.args) > 1 and isinstance(node.args[1], fx.Node)):
        return False
    return name in _SINGULAR


def _selections(
    node: fx.Node, known: Mapping[fx.Node, tuple[Selection, ...]]
) -> tuple[Selection, ...]:
    """The selections that end every differentiable path from `node`; none if a path is free."""
    if not isinstance(node.meta.get("val"), Tensor):
        return ()
    found: dict[Selection, None] = {}
    for user in node.users:
        if not _is_differentiable(user):
            continue
        here = _selected(user, node)
        if here is None and is_elementwise(user):
            here = known.get(user)
        if not here:
            return ()
        shape = tuple(node.meta["val"].shape)
        found.update({s if s.shapes[-1] == shape else s.of(shape): None for s in here})
    return tuple(found)


def _is_differentiable(user: fx.Node) -> bool:
    """Whether a cotangent can come back from `user`; comparisons and stops hand none on."""
    if user.op == "output":
        return True
    value = user.meta["val"]
    whole = isinstance(value, Tensor) and not is_continuous(value)
    return not whole and user.target is not aten.detach.default


def _selected(user: fx.Node, node: fx.Node) -> tuple[Selection, ...] | None:
    """What `user` drops of `node`, where it is a selection; one row an op."""
    if user.op != "call_function":
        return None
    args: tuple[Any, ...] = user.args
    if user.target is aten.where.self:
        mask, (kept, other) = args[0], args[1:]
        slots = [False] * (kept is node) + [True] * (other is node)
    elif user.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        mask = args[1]
        slots = [True] * (args[0] is node) + [False] * (args[2] is node)
    elif user.target is aten.index_put.default and _is_masked(args):
        mask = args[1][0]
        slots = [True] * (args[0] is node and args[2] is not node)
    else:
        return None
    shape = tuple(user.meta["val"].shape)
    return (Selection(mask, slots[0], (shape,)),) if len(slots) == 1 else None


def _is_masked(args: tuple[Any, ...]) -> bool:
    """Whether an ``index_put`` overwrites what a mask of the target's shape marks."""
    target, indices = args[:2]
    if len(indices) != 1 or indices[0] is None or any(args[3:]):
        return False
    mask = indices[0].meta["val"]
    return mask.dtype is torch.bool and mask.shape == target.meta["val"].shape


def _everywhere(mask: Tensor, shape: tuple[int, ...], target: tuple[int, ...]) -> Tensor:
    """`mask` over `shape` for a value of shape `target` that was broadcast to `shape`."""
    mask = mask.expand(shape)
    for _ in range(len(shape) - len(target)):
        mask = mask.all(0)
    for axis, (size, own) in enumerate(zip(mask.shape, target, strict=True)):
        if size != own:
            mask = mask.all(axis, keepdim=True)
    return mask
