"""One C++ function for a kernel: what Inductor's Python wrapper does, on bare addresses.

Inductor writes a kernel as C++ loops and a Python function that allocates buffers, calls the loops
and calls matrix products between them. On a processor every step of that function is known ahead:
shapes, strides, which buffer reuses which. So it becomes one C function beside the loops::

    buf0 = empty_strided_cpu((8, 32), (32, 1), torch.float32)           -->
    extern_kernels.mm(arg0_1, arg1_1, out=buf0)                         --> sgemm_(..., scratch + 0)
    cpp_fused_tanh_0(buf0, buf1)                                        --> cpp_fused_tanh_0(...)

which takes the addresses of inputs, outputs and scratch memory, allocates nothing, knows no tensor,
and compiles in the time of its loops. Inductor's own C++ wrappers cost 4 to 5 s of compilation and
a microsecond a tensor at each call.

Run in the worker process; it imports nothing of the package.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NoReturn

#: Where buffers begin: at multiples of so many bytes.
ALIGNED = 64

#: C's names of dtypes, and their bytes.
_TYPES = {
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
_PRODUCTS = {"float32": "sgemm_", "float64": "dgemm_"}


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
        return _extent(self.shape, self.stride) * _TYPES[self.dtype][1]


def _extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    if not prod(shape):
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


def native(source: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> str:
    """C++ that does what a wrapper of Inductor's does.

    Args:
        source: The module that Inductor wrote, for a processor.
        inputs, outputs: What it takes and returns: mappings with "shape", "stride" and "dtype".

    Raises:
        UnsupportedError: If it does anything else than to allocate, to call its loops and to
            multiply matrices.
    """
    module = ast.parse(source)
    loops = _loops(module)
    function = _call_of(module)
    translation = _Translation(loops, inputs, outputs)
    for statement in function.body:
        translation.visit(statement)
    return "\n".join([_HEAD, *(each.text for each in loops.values()), translation.text()])


_HEAD = """\
#include <torch/csrc/inductor/cpp_prefix.h>
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>

extern "C" void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*,
    const float*, const int*, const float*, const int*, const float*, float*, const int*);
extern "C" void dgemm_(const char*, const char*, const int*, const int*, const int*, const double*,
    const double*, const int*, const double*, const int*, const double*, double*, const int*);
