"""Arithmetic on a packed vector, piece by piece.

A packed optimizer state is one vector, and its update begins with the gradients side by side. Read
and written as one, each such vector goes through memory once more than it must: products write
their results, a copy puts them side by side, a learning rate is written out for every element. In
compiled loops the pieces can be worked on where they are::

    g = cat([g0, g1]); m = 0.9 * m + 0.1 * g; d0, d1 = split(c * m, [n0, n1])       -->
    m0 = 0.9 * m[:n0] + 0.1 * g0; m1 = ...; m = cat([m0, m1]); d0 = c * m0; d1 = c * m1

Every element is computed by the same ops as before. Run in the worker process; it imports torch
alone.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

#: Fewer elements are not worth another loop a piece.
_FEWEST = 1024


def spread(module: fx.GraphModule) -> fx.GraphModule:
    """The same with pointwise ops on concatenated vectors done piece by piece.

    Args:
        module: Functional ops of tensors; each node has its value in ``meta["val"]``.
    """
    return _Spreading().of(module)


class _Spreading:
    """Writes a graph anew; vectors that exist in pieces are put together where they must be."""

    def __init__(self) -> None:
        self._graph = fx.Graph()
        self._whole: dict[fx.Node, fx.Node] = {}  # old nodes -> new ones
        self._pieces: dict[fx.Node, list[fx.Node]] = {}  # old nodes -> new ones

    def of(self, module: fx.GraphModule) -> fx.GraphModule:
        for node in module.graph.nodes:
            if node.target is operator.getitem and node.args[0] in self._pieces:  # of a split
                self._whole[node] = self._pieces[node.args[0]][node.args[1]]
            elif (pieces := self._in_pieces(node)) is not None:
                self._pieces[node] = pieces
            else:
                self._whole[node] = self._graph.node_copy(node, self._joined)
        self._graph.eliminate_dead_code()
        return fx.GraphModule(module, self._graph)

    def _in_pieces(self, node: fx.Node) -> list[fx.Node] | None:
        """Its pieces, if it is best computed so."""
        if node.op != "call_function":
            return None
        if node.target is aten.cat.default and _is_worth_it(node):
            return [self._joined(each) for each in node.args[0]]  # type: ignore[union-attr, arg-type]
        if node.target is aten.split_with_sizes.default:
            return self._matching(*node.args[:2])  # type: ignore[arg-type]
        return self._op_in_pieces(node) if _is_pointwise(node) else None

    def _op_in_pieces(self, node: fx.Node) -> list[fx.Node] | None:
        operands = [each for each in node.all_input_nodes if _value(each).ndim]
        given = [self._pieces[each] for each in operands if each in self._pieces]
        if not given or any(_value(each).shape != _value(node).shape for each in operands):
            return None
        sizes = _sizes(given[0])
        if any(_sizes(each) != sizes for each in given):
            return None
        parts = {each: self._parts(each, sizes) for each in operands}
        found = []
        for number in range(len(sizes)):

            def piece(operand: fx.Node, number: int = number) -> fx.Node:
                if operand in parts:
                    return parts[operand][number]
                return self._joined(operand)

            args, kwargs = fx.map_arg((node.args, node.kwargs), piece)
            found.append(self._call(node.target, args, kwargs))
        return found

    def _parts(self, operand: fx.Node, sizes: Sequence[int]) -> list[fx.Node]:
        if operand in self._pieces:
            return self._pieces[operand]
        whole = self._joined(operand)
        ends = itertools.accumulate(sizes)
        pairs = zip(sizes, ends, strict=True)
        return [self._call(aten.slice.Tensor, (whole, 0, end - n, end), {}) for n, end in pairs]

    def _matching(self, operand: fx.Node, sizes: Sequence[int]) -> list[fx.Node] | None:
        """The pieces of an operand, if they have these sizes."""
        pieces = self._pieces.get(operand)
        return pieces if pieces is not None and _sizes(pieces) == list(sizes) else None

    def _joined(self, node: fx.Node) -> fx.Node:
        """The new node for an old one, put together if it is in pieces."""
        if node not in self._whole:
            self._whole[node] = self._call(aten.cat.default, (list(self._pieces[node]),), {})
        return self._whole[node]

    def _call(self, target: Any, args: Any, kwargs: Any) -> fx.Node:
        node = self._graph.call_function(target, args, kwargs)
        values = fx.map_arg((args, kwargs), _value)
        node.meta["val"] = target(*values[0], **values[1])
        return node


def _value(node: fx.Node) -> Tensor:
    value: Tensor = node.meta["val"]
    return value


def _sizes(pieces: Sequence[fx.Node]) -> list[int]:
    return [_value(each).shape[0] for each in pieces]


def _is_worth_it(node: fx.Node) -> bool:
    """Whether it is a long vector whose pieces have its dtype."""
    value = _value(node)
    alike = all(_value(each).dtype is value.dtype for each in node.all_input_nodes)
    return alike and value.ndim == 1 and value.numel() >= _FEWEST and len(node.args) == 1


def _is_pointwise(node: fx.Node) -> bool:
    target: Any = node.target
    tags = getattr(target, "tags", ())
    converts = target is torch.ops.prims.convert_element_type.default
    single = isinstance(node.meta.get("val"), Tensor)
    return single and (torch.Tag.pointwise in tags or converts)
