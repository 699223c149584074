"""Symbolic zeros: which results of an op are zero by structure, given which operands are."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from unrollc.step import Role, StepGraph

_MAKERS = frozenset(["zeros", "zeros_like", "new_zeros", "_efficientzerotensor"])
_FILLERS = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0, "fill": 1}
#: Zero if one of the first two operands is.
PRODUCTS = frozenset(["mul", "mm", "bmm", "mv", "dot", "ger", "outer", "matmul"])
_SUMS = frozenset(["add", "sub", "cat", "stack", "maximum", "minimum"])

#: f(0) = 0 for the first operand, whatever the others are.
_KEPT = """
neg t view reshape _unsafe_view _reshape_alias expand permute transpose sum mean cumsum slice
select index index_select gather unsqueeze squeeze alias detach clone _to_copy div
diagonal flip roll split split_with_sizes unbind chunk as_strided_copy repeat
relu abs sgn sign tanh sin sinh asin atan square sqrt erf expm1 log1p leaky_relu gelu silu
"""
_KEEPING = frozenset(_KEPT.split())


def is_zero(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], zero: Callable[[Any], bool]
) -> bool:
    """Whether every result of the ATen op `name` is zero by structure.

    Args:
        name: The op's name without overload, e.g. ``mul``.
        args: Its operands.
        kwargs: Its keyword arguments, such as the ``alpha`` of ``sub``.
        zero: Whether an operand is known to be zero.
    """
    if name in _MAKERS:
        return True
    if name in _FILLERS:
        position = _FILLERS[name]
        return len(args) > position and zero(args[position])
    if name in PRODUCTS:
        return zero(args[0]) or zero(args[1])
    if name in _SUMS:
        if name == "sub" and args[0] is args[1]:
            return kwargs.get("alpha", 1) == 1 or zero(args[0])
        operands = args[0] if name in ("cat", "stack") else args[:2]
        return all(zero(operand) for operand in operands)
    if name == "where":
        return zero(args[1]) and zero(args[2])
    if name == "copy":  # copy(target, source) is the source
        return zero(args[1])
    if name == "masked_fill":
        return zero(args[0]) and zero(args[2])
    if name == "pow":
        return zero(args[0]) and isinstance(args[1], int | float) and args[1] > 0
    if name in _KEEPING or name.endswith("_backward"):
        return zero(args[0])
    return False


class ZeroTracker(TorchDispatchMode):
    """Follows symbolic zeros through ops while they run.

    Attributes:
        zeros: The tensors known to be zero, by id (and kept alive, so that ids stay theirs).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.zeros: dict[int, Tensor] = {}

    def is_zero(self, operand: Any) -> bool:
        """Whether an operand, a tensor or a number, is zero by structure."""
        if isinstance(operand, Tensor):
            return id(operand) in self.zeros
        return isinstance(operand, int | float) and operand == 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if is_zero(func._schema.name.split("::")[-1], args, kwargs or {}, self.is_zero):
            for tensor in pytree.tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self.zeros[id(tensor)] = tensor
        return result


def zeros_of(step: StepGraph) -> set[fx.Node]:
    """The nodes of a graph whose values are zero by structure."""
    found = {
        node
        for value, node in step.inputs_with(Role.CONSTANT)
        if not step.constants[value.name].any()
    }

    def zero(operand: Any) -> bool:
        if isinstance(operand, fx.Node):
            return operand in found
        return isinstance(operand, int | float) and operand == 0

    for node in step.graph.nodes:
        if node.op != "call_function":
            continue
        target: Any = node.target
        if target is operator.getitem:
            vanishes = zero(node.args[0])
        else:
            name = target._schema.name.split("::")[-1]
            vanishes = is_zero(name, node.args, node.kwargs, zero)
        if vanishes:
            found.add(node)
    return found
