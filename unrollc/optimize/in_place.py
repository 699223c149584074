"""In place: an elementwise op writes over the operand that dies with it.

That saves an allocation, the faults of its fresh pages and, at the peak, a tensor. The graph stays
pure: an op keeps its functional target, and ``node.meta["into"]`` is the position of the argument
that generated code passes as ``out=``. This must be the last pass over a graph: whatever keeps
another value alive afterwards would keep one that is overwritten.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from unrollc.optimize.views import aliases, refresh_view
from unrollc.step import StepGraph, copy, iterate_calls, tensors_of

aten = torch.ops.aten

#: Ops that compute each element from the elements at its place, and their variants that write into
#: a given tensor, which may be one of the operands. Held by a test of each: equal bits, and no
#: memory but the given one.
OUT_VARIANTS: dict[Any, Any] = {
    aten.abs.default: aten.abs.out,
    aten.add.Tensor: aten.add.out,
    aten.addcdiv.default: aten.addcdiv.out,
    aten.addcmul.default: aten.addcmul.out,
    aten.clamp_min.default: aten.clamp_min.out,
    aten.div.Scalar: aten.div.out,
    aten.div.Tensor: aten.div.out,
    aten.exp.default: aten.exp.out,
    aten.gelu.default: aten.gelu.out,
    aten.gelu_backward.default: aten.gelu_backward.grad_input,
    aten.hardshrink_backward.default: aten.hardshrink_backward.grad_input,
    aten.lerp.Scalar: aten.lerp.Scalar_out,
    aten.log.default: aten.log.out,
    aten.maximum.default: aten.maximum.out,
    aten.minimum.default: aten.minimum.out,
    aten.mul.Scalar: aten.mul.out,
    aten.mul.Tensor: aten.mul.out,
    aten.neg.default: aten.neg.out,
    aten.pow.Tensor_Scalar: aten.pow.Tensor_Scalar_out,
    aten.reciprocal.default: aten.reciprocal.out,
    aten.rsqrt.default: aten.rsqrt.out,
    aten.sigmoid.default: aten.sigmoid.out,
    aten.sigmoid_backward.default: aten.sigmoid_backward.grad_input,
    aten.silu.default: aten.silu.out,
    aten.sqrt.default: aten.sqrt.out,
    aten.sub.Tensor: aten.sub.out,
    aten.tanh.default: aten.tanh.out,
    aten.tanh_backward.default: aten.tanh_backward.grad_input,
    aten.threshold_backward.default: aten.threshold_backward.grad_input,
    aten.where.self: aten.where.self_out,
}

#: A page. What is smaller the allocator has at hand, and the plain call reads better.
_WORTH = 4096


def write_in_place(step: StepGraph, worth: int = _WORTH) -> StepGraph:
    """``c = a * b --> a <- a * b; c = a`` where nothing reads `a` any more.

    Args:
        step: The graph; it is left as it is.
        worth: Smallest size in bytes of a result that is written in place.
    """
    if not any(_qualifies(node, worth) for node in iterate_calls(step)):
        return step
    result = copy(step)
    memory = _Memory(result)
    for position, node in enumerate(iterate_calls(result)):
        if not _qualifies(node, worth):
            continue
        for index, operand in enumerate(node.args):
            if isinstance(operand, fx.Node) and memory.may_overwrite(node, operand, position):
                node.meta["into"] = index
                memory.unite(node, operand)
                break
    for node in result.graph.nodes:
        if "into" in node.meta:
            node.meta["val"] = node.args[node.meta["into"]].meta["val"]
        else:
            refresh_view(node)
    return result


def _qualifies(node: fx.Node, worth: int) -> bool:
    return node.target in OUT_VARIANTS and _bytes(node.meta["val"]) >= worth


def called_op(node: fx.Node) -> Any:
    """The op that generated code calls for a node."""
    return OUT_VARIANTS[node.target] if "into" in node.meta else node.target


def out_name(variant: Any) -> str:
    """What a variant calls the tensor that it writes into."""
    (name,) = (argument.name for argument in variant._schema.arguments if argument.is_out)
    return str(name)


class _Memory:
    """Which values may share memory, and until when it is read.

    What fake tensors say of a reshape (view or copy) is not certain of a run, whose strides can
    differ: an op that may return a view counts as returning one.
    """

    def __init__(self, step: StepGraph) -> None:
        self._parent: dict[int, int] = {}
        self._last: dict[int, int] = {}
        ops = list(iterate_calls(step))
        for node in ops:
            if aliases(node.target):
                for operand in node.all_input_nodes:
                    self.unite(node, operand)
        for position, node in enumerate(ops):
            for each in (node, *node.all_input_nodes):
                self._read(each, position)
        for node in (*step.placeholders, *filter(None, step.results)):
            self._read(node, len(ops))  # somebody else's, or handed to somebody else

    def may_overwrite(self, node: fx.Node, operand: fx.Node, position: int) -> bool:
        """Whether the op at `position` may write its result over `operand`."""
        old, new = operand.meta["val"], node.meta["val"]
        if not isinstance(old, Tensor) or old.dtype.is_complex:
            return False
        mine = self._root(old)
        others = [other for other in node.all_input_nodes if other is not operand]
        return (
            (old.shape, old.stride(), old.dtype) == (new.shape, new.stride(), new.dtype)
            and old.device == new.device
            and _bytes(old) == old.untyped_storage().nbytes()
            and self._last[mine] == position
            and not any(self._root(t) == mine for other in others for t in tensors_of(other))
        )

    def unite(self, first: fx.Node, second: fx.Node) -> None:
        for one in tensors_of(first):
            for other in tensors_of(second):
                a, b = self._root(one), self._root(other)
                if a != b:
                    self._parent[a] = b
                    self._last[b] = max(self._last.get(a, 0), self._last.get(b, 0))

    def _read(self, node: fx.Node, position: int) -> None:
        for tensor in tensors_of(node):
            root = self._root(tensor)
            self._last[root] = max(self._last.get(root, 0), position)

    def _root(self, tensor: Tensor) -> int:
        storage = int(tensor.untyped_storage()._cdata)
        while storage in self._parent:
            storage = self._parent[storage]
        return storage


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
