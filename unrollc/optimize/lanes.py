"""Lanes: the updates of several parameters, op by op side by side.

The updates of an elementwise optimizer are the same chain of ops for every parameter. A *lane
tuple* holds the corresponding nodes of these chains, one a parameter, and is computed by one op on
packed operands: tensors flattened into one vector (`Kind.FULL`), numbers stacked (`Kind.SCALAR`).
What the lanes have in common, one number for all, stays a number.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from unrollc.differentiate.guarded import is_elementwise
from unrollc.step import Phase

aten = torch.ops.aten

#: Corresponding nodes, one a member.
Tuple = tuple[fx.Node, ...]


class Kind(enum.Enum):
    """How the values of a lane tuple stand in a packed tensor."""

    FULL = "full"  # one element for each element of the parameters
    SCALAR = "scalar"  # one element a parameter


#: Ops that leave a value as it is, up to its strides; on packed values they are dropped.
_SAME = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.clone.default,
    aten.alias.default,
)
#: Ops whose result takes its shape from the operand.
_LIKE = (aten.zeros_like.default, aten.ones_like.default, aten.full_like.default)
_STRIDES = ("memory_format", "layout", "pin_memory")


@dataclass(frozen=True)
class Lane:
    """One op that computes a lane tuple.

    Attributes:
        kind: What its result is.
        target: The op; None where the operand is the result.
        args, kwargs: Its arguments, where a lane tuple stands for its packed value and a node for
            itself, a number that all lanes share.
    """

    kind: Kind
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def operands(self) -> list[Any]:
        return [arg for arg in (*self.args, *self.kwargs.values()) if _is_operand(arg)]


@dataclass
class Lanes:
    """The lane tuples of one step, found from its results back.

    Attributes:
        shapes: Of the members' parameters.
        numbers: Equal for nodes that compute the same (`congruence.numbered`).
        sources: Tuples that are packed already: state, and gradients.
        found: Lane tuples with the op that computes them.
        gathered: Tuples that are put together from their members, with their kind.
    """

    shapes: Sequence[torch.Size]
    numbers: Mapping[fx.Node, int]
    sources: set[Tuple]
    found: dict[Tuple, Lane] = field(default_factory=dict)
    gathered: dict[Tuple, Kind] = field(default_factory=dict)

    def follow(self, nodes: Tuple) -> bool:
        """Find what computes `nodes`, down to sources and to what has to be gathered.

        Returns:
            Whether `nodes` have the shapes of the members, or are all numbers; nothing is found
            otherwise.
        """
        if self.kind_of(nodes) is None:
            return False
        stack = [nodes]
        while stack:
            current = stack.pop()
            if current in self.sources or current in self.found or current in self.gathered:
                continue
            kind = self.kind_of(current)
            assert kind is not None, current
            lane = self._lane(current, kind)
            if lane is None:
                self.gathered[current] = kind
            else:
                self.found[current] = lane
                stack.extend(arg for arg in lane.operands if isinstance(arg, tuple))
        return True

    def kind_of(self, nodes: Tuple) -> Kind | None:
        """How `nodes` may be packed; None if their shapes are not those of the members."""
        values = [node.meta["val"] for node in nodes]
        if not all(isinstance(value, Tensor) for value in values):
            return None
        if len({(value.dtype, value.device) for value in values}) > 1:
            return None
        if all(v.shape == shape for v, shape in zip(values, self.shapes, strict=True)):
            return Kind.FULL
        return Kind.SCALAR if all(value.dim() == 0 for value in values) else None

    def _lane(self, nodes: Tuple, kind: Kind) -> Lane | None:
        first = nodes[0]
        if not all(_alike(node, first) for node in nodes):
            return None
        columns = list(zip(*(node.args for node in nodes), strict=True))
        keys = sorted(first.kwargs)
        columns += list(zip(*([node.kwargs[key] for key in keys] for node in nodes), strict=True))
        operands = [self._operand(column) for column in columns]
        if any(operand is None for operand in operands):
            return None
        plain = [None if operand is _NONE else operand for operand in operands]
        args, values = plain[: len(first.args)], plain[len(first.args) :]
        kwargs = dict(zip(keys, values, strict=True))
        return self._checked(first, kind, tuple(args), kwargs)

    def _operand(self, column: tuple[Any, ...]) -> Any:
        """What stands for the members' arguments in one place; None where nothing does."""
        if not any(isinstance(item, fx.Node) for item in column):
            same = all(type(i) is type(column[0]) and repr(i) == repr(column[0]) for i in column)
            shapes = column == tuple(list(shape) for shape in self.shapes)
            return (_NONE if column[0] is None else column[0]) if same or shapes else None
        if not all(isinstance(item, fx.Node) for item in column):
            return None
        value = column[0].meta["val"]
        equal = len({self.numbers[node] for node in column}) == 1
        if equal and isinstance(value, Tensor) and value.dim() == 0:
            return column[0]
        return column if self.kind_of(column) is not None else None

    def _checked(
        self, first: fx.Node, kind: Kind, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Lane | None:
        """The op, if it does on packed operands what it does on each member."""
        device = first.meta["val"].device
        kinds = set()
        for operand in (*args, *kwargs.values()):
            if isinstance(operand, tuple):
                kinds.add(self.kind_of(operand))
                if operand[0].meta["val"].device != device:
                    return None
        if first.target in _SAME and kinds == {kind}:
            return Lane(kind, None, args[:1], {})
        if first.target in _LIKE and kinds == {kind}:
            kept = {key: value for key, value in kwargs.items() if key not in _STRIDES}
            return Lane(kind, first.target, args, kept)
        cast = first.target is aten._to_copy.default and set(kwargs) <= {"dtype", *_STRIDES}
        if cast and kinds == {kind}:
            return Lane(kind, first.target, args, {"dtype": first.meta["val"].dtype})
        if not is_elementwise(first) or kind not in kinds:
            return None
        # A member of shape [1] has as many elements as a number; the wider operand decides.
        return Lane(kind, first.target, args, kwargs)


class _None:
    """An argument that is None in all lanes."""


_NONE = _None()


def _is_operand(value: Any) -> bool:
    return isinstance(value, tuple | fx.Node)


def _alike(node: fx.Node, first: fx.Node) -> bool:
    """Whether two nodes are the same op of the update, with the same says on singular points."""
    return (
        node.op == "call_function"
        and node.target is first.target
        and node.meta["phase"] is Phase.UPDATE
        and len(node.args) == len(first.args)
        and node.kwargs.keys() == first.kwargs.keys()
        and all(
            bool(node.meta.get(key)) == bool(first.meta.get(key))
            for key in ("removable", "nonsingular")
        )
    )