"""


# -- what Inductor wrote ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Loops:
    """A function of loops: the types of its arguments, and its text."""

    types: tuple[str, ...]
    text: str


#: The threads of a parallel loop: as many as it was compiled for, or as torch has when it runs.
_THREADS = re.compile(r"num_threads\((\d+)\)")

_SIGNATURE = re.compile(r'extern "C"\s+void\s+kernel\(')


def _loops(module: ast.Module) -> dict[str, _Loops]:
    found = {}
    for statement in module.body:
        match statement:
            case ast.Assign(
                targets=[ast.Name(id=name)],
                value=ast.Call(
                    func=ast.Attribute(attr="cpp_pybinding"),
                    args=[ast.List(elts=types), ast.Constant(value=str(text))],
                ),
            ):
                body, count = _SIGNATURE.subn(f"static void {name}(", text)
                body = _THREADS.sub(r"num_threads(std::min(\1, omp_get_max_threads()))", body)
                _require(count == 1, "loops of another form")
                found[name] = _Loops(tuple(ast.literal_eval(each) for each in types), body)
    return found


def _call_of(module: ast.Module) -> ast.FunctionDef:
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef) and node.name == "call":
            return node
    raise UnsupportedError("there is no wrapper")


def _require(condition: object, what: str) -> None:
    if not condition:
        raise UnsupportedError(what)


def _refuse(node: ast.AST) -> NoReturn:
    raise UnsupportedError(ast.unparse(node)[:200])


# -- the wrapper, statement by statement ------------------------------------------------------


class _Translation:
    """Statements of C++ for those of a wrapper."""

    def __init__(
        self, loops: dict[str, _Loops], inputs: Sequence[Any], outputs: Sequence[Any]
    ) -> None:
        self._loops = loops
        self._inputs = inputs
        self._outputs = outputs
        self._views: dict[str, View] = {}
        self._lines: list[str] = []
        self._sizes: dict[str, int] = {}
        self._born: dict[str, int] = {}
        self._dies: dict[str, int] = {}
        self._places: dict[str, str] = {}

    def visit(self, statement: ast.stmt) -> None:
        """Translate one."""
        match statement:
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Name(id="args")):
                self._take([_named(each) for each in names])
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                self._assign(name, value)
            case ast.Delete(targets=targets):
                for each in targets:
                    self._delete(_named(each))
            case (
                ast.Expr(value=ast.Constant())
                | ast.Expr(
                    value=ast.Call(func=ast.Attribute(value=ast.Name(id="args"), attr="clear"))
                )
            ):
                pass
            case ast.Expr(value=ast.Call() as call):
                self._lines += self._called(call)
            case ast.Return(value=ast.Tuple(elts=values)):
                self._return([self._view(each) for each in values])
            case _:
                _refuse(statement)

    def text(self) -> str:
        """The C function."""
        places, total = placed(self._sizes, self._born, self._dies)
        for buffer, offset in places.items():
            self._places[buffer] = f"(scratch + {offset})"
        body = [_PLACE.sub(lambda found: self._places[found[1]], line) for line in self._lines]
        return _ENTRY_TEXT.format(
            total=total,
            body="\n".join(f"        {line}" for line in body),
        )

    # -- buffers ----------------------------------------------------------------------------------

    def _take(self, names: list[str]) -> None:
        _require(len(names) == len(self._inputs), "another number of inputs")
        for place, (name, given) in enumerate(zip(names, self._inputs, strict=True)):
            dtype = given["dtype"].removeprefix("torch.")
            _require(dtype in _TYPES, dtype)
            shape, stride = tuple(given["shape"]), tuple(given["stride"])
            self._views[name] = View(name, 0, shape, stride, dtype)
            self._places[name] = f"inputs[{place}]"

    def _assign(self, name: str, value: ast.expr) -> None:
        match value:
            case ast.Call(func=ast.Name(id="empty_strided_cpu"), args=[shape, stride, dtype]):
                _require(isinstance(dtype, ast.Attribute) and dtype.attr in _TYPES, "dtype")
                assert isinstance(dtype, ast.Attribute)
                sizes = ast.literal_eval(shape), ast.literal_eval(stride)
                view = View(name, 0, *sizes, dtype.attr)
                self._views[name] = view
                self._sizes[name] = view.nbytes
                self._born[name] = len(self._lines)
            case ast.Name() | ast.Call(func=ast.Name(id="reinterpret_tensor")):
                self._views[name] = self._view(value)
            case _:
                _refuse(value)

    def _delete(self, name: str) -> None:
        buffer = self._views.pop(name).buffer
        if buffer in self._sizes and all(each.buffer != buffer for each in self._views.values()):
            self._dies[buffer] = len(self._lines)

    def _view(self, node: ast.expr) -> View:
        match node:
            case ast.Name(id=name) if name in self._views:
                return self._views[name]
            case ast.Call(
                func=ast.Name(id="reinterpret_tensor"), args=[inner, shape, stride, offset]
            ):
                of = self._view(inner)
                sizes = ast.literal_eval(shape), ast.literal_eval(stride)
                first = of.offset + ast.literal_eval(offset)  # counted from that of `inner`
                return replace(of, offset=first, shape=sizes[0], stride=sizes[1])
        _refuse(node)

    def _return(self, values: list[View]) -> None:
        _require(len(values) == len(self._outputs), "another number of outputs")
        for place, (view, wanted) in enumerate(zip(values, self._outputs, strict=True)):
            spec = View(f"output {place}", 0, tuple(wanted["shape"]), tuple(wanted["stride"]), "")
            spec = replace(spec, dtype=wanted["dtype"].removeprefix("torch."))
            _require((view.shape, view.dtype) == (spec.shape, spec.dtype), "another output")
            own = view.dense and _same(view, spec) and self._sizes.get(view.buffer) == spec.nbytes
            if own and view.buffer not in self._places:
                self._places[view.buffer] = f"outputs[{place}]"
                del self._sizes[view.buffer]
            else:
                self._places[spec.buffer] = f"outputs[{place}]"
                self._lines += _copied(view, spec)

    # -- calls ------------------------------------------------------------------------------------

    def _called(self, call: ast.Call) -> list[str]:
        match call.func:
            case ast.Name(id=name) if name in self._loops:
                return [self._loops_called(name, call.args)]
            case ast.Attribute(value=ast.Name(id="extern_kernels"), attr="mm" | "addmm"):
                return self._multiplied(call)
        _refuse(call)

    def _loops_called(self, name: str, arguments: list[ast.expr]) -> str:
        types = self._loops[name].types
        _require(len(types) == len(arguments), "another number of arguments")
        given = []
        for kind, argument in zip(types, arguments, strict=True):
            if kind.endswith("*"):
                given.append(_address(self._view(argument), kind))
            else:
                given.append(f"static_cast<{kind}>({ast.literal_eval(argument)})")
        return f"{name}({', '.join(given)});"

    def _multiplied(self, call: ast.Call) -> list[str]:
        options = {each.arg: each.value for each in call.keywords}
        *bias, left, right = (self._view(each) for each in call.args)
        out = self._view(options.pop("out"))
        alpha = ast.literal_eval(options.pop("alpha", ast.Constant(1)))
        beta = ast.literal_eval(options.pop("beta", ast.Constant(1 if bias else 0)))
        _require(not options and out.dtype in _PRODUCTS, "a product of another kind")
        lines = []
        if bias:
            lines += _copied(_expanded(bias[0], out.shape), out)
        return [*lines, product(left, right, out, alpha, beta)]


def _named(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    _refuse(node)


def _expanded(view: View, shape: tuple[int, ...]) -> View:
    """It, broadcast to a shape."""
    lead = len(shape) - len(view.shape)
    sizes, steps = (1,) * lead + view.shape, (0,) * lead + view.stride
    for size, wanted in zip(sizes, shape, strict=True):
        _require(size in (1, wanted), "a bias of another shape")
    strides = [0 if size == 1 else step for size, step in zip(sizes, steps, strict=True)]
    return replace(view, shape=shape, stride=tuple(strides))


def _same(one: View, other: View) -> bool:
    """Whether two views of one shape step through memory in the same way."""
    return all(
        size == 1 or mine == its
        for size, mine, its in zip(one.shape, one.stride, other.stride, strict=True)
    )


#: The place of a buffer, before it is known.
_PLACE = re.compile(r"<([^<>]+)>\+")


def _address(view: View, kind: str) -> str:
    offset = f" + {view.offset}" if view.offset else ""
    return f"(({kind})<{view.buffer}>+{offset})"


def _copied(source: View, target: View) -> list[str]:
    """Loops that copy one view into another of the same shape, as many elements at once as can be.

    Source and target do not overlap.
    """
    kind, size = _TYPES[target.dtype]
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
            (target, _address(target, f"{kind}*")),
            (source, _address(source, f"const {kind}*")),
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
    kind = _TYPES[out.dtype][0]
    return (
        f"{{ const int m = {m}, n = {n}, k = {k}, lda = {lda}, ldb = {ldb}, ldc = {leading}; "
        f"const {kind} alpha = {float(alpha)!r}, beta = {float(beta)!r}; "
        f'{_PRODUCTS[out.dtype]}("{a}", "{b}", &m, &n, &k, &alpha, '
        f"{_address(first, f'const {kind}*')}, &lda, {_address(second, f'const {kind}*')}, &ldb, "
        f"&beta, {_address(out, f'{kind}*')}, &ldc); }}"
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


# -- scratch memory ---------------------------------------------------------------------------


def placed(
    sizes: dict[str, int], born: dict[str, int], dies: dict[str, int]
) -> tuple[dict[str, int], int]:
    """Offsets at which buffers do not overlap while they live, and the end of the last one.

    The largest are placed first, each at the lowest offset that is free for as long as it lives.
    """
    offsets: dict[str, int] = {}
    forever = max([0, *dies.values(), *born.values()]) + 1
    for name in sorted(sizes, key=lambda each: -sizes[each]):
        first, last = born[name], dies.get(name, forever)
        taken = sorted(
            (offsets[other], offsets[other] + _rounded(sizes[other]))
            for other in offsets
            if born[other] <= last and first <= dies.get(other, forever)
        )
        offsets[name] = _gap(taken, _rounded(sizes[name]))
    return offsets, max([0, *(offsets[name] + _rounded(sizes[name]) for name in sizes)])


def _gap(taken: Iterator[tuple[int, int]] | list[tuple[int, int]], size: int) -> int:
    at = 0
    for begin, end in taken:
        if at + size <= begin:
            break
        at = max(at, end)
    return at


def _rounded(size: int) -> int:
    return -(-max(size, 1) // ALIGNED) * ALIGNED


_ENTRY_TEXT = """\
extern "C" const int64_t unrollc_scratch = {total};

// Returns 0, or 1 with the error's text in `said`, which holds 256 characters.
extern "C" int unrollc_run(char* const* inputs, char* const* outputs, char* scratch, char* said)
{{
    try {{
{body}
    }} catch (const std::exception& error) {{
        std::strncpy(said, error.what(), 255);
        said[255] = 0;
        return 1;
    }}
    return 0;
}}
"""
