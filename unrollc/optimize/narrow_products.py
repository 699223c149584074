"""Narrow products that share an operand become one: ``[g; ġ] @ W``, ``A @ [b, c]``.

A product of few rows or columns takes its time to read the large operand. Differentiation makes
pairs of them: the primal and the tangent in mixed mode, or the gates of a recurrent cell pulled
back to what the cell was given. Where the products are wide they keep the processor busy as they
are, and what would be gained is lost to the copy.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from unrollc.optimize.rewriting import Maker, sort
from unrollc.step import DERIVED, StepGraph, build, copy

aten = torch.ops.aten

#: From so many rows or columns on, a product is as fast alone (measured: two of 20 columns take
#: 0.67 of the time as one, two of 64 rows 0.9, two of 256 or 512 as long).
_NARROW = 32

#: The shared operand must be so many times as large as what is copied.
_LARGER = 4


@dataclass(frozen=True)
class _Product:
    """``left @ right``, and maybe something added: `node` is ``mm`` or ``addmm``."""

    node: fx.Node
    left: fx.Node
    right: fx.Node
    added: fx.Node | None

    def other(self, side: str) -> fx.Node:
        return self.right if side == "left" else self.left


def merge_narrow_products(step: StepGraph, *, primal: bool = True) -> StepGraph:
    """``A @ b, A @ c --> split(A @ [b, c])``; ``g @ W, h @ W --> split([g; h] @ W)``.

    Rounding may change, hence the user's own steps are left alone.

    Args:
        step: The graph; it is left as it is.
        primal: Whether products that no differentiation made may be rounded anew as well.
    """
    if _next(step.graph, primal) is None:
        return step
    result = copy(step)
    while (found := _next(result.graph, primal)) is not None:
        _merge(result.graph, *found)
        sort(result.graph)
    return build(result.graph, result.inputs, result.outputs, result.constants)


def _next(graph: fx.Graph, primal: bool) -> tuple[str, list[_Product]] | None:
    """Products to merge and the side of the operand that they share, a large one first."""
    found: dict[tuple[str, fx.Node], list[_Product]] = {}
    for product in filter(None, map(_product, graph.nodes)):
        if not primal and product.node.meta["phase"] not in DERIVED:
            continue
        for side, shared in (("left", product.left), ("right", product.right)):
            if _is_narrow(product.other(side), side):
                found.setdefault((side, shared), []).append(product)
    for (side, shared), group in sorted(found.items(), key=lambda item: -_size(item[0][1])):
        copied = sum(_size(product.other(side)) for product in group)
        if len(group) > 1 and _size(shared) >= _LARGER * copied:
            together = _independent(group)
            if len(together) > 1:
                return side, together
    return None


def _product(node: fx.Node) -> _Product | None:
    args: Any = node.args
    if node.target is aten.mm.default:
        return _Product(node, args[0], args[1], None)
    if node.target is aten.addmm.default and not node.kwargs:
        return _Product(node, args[1], args[2], args[0])
    return None


def _is_narrow(operand: fx.Node, side: str) -> bool:
    rows, columns = operand.meta["val"].shape
    return bool((columns if side == "left" else rows) <= _NARROW)


def _size(node: fx.Node) -> int:
    return int(node.meta["val"].numel())


def _independent(group: Sequence[_Product]) -> list[_Product]:
    """Products none of which needs another of them, the first of the group among them."""
    nodes = {product.node for product in group}
    before = {product.node: _needed(product.node, nodes) for product in group}
    taken: list[_Product] = []
    for product in group:
        mine = product.node
        if all(each.node not in before[mine] and mine not in before[each.node] for each in taken):
            taken.append(product)
    return taken


def _needed(node: fx.Node, among: set[fx.Node]) -> set[fx.Node]:
    """Those of some nodes that a node is computed from."""
    seen: set[fx.Node] = set()
    stack = list(node.all_input_nodes)
    while stack:
        each = stack.pop()
        if each not in seen:
            seen.add(each)
            stack += each.all_input_nodes
    return seen & among


def _merge(graph: fx.Graph, side: str, group: Sequence[_Product]) -> None:
    first = group[0]
    make = Maker(graph, first.node)
    axis = 1 if side == "left" else 0
    several = make(aten.cat.default, [product.other(side) for product in group], axis)
    operands = (first.left, several) if side == "left" else (several, first.right)
    product = make(aten.mm.default, *operands)
    widths = [each.other(side).meta["val"].shape[axis] for each in group]
    for each, (begin, end) in zip(
        group, itertools.pairwise(itertools.accumulate(widths, initial=0)), strict=True
    ):
        at = Maker(graph, each.node)
        part = at(aten.slice.Tensor, product, axis, begin, end)
        if each.added is not None:
            part = at(aten.add.Tensor, part, each.added)
        each.node.replace_all_uses_with(part)
        graph.erase_node(each.node)
