"""Passes that say with one op what differentiation says with several.

Each is ``before --> after`` with equal values up to rounding. Where rounding changes, only what
differentiation made is rewritten: the step's own values stay those of the user's ops, and the
adjoint goes on sharing them with the step.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from unrollc.optimize.rewriting import call
from unrollc.step import DERIVED

aten = torch.ops.aten

#: Fewer views of one tensor are left as they are.
_FEW = 3


def expand_late(graph: fx.Graph) -> bool:
    """``f(expand(a), b) --> expand(f(a, b))`` for an elementwise op."""
    changed = False
    for node in list(graph.nodes):
        if node.target not in _PLAIN or not _is_derived(node):
            continue
        shape = node.meta["val"].shape
        narrow = [_narrow(arg) for arg in node.args]
        operands = [arg.meta["val"] for arg in narrow if isinstance(arg, fx.Node)]
        own = torch.broadcast_shapes(*(value.shape for value in operands))
        wide = [arg.meta["val"] for arg in node.args if isinstance(arg, fx.Node)]
        if math.prod(own) >= math.prod(shape) or any(v.dim() == 0 for v in (*operands, *wide)):
            continue
        with graph.inserting_before(node):
            made = call(graph, node, node.target, *narrow, **node.kwargs)
        _replace(graph, node, aten.expand.default, made, list(shape))
        changed = True
    return changed


#: Elementwise ops of two operands.
_PLAIN = (
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.add.Tensor,
    aten.sub.Tensor,
)


def _narrow(value: Any) -> Any:
    """What an operand repeats."""
    repeats = isinstance(value, fx.Node) and value.target is aten.expand.default
    return value.args[0] if repeats else value


def sum_without_axis(graph: fx.Graph) -> bool:
    """``reshape(sum(x, axes, keepdim), shape without the axes) --> sum(x, axes)``."""
    changed = False
    for node in _calls(graph, aten.reshape.default):
        total: Any = node.args[0]
        if total.target is not aten.sum.dim_IntList or not _only(total, node):
            continue
        args = (*total.args, *([None] * 3))[:3]
        value, axes = args[0].meta["val"], args[1]
        if not axes or args[2] is not True:
            continue
        gone = {axis % value.dim() for axis in axes}
        kept = [size for axis, size in enumerate(value.shape) if axis not in gone]
        if kept == list(node.meta["val"].shape):
            _replace(graph, node, total.target, args[0], axes, False, **total.kwargs)
            changed = True
    return changed


def sum_once(graph: fx.Graph) -> bool:
    """``sum(sum(x, a, keepdim), b, keepdim) --> sum(x, a and b, keepdim)``: one pass over x.

    Between the two stands a tensor, as large as x where `a` is a short axis.
    """
    changed = False
    for node in _calls(graph, aten.sum.dim_IntList):
        inner: Any = node.args[0]
        if inner.target is not aten.sum.dim_IntList or not _only(inner, node):
            continue
        keeps = [(*each.args, False)[2] is True for each in (inner, node)]
        plain = _is_derived(node) and not node.kwargs and not inner.kwargs
        axes = (inner.args[1], node.args[1])
        if not (plain and all(axes)):
            continue
        value = inner.args[0].meta["val"]
        first = [axis % value.dim() for axis in axes[0]]
        left = [axis for axis in range(value.dim()) if axis not in first]
        rank = inner.meta["val"].dim()
        second = [axis % rank if keeps[0] else left[axis % rank] for axis in axes[1]]  # type: ignore[union-attr]
        if keeps[0] is keeps[1] and not set(first) & set(second):
            _replace(graph, node, node.target, inner.args[0], sorted(first + second), keeps[1])
            changed = True
    return changed


def add_transposed(graph: fx.Graph) -> bool:
    """``t(a) + t(b) --> t(a + b)``; one transposition, which often meets another."""
    changed = False
    for node in _calls(graph, aten.add.Tensor):
        first, second = node.args[:2]
        if not (isinstance(first, fx.Node) and isinstance(second, fx.Node)) or first is second:
            continue
        turned = first.target is aten.t.default and second.target is aten.t.default
        if turned and _only(first, node) and _only(second, node):
            a, b = first.args[0], second.args[0]
            if first.meta["val"].dim() != second.meta["val"].dim():
                continue  # a row is no column
            with graph.inserting_before(node):
                total = call(graph, node, aten.add.Tensor, a, b, **node.kwargs)
            _replace(graph, node, aten.t.default, total)
            changed = True
    return changed


def add_product(graph: fx.Graph) -> bool:
    """``x + a @ b --> addmm(x, a, b)``, and ``expand(row) + a @ b`` likewise."""
    changed = False
    for node in _calls(graph, aten.add.Tensor):
        if node.kwargs or not _is_derived(node):
            continue
        for product, other in _both_ways(node):
            if product.target is not aten.mm.default or not _is_derived(product):
                continue
            if not (_only(product, node) and isinstance(other, fx.Node) and other is not product):
                continue
            if node.meta["val"].shape != product.meta["val"].shape:
                continue
            term = _unexpanded(other, node)
            if other.meta["val"].dtype == product.meta["val"].dtype and term is not None:
                _replace(graph, node, aten.addmm.default, term, *product.args)
                changed = True
                break
    return changed


def _unexpanded(term: fx.Node, user: fx.Node) -> fx.Node | None:
    """What may be added in an ``addmm``: the matrix itself, or the row that it repeats."""
    if term.target is aten.expand.default and _only(term, user):
        row: Any = term.args[0]
        shape = row.meta["val"].shape
        if len(shape) == 2 and shape[0] == 1:
            flat = row.target is aten.reshape.default and row.args[0].meta["val"].dim() == 1
            return row.args[0] if flat else row  # type: ignore[no-any-return]
    return term if term.meta["val"].shape == user.meta["val"].shape else None


def add_multiple(graph: fx.Graph) -> bool:
    """``a + b * number --> add(a, b, alpha=number)``."""
    changed = False
    for node in _calls(graph, aten.add.Tensor):
        if node.kwargs or not _is_derived(node):
            continue
        for scaled, other in _both_ways(node):
            if scaled.target not in (aten.mul.Scalar, aten.mul.Tensor) or other is scaled:
                continue
            factor, number = scaled.args[:2]
            plain = isinstance(number, int | float) and not isinstance(number, bool)
            if not (plain and _only(scaled, node) and isinstance(other, fx.Node)):
                continue
            values = [each.meta["val"] for each in (node, other, factor)]  # type: ignore[union-attr]
            if _is_real(values) and len({(v.dtype, v.shape) for v in values}) == 1:
                _replace(graph, node, aten.add.Tensor, other, factor, alpha=number)
                changed = True
                break
    return changed


def _is_real(values: Sequence[Any]) -> bool:
    return all(isinstance(value, Tensor) and value.is_floating_point() for value in values)


def split_once(graph: fx.Graph) -> bool:
    """Slices of one vector, side by side ``-->`` one ``split_with_sizes``."""
    changed = False
    for base, slices in _views(graph, aten.slice.Tensor).items():
        bounds = [_bounds(base, node) for node in slices]
        known = sorted({bound for bound in bounds if bound is not None})
        if len(known) < _FEW or any(b[0] < a[1] for a, b in itertools.pairwise(known)):
            continue
        sizes, places, end = [], {}, 0
        for start, stop in known:
            if start > end:
                sizes.append(start - end)
            places[start, stop] = len(sizes)
            sizes.append(stop - start)
            end = stop
        length = base.meta["val"].shape[0]
        if length > end:
            sizes.append(length - end)
        pairs = [(n, places[b]) for n, b in zip(slices, bounds, strict=True) if b is not None]
        _projected(graph, pairs, aten.split_with_sizes.default, base, sizes)
        changed = True
    return changed


def _bounds(base: fx.Node, node: fx.Node) -> tuple[int, int] | None:
    """Start and end of a slice of the first axis."""
    given: list[Any] = list(node.args[1:])
    defaults: list[Any] = [0, None, None, 1]
    dim, start, end, step = given + defaults[len(given) :]
    length = base.meta["val"].shape[0]
    start = 0 if start is None else start
    end = length if end is None else min(end, length)
    plain = dim == 0 and step == 1 and not node.kwargs
    return (start, end) if plain and 0 <= start < end else None


def unbind_once(graph: fx.Graph) -> bool:
    """Elements of one vector ``-->`` one ``unbind``."""
    changed = False
    for base, elements in _views(graph, aten.select.int).items():
        length = base.meta["val"].shape[0] if base.meta["val"].dim() else 0
        pairs: list[tuple[fx.Node, int]] = [
            (node, node.args[2] % length)  # type: ignore[operator, misc]
            for node in elements
            if node.args[1] == 0
        ]
        if len(pairs) >= _FEW and length <= 2 * len(pairs):
            _projected(graph, pairs, aten.unbind.int, base)
            changed = True
    return changed


# -- parts ------------------------------------------------------------------------------------


def _calls(graph: fx.Graph, target: Any) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function" and node.target is target]


def _views(graph: fx.Graph, target: Any) -> dict[fx.Node, list[fx.Node]]:
    """The ops of one kind by what they take."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in _calls(graph, target):
        base: Any = node.args[0]
        if node.users and isinstance(base.meta["val"], Tensor):
            found.setdefault(base, []).append(node)
    return found


