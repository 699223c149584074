"""C++ for what is done with strided memory: addresses, copies, matrix products.

Run in the worker process; it imports nothing of the package.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

#: C's names of dtypes, and their bytes.
TYPES = {
    "float32": ("float", 4),
    "float64": ("double", 8),
    "int64": ("int64_t", 8),
    "int32": ("int32_t", 4),
    "int16": ("int16_t", 2),
    "int8": ("int8_t", 1),
    "uint8": ("uint8_t", 1),
    "bool": ("bool", 1),
}

#: BLAS's matrix product of a dtype.
PRODUCTS = {"float32": "sgemm_", "float64": "dgemm_"}


class UnsupportedError(Exception):
    """A wrapper does something that has no counterpart here."""


@dataclass(frozen=True)
class View:
    """Elements of a buffer.

    Attributes:
        buffer: Its name: that of an input, or of the statement that allocates it.
        offset: The first element's, in elements of `dtype`.
        shape, stride: As PyTorch's.
        dtype: Its name.
    """

    buffer: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str

    @property
    def dense(self) -> bool:
        """Whether it is all of a buffer without gaps, in some order of its axes."""
        return not self.offset and _extent(self.shape, self.stride) == prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Of a buffer that holds it."""
        return _extent(self.shape, self.stride) * TYPES[self.dtype][1]


def _extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    if not prod(shape):
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


def expanded(view: View, shape: tuple[int, ...]) -> View:
    """It, broadcast to a shape."""
    lead = len(shape) - len(view.shape)
    sizes, steps = (1,) * lead + view.shape, (0,) * lead + view.stride
    for size, wanted in zip(sizes, shape, strict=True):
        if size not in (1, wanted):
            raise UnsupportedError(f"{view.shape} is added to {shape}")
    strides = [0 if size == 1 else step for size, step in zip(sizes, steps, strict=True)]
    return replace(view, shape=shape, stride=tuple(strides))


def same(one: View, other: View) -> bool:
    """Whether two views of one shape step through memory in the same way."""
    return all(
        size == 1 or mine == its
        for size, mine, its in zip(one.shape, one.stride, other.stride, strict=True)
    )


#: The place of a buffer, before it is known.
PLACE = re.compile(r"<([^<>]+)>\+")


def address(view: View, kind: str) -> str:
    offset = f" + {view.offset}" if view.offset else ""
    return f"(({kind})<{view.buffer}>+{offset})"


def copied(source: View, target: View) -> list[str]:
    """Loops that copy one view into another of the same shape, as many elements at once as can be.

    Source and target do not overlap.
    """
    kind, size = TYPES[target.dtype]
    axes = [axis for axis, length in enumerate(target.shape) if length != 1]
    axes.sort(key=lambda axis: -target.stride[axis])
    together = 1
    while axes and target.stride[axes[-1]] == source.stride[axes[-1]] == together:
        together *= target.shape[axes.pop()]
    loops = "".join(
        f"for (int64_t i{axis} = 0; i{axis} < {target.shape[axis]}; ++i{axis}) " for axis in axes
    )
    places = [
        f"({' + '.join([address, *(f'i{axis} * {view.stride[axis]}' for axis in axes)])})"
        for view, address in (
            (target, address(target, f"{kind}*")),
            (source, address(source, f"const {kind}*")),
        )
    ]
    if together == 1:
        return [f"{loops}*{places[0]} = *{places[1]};"]
    return [f"{loops}std::memcpy({places[0]}, {places[1]}, {together * size});"]


def product(left: View, right: View, out: View, alpha: float, beta: float) -> str:
    """BLAS's call for ``out = alpha * left @ right + beta * out``.

    BLAS stores matrices column by column. A row-major result is the column-major one of the
    transposed product: ``out.T = right.T @ left.T``.

    Args:
        left, right, out: Views of shapes [m, k], [k, n] and [m, n].
        alpha, beta: The factors.

    Raises:
        UnsupportedError: If a matrix has no axis along which its elements are neighbours.
    """
    by_columns, leading = _stored(out)
    if not by_columns:
        left, right = _transposed(right), _transposed(left)
        out = _transposed(out)
    operands = []
    for view in (left, right):
        columns, step = _stored(view)
        operands.append(("N" if columns else "T", step, view))
    (a, lda, first), (b, ldb, second) = operands
    (m, n), k = out.shape, left.shape[1]
    kind = TYPES[out.dtype][0]
    return (
        f"{{ const int m = {m}, n = {n}, k = {k}, lda = {lda}, ldb = {ldb}, ldc = {leading}; "
        f"const {kind} alpha = {float(alpha)!r}, beta = {float(beta)!r}; "
        f'{PRODUCTS[out.dtype]}("{a}", "{b}", &m, &n, &k, &alpha, '
        f"{address(first, f'const {kind}*')}, &lda, {address(second, f'const {kind}*')}, &ldb, "
        f"&beta, {address(out, f'{kind}*')}, &ldc); }}"
    )


def _transposed(view: View) -> View:
    return replace(view, shape=view.shape[::-1], stride=view.stride[::-1])


def _stored(view: View) -> tuple[bool, int]:
    """Whether a matrix is stored column by column, and how far its columns (or rows) are apart."""
    (rows, columns), (down, right) = view.shape, view.stride
    if rows == 1 or down == 1:
        step = right if columns > 1 else rows
        if step >= max(rows, 1) and (rows == 1 or down == 1):
            return True, max(step, 1)
    if columns == 1 or right == 1:
        step = down if rows > 1 else columns
        if step >= max(columns, 1):
            return False, max(step, 1)
    raise UnsupportedError(f"a matrix with the strides {view.stride}")
