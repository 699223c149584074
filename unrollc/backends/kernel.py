"""A function of the generated program as a pure function of flat tensors, which can be compiled.

Tensors that one compiled function hands to another must lie in memory as the other was compiled
for; nothing checks that during a run. So each value has one layout in the whole program: that in
which it was when the program was captured, or row-major order where that has gaps or overlaps. What
a graph would return in another layout it copies into this one.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from unrollc.codegen.function import list_members, lists_of, parameters_of
from unrollc.codegen.literals import literal
from unrollc.errors import BackendError
from unrollc.plan.pieces import Pieces
from unrollc.step import Role, StepGraph, Value, iterate_calls, tensors_of

aten = torch.ops.aten

#: Whose ops a worker process knows: those that come with PyTorch.
_NAMESPACES = ("aten", "prims")


@dataclass(frozen=True)
class Spec:
    """What is fixed of a tensor when code is compiled for it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    device: str

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor of this shape lies in memory as it should."""
        return self.steps_as(tensor.stride())

    def steps_as(self, stride: Sequence[int]) -> bool:
        """Whether other strides lead to the same elements of this shape."""
        return self.stride == stride or all(
            size == 1 or mine == its
            for size, mine, its in zip(self.shape, self.stride, stride, strict=True)
        )

    def empty(self) -> Tensor:
        """Fresh memory for such a tensor."""
        dtype = getattr(torch, self.dtype.removeprefix("torch."))
        return torch.empty_strided(self.shape, self.stride, dtype=dtype, device=self.device)

    def laid_out(self, tensor: Tensor) -> Tensor:
        """A copy that fits."""
        return tensor.new_empty_strided(tensor.shape, self.stride).copy_(tensor)


@dataclass(frozen=True)
class Kernel:
    """One function, ready to be compiled.

    Attributes:
        text: Its ops, one a line, with names that depend on nothing but their order: equal texts
            compute the same.
        inputs, outputs: What it takes and returns.
        takes: Which of the function's tensors the inputs are: positions in the lists that it takes
            over, its parameters and its constants, one behind the other.
        gives: What the function returns, as positions in the kernel's outputs followed by the
            function's tensors; what is returned unchanged is not computed.
        arguments: How many tensors these are.
        lists: How many lists the function takes over.
        residuals: How many of the last returned values stand in a list of their own.
        constants: The graph's constants, on their device.
    """

    text: str
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    takes: tuple[int, ...]
    gives: tuple[int, ...]
    arguments: int
    lists: int
    residuals: int
    constants: tuple[Tensor, ...]


def kernels_of(pieces: Pieces) -> dict[str, Kernel]:
    """Every function of the program by its name.

    Raises:
        BackendError: For an op that is not one of PyTorch's own, and for complex numbers.
    """
    layouts = Layouts(pieces)
    return {name: _kernel(name, graph, layouts) for name, graph in pieces.named_graphs}


class Layouts:
    """The layout of every value, by what it is; see the module.

    Args:
        pieces: The program; its functions are gone through in the order in which a run calls them.
    """

    def __init__(self, pieces: Pieces) -> None:
        self._strides: dict[Any, tuple[int, ...]] = {}
        self._step_of = {f"step_{index}": index for index in range(len(pieces.steps))}
        for index in range(len(pieces.adjoints)):
            step = pieces.sequence[pieces.adjoint_sequence.index(index)]
            self._step_of[f"adjoint_{index}"] = step
        for name, graph in pieces.named_graphs:
            for value, node in [
                *zip(graph.inputs, graph.placeholders, strict=True),
                *_results(graph),
            ]:
                self.spec(name, value, node)

    def spec(self, name: str, value: Value, node: fx.Node) -> Spec:
        """Of an input or output of the function called `name`."""
        (tensor,) = tensors_of(node)
        strides = self._strides.setdefault(self._identity(name, value, tensor), _dense(tensor))
        return Spec(tuple(tensor.shape), strides, str(tensor.dtype), str(tensor.device))

    def inputs(self) -> dict[tuple[str, tuple[int, ...]], tuple[int, ...]]:
        """Strides of the user's tensors, by label and shape."""
        return {key[:2]: strides for key, strides in self._strides.items() if len(key) == 2}

    def _identity(self, name: str, value: Value, tensor: Tensor) -> tuple[Any, ...]:
        shape = tuple(tensor.shape)
        if value.role is Role.RESIDUAL:
            return (value.label, shape, value.role, self._step_of[name])
        if value.role in (Role.COTANGENT, Role.TANGENT):
            return (value.label, shape, value.role, value.of, value.direction)
        if value.role in (Role.LOSS, Role.GRADIENT, Role.NOISE, Role.CONSTANT):
            return (value.label, shape, value.role, name)
        return (value.label, shape)


def _results(graph: StepGraph) -> list[tuple[Value, fx.Node]]:
    pairs = zip(graph.outputs, graph.results, strict=True)
    return [(value, node) for value, node in pairs if node is not None]