def _projected(
    graph: fx.Graph, pairs: Sequence[tuple[fx.Node, int]], target: Any, *args: Any
) -> None:
    """Replace nodes by results of one op."""
    first = pairs[0][0]
    with graph.inserting_before(first):
        several = call(graph, first, target, *args)
        parts = {
            index: call(graph, first, operator.getitem, several, index)
            for index in dict.fromkeys(index for _, index in pairs)
        }
    for node, index in pairs:
        node.replace_all_uses_with(parts[index])
        graph.erase_node(node)


def _is_derived(node: fx.Node) -> bool:
    return node.meta["phase"] in DERIVED


def _only(node: fx.Node, user: fx.Node) -> bool:
    return list(node.users) == [user]


def _both_ways(node: fx.Node) -> list[tuple[fx.Node, Any]]:
    """The operands of a sum in both orders."""
    first, second = node.args[:2]
    pairs = [(second, first), (first, second)]
    return [(a, b) for a, b in pairs if isinstance(a, fx.Node) and a.op == "call_function"]


def _replace(graph: fx.Graph, node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> None:
    with graph.inserting_before(node):
        made = call(graph, node, target, *args, **kwargs)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


#: The passes, in order.
FUSIONS: tuple[Callable[[fx.Graph], bool], ...] = (
    expand_late,
    sum_without_axis,
    sum_once,
    add_transposed,
    add_product,
    add_multiple,
    split_once,
    unbind_once,
)
