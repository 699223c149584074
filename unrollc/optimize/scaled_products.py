"""Products with a scaled matrix: the scale moves to the smaller side, and a product is saved.

The update of SGD is ``θ - lr · G``. Its adjoint needs ``⟨B, G⟩`` for the learning rate, and
products of ``lr · B`` with what the gradient ``G = P @ Q`` was made of. One product serves both::

    G = P @ Q                         D = Pᵀ @ B
    a = sum(B * G)              -->   a = sum(D * Q)
    W = B * lr                        b = D * lr
    b = Pᵀ @ W                        c = (R * lr) @ B
    c = R @ W

`G`, the largest product of a linear layer's step, and `W`, as large as the weights, are gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from unrollc.optimize.rewriting import Maker, sort

aten = torch.ops.aten


@dataclass(frozen=True)
class _Matrix:
    """A value, read as it is or transposed."""

    node: fx.Node
    flipped: bool

    @property
    def T(self) -> _Matrix:  # noqa: N802, what mathematics and PyTorch call it
        return _Matrix(self.node, not self.flipped)


@dataclass(frozen=True)
class _Dot:
    """``sum(B * G)`` with ``G = left @ right``, all read in the orientation of the product."""

    total: fx.Node
    scaled: _Matrix
    left: _Matrix
    right: _Matrix


def share_scaled_products(graph: fx.Graph) -> bool:
    """Rewrite every ``sum(B * (P @ Q))`` whose partner product with ``B * lr`` exists."""
    changed = False
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in list(order):
        scale = _scale_of(node)
        if scale is None:
            continue
        plain, factor = scale
        products = list(_products_with(node))
        if len(products) != _reads(node):
            continue  # the scaled matrix is needed as such
        for dot in _dots_with(plain):
            shared = [p for p in products if _other_factor(p, node, dot) is not None]
            if shared:  # of several the last one, which waits for the dot product the least
                last = max(shared, key=order.__getitem__)
                _rewrite(graph, node, plain, factor, products, dot, last)
                changed = True
                break
    if changed:
        sort(graph)
    return changed


def _scale_of(node: fx.Node) -> tuple[fx.Node, Any] | None:
    """``(B, lr)`` for a matrix ``B * lr`` with a factor of one element."""
    if node.target not in (aten.mul.Tensor, aten.mul.Scalar) or not _is_matrix(node):
        return None
    first, second = node.args
    for plain, factor in ((first, second), (second, first)):
        if not isinstance(plain, fx.Node) or not _alike(plain, node):
            continue
        if not isinstance(factor, fx.Node) or factor.meta["val"].dim() == 0:
            return plain, factor
    return None


def _is_matrix(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 2 and value.is_floating_point()


def _alike(first: fx.Node, second: fx.Node) -> bool:
    a, b = first.meta["val"], second.meta["val"]
    return isinstance(a, Tensor) and (a.shape, a.dtype) == (b.shape, b.dtype)


def _read(node: fx.Node) -> _Matrix:
    """What an operand reads, transpositions seen through."""
    flipped = False
    while node.target is aten.t.default:
        (node,) = node.all_input_nodes
        flipped = not flipped
    return _Matrix(node, flipped)


def _users(node: fx.Node) -> Iterator[fx.Node]:
    """Who reads a matrix, transpositions seen through."""
    for user in node.users:
        if user.target is aten.t.default:
            yield from _users(user)
        else:
            yield user


def _products_with(node: fx.Node) -> Iterator[fx.Node]:
    for user in dict.fromkeys(_users(node)):
        if user.target is aten.mm.default:
            left, right = (_read(arg) for arg in user.args)  # type: ignore[arg-type]
            if (left.node is node) != (right.node is node):
                yield user


def _reads(node: fx.Node) -> int:
    return len(dict.fromkeys(_users(node)))


def _dots_with(plain: fx.Node) -> Iterator[_Dot]:
    """Every ``sum(B * G)`` in which nothing else reads the product `G`."""
    for times in plain.users:
        if times.target is not aten.mul.Tensor or len(times.users) != 1 or len(times.args) != 2:
            continue
        (total,) = times.users
        first, second = times.args
        other = second if first is plain else first
        if total.target is not aten.sum.default or total.kwargs or not isinstance(other, fx.Node):
            continue
        seen = _read(other)
        product = seen.node
        if product.target is aten.mm.default and list(_users(product)) == [times]:
            left, right = (_read(arg) for arg in product.args)  # type: ignore[arg-type]
            yield _Dot(total, _Matrix(plain, seen.flipped), left, right)


def _other_factor(product: fx.Node, scaled: fx.Node, dot: _Dot) -> _Matrix | None:
    """What the inner product of `product`, with the plain matrix for the scaled one, is with.

    ``⟨B, P Q⟩ = ⟨Pᵀ B, Q⟩ = ⟨B Qᵀ, P⟩``, and the same transposed.
    """
    b = _Matrix(scaled, dot.scaled.flipped)
    left, right = (_read(arg) for arg in product.args)  # type: ignore[arg-type]
    forms: dict[tuple[_Matrix, _Matrix], _Matrix] = {
        (dot.left.T, b): dot.right,
        (b.T, dot.left): dot.right.T,
        (b, dot.right.T): dot.left,
        (dot.right, b.T): dot.left.T,
    }
    return forms.get((left, right))


def _rewrite(
    graph: fx.Graph,
    scaled: fx.Node,
    plain: fx.Node,
    factor: Any,
    products: list[fx.Node],
    dot: _Dot,
    shared: fx.Node,
) -> None:
    times = aten.mul.Tensor if isinstance(factor, fx.Node) else aten.mul.Scalar
    for product in products:
        left, right = (_read(arg) for arg in product.args)  # type: ignore[arg-type]
        operand = right if left.node is scaled else left
        on_result = product is shared or _size(product) <= _size(operand.node)
        make = Maker(graph, product)

        def unscaled(matrix: _Matrix, make: Maker = make, on_result: bool = on_result) -> fx.Node:
            if matrix.node is scaled:
                return _oriented(make, _Matrix(plain, matrix.flipped))
            if on_result:
                return _oriented(make, matrix)
            return _oriented(make, _Matrix(make(times, matrix.node, factor), matrix.flipped))

        fresh = make(aten.mm.default, unscaled(left), unscaled(right))
        if product is shared:
            other = _other_factor(product, scaled, dot)
            assert other is not None
            both = make(aten.mul.Tensor, fresh, _oriented(make, other))
            dot.total.args = (both, *dot.total.args[1:])
            product.prepend(dot.total)
        product.replace_all_uses_with(make(times, fresh, factor) if on_result else fresh)
        graph.erase_node(product)


def _size(node: fx.Node) -> int:
    return int(node.meta["val"].numel())


def _oriented(make: Maker, matrix: _Matrix) -> fx.Node:
    return make(aten.t.default, matrix.node) if matrix.flipped else matrix.node