def _dense(tensor: Tensor) -> tuple[int, ...]:
    """The strides of a tensor, or those of row-major order where it has gaps or overlaps."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return _row_major(tuple(tensor.shape))
        expected *= size
    return tuple(tensor.stride())


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides))[: len(shape)]


# -- one function -----------------------------------------------------------------------------


def _kernel(name: str, graph: StepGraph, layouts: Layouts) -> Kernel:
    _check_ops(name, graph)
    typed = {node: value for value, node in zip(graph.inputs, graph.placeholders, strict=True)}
    flat = [node for _, _, nodes in list_members(graph) for node in nodes]
    node_of = {value.name: node for node, value in typed.items()}
    flat += [node_of[value.name] for value in parameters_of(graph)]
    constants = [node for node, value in typed.items() if value.role is Role.CONSTANT]
    flat += constants
    results = _results(graph)
    computed = list(dict.fromkeys(node for _, node in results if node.op != "placeholder"))
    text, read = _text(computed, {node: layouts.spec(name, v, node) for v, node in results})
    places = {node: place for place, node in enumerate([*computed, *flat])}
    return Kernel(
        text=text,
        inputs=tuple(layouts.spec(name, typed[node], node) for node in read),
        outputs=tuple(layouts.spec(name, *_first(results, node)) for node in computed),
        takes=tuple(flat.index(node) for node in read),
        gives=tuple(places[node] for _, node in results),
        arguments=len(flat),
        lists=len(lists_of(graph)),
        residuals=sum(value.role is Role.RESIDUAL for value, _ in results),
        constants=tuple(
            graph.constants[node.name].to(node.meta["val"].device) for node in constants
        ),
    )


def _first(results: list[tuple[Value, fx.Node]], node: fx.Node) -> tuple[Value, fx.Node]:
    return next(pair for pair in results if pair[1] is node)


def _check_ops(name: str, graph: StepGraph) -> None:
    for node in iterate_calls(graph):
        target: Any = node.target
        if target.namespace not in _NAMESPACES:
            raise BackendError(
                f"{target} in {name} cannot be compiled by Inductor",
                where=node.meta.get("source"),
                why="it is not one of PyTorch's own ops",
                remedy='pass backend="aten", which calls any op as it is',
            )
        tensors = [t for each in (node, *node.all_input_nodes) for t in tensors_of(each)]
        if any(tensor.is_complex() for tensor in tensors):
            raise BackendError(
                f"{target} in {name} has complex numbers, which Inductor cannot compile",
                where=node.meta.get("source"),
                remedy='pass backend="aten"',
            )


def _text(computed: list[fx.Node], specs: dict[fx.Node, Spec]) -> tuple[str, list[fx.Node]]:
    """The ops that lead to `computed`, one a line, and the inputs that they read."""
    needed = _ancestors(computed)
    names: dict[fx.Node, str] = {}
    lines = []
    order = [node for node in (computed[0].graph.nodes if computed else ()) if node in needed]
    read = [node for node in order if node.op == "placeholder"]
    for number, node in enumerate(order):
        names[node] = f"v{number}"
        if node.op != "placeholder":
            lines += _lines(node, names)
    returned = []
    for node in computed:
        wanted = specs[node]
        (tensor,) = tensors_of(node)
        if not wanted.fits(tensor):
            lines += _permuted(names[node], wanted)
        returned.append(names[node] if wanted.fits(tensor) else f"{names[node]}_laid_out")
    head = f"def compute(call, {''.join(f'{names[node]}, ' for node in read)}):"
    body = [f"    {line}" for line in [*lines, f"return ({''.join(f'{r}, ' for r in returned)})"]]
    return ("\n".join([head, *body]) + "\n" if computed else ""), read


def _ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found


def _lines(node: fx.Node, names: dict[fx.Node, str]) -> list[str]:
    name = names[node]
    if node.target is operator.getitem:
        return [f"{name} = call('getitem', {literal(node.args[0], names)}, {node.args[1]})"]
    args = [literal(arg, names) for arg in node.args]
    args += [f"{key}={literal(value, names)}" for key, value in node.kwargs.items()]
    target: Any = node.target
    if target in _SCALED and "alpha" in node.kwargs:
        scale = literal(node.kwargs["alpha"], names)
        return [
            f"{name}_scaled = call('aten.mul.Tensor', {args[1]}, {scale})",
            f"{name} = call('{_op(target)}', {args[0]}, {name}_scaled)",
        ]
    if target is aten.hardshrink_backward.default:  # NaN compares as false
        return [
            f"{name}_above = call('aten.ge.Scalar', {args[1]}, -{args[2]})",
            f"{name}_below = call('aten.le.Scalar', {args[1]}, {args[2]})",
            f"{name}_inside = call('aten.logical_and.default', {name}_above, {name}_below)",
            f"{name} = call('aten.masked_fill.Scalar', {args[0]}, {name}_inside, 0)",
        ]
    return [f"{name} = call('{_op(target)}', {', '.join(args)})"]


#: Sums that may scale their second operand. Inductor of PyTorch 2.13 fuses such a sum with a matrix
#: product and forgets the scale, so that is written as a product.
_SCALED = (aten.add.Tensor, aten.sub.Tensor)


def _op(target: Any) -> str:
    return f"{target.namespace}.{target.__name__}"


def _permuted(name: str, spec: Spec) -> list[str]:
    """Lines that copy a value into the layout of `spec`: row-major once its axes are sorted."""
    order = sorted(range(len(spec.shape)), key=lambda axis: (-spec.stride[axis], axis))
    back = [order.index(axis) for axis in range(len(order))]
    clone = f"call('aten.clone.default', {name}_sorted, memory_format=torch.contiguous_format)"
    return [
        f"{name}_sorted = call('aten.permute.default', {name}, {order})",
        f"{name}_copied = {clone}",
        f"{name}_laid_out = call('aten.permute.default', {name}_copied, {back})",
    ]
