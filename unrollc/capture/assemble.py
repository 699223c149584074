"""From a recorder to a `StepGraph`: canonical order of inputs, exact names, nothing dead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from unrollc.capture.naming import Names
from unrollc.capture.record import Recorder
from unrollc.errors import CaptureError
from unrollc.step import Role, StepGraph, Value, build, placeholder

#: Order of a graph's inputs by role.
_ORDER = (
    Role.THETA,
    Role.OPT_STATE,
    Role.BUFFER,
    Role.AVERAGE,
    Role.HYPER,
    Role.CONTEXT,
    Role.INVARIANT,
    Role.CONSTANT,
    Role.BATCH,
    Role.NOISE,
    Role.COTANGENT,
    Role.RESIDUAL,
    Role.TANGENT,
)


def assemble(
    recorder: Recorder,
    values: Sequence[Value],
    outputs: Sequence[tuple[Value, fx.Node | None]],
    names: Names,
    lifted: list[Tensor],
    known_constants: Mapping[str, Tensor] | None = None,
) -> StepGraph:
    """The recorded graph with typed inputs and outputs.

    Args:
        recorder: What was recorded.
        values: Its explicit inputs, in the order in which they were made.
        outputs: What is returned.
        names: Identifiers for labels.
        lifted: Tensors from outside that earlier graphs lifted; new ones are appended.
        known_constants: Constants among `values`, by name.
    """
    explicit = {value.name: value for value in values}
    inputs: list[tuple[Value, fx.Node]] = []
    constants: dict[str, Tensor] = dict(known_constants or {})
    special: dict[fx.Node, Value] = {}
    for tensor, node in recorder.lifted:
        index = next((i for i, known in enumerate(lifted) if known is tensor), len(lifted))
        if index == len(lifted):
            lifted.append(tensor)
        label = closure_label(index)
        special[node] = Value(Role.CONTEXT, label, names(label))
    for tensor, node in recorder.constants:
        special[node] = Value(Role.CONSTANT, node.name, node.name)
        constants[node.name] = tensor
    for index, (noise, node) in enumerate(recorder.noise):
        special[node] = Value(Role.NOISE, f"noise {index}", f"noise_{index}", noise=noise)
    _refuse_mutation(node for _, node in outputs if node is not None)
    for node in recorder.graph.nodes:
        if node.op == "placeholder":
            inputs.append((special[node] if node in special else explicit[node.name], node))
    return _rebuild(inputs, outputs, constants)


def _refuse_mutation(results: Iterable[fx.Node]) -> None:
    """What is still in place after functionalization writes to a tensor from outside."""
    for node in _needed(results):
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            raise CaptureError(
                "the code changes a tensor from outside in place, and uses it",
                where=node.meta.get("source"),
                why="it is no parameter, no buffer and no optimizer state: no step would hand its "
                "new value to the next",
                remedy="make it a buffer of the model (register_buffer), or keep it in "
                "optimizer.state",
            )


def closure_label(index: int) -> str:
    """The label of a tensor that the user's code brought in from outside."""
    return f"closure[{index}]"


def assemble_graph(
    graph: StepGraph,
    inputs: Iterable[tuple[Value, fx.Node]],
    outputs: Sequence[tuple[Value, fx.Node | None]],
) -> StepGraph:
    """`graph` with retyped inputs and a selection of its outputs."""
    return _rebuild(list(inputs), outputs, graph.constants)


def _rebuild(
    inputs: list[tuple[Value, fx.Node]],
    outputs: Sequence[tuple[Value, fx.Node | None]],
    constants: dict[str, Tensor],
) -> StepGraph:
    needed = _needed([node for _, node in outputs if node is not None])
    kept = [
        (value, node)
        for value, node in inputs
        if value.role not in (Role.CONSTANT, Role.NOISE) or node in needed
    ]
    slots = sorted(kept, key=lambda slot: _ORDER.index(slot[0].role))
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for value, origin in slots:
        made = placeholder(graph, value.name)
        made.meta = dict(origin.meta)
        copies[origin] = made
    for node in _in_order(needed):
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] if node is not None else None for _, node in outputs))
    typed = tuple(value for value, _ in slots)
    used = {v.name: constants[v.name] for v in typed if v.role is Role.CONSTANT}
    return build(graph, typed, tuple(value for value, _ in outputs), used)


def _needed(roots: Iterable[fx.Node]) -> set[fx.Node]:
    needed: set[fx.Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    return needed


def _in_order(nodes: set[fx.Node]) -> list[fx.Node]:
    if not nodes:
        return []
    graph = next(iter(nodes)).graph
    return [node for node in graph.nodes if node in nodes and node.op != "placeholder"]


def same_graph(first: StepGraph, second: StepGraph) -> bool:
    """Whether two graphs compute the same function by the same ops in the same order."""
    return _canonical(first) == _canonical(second)


def _canonical(step: StepGraph) -> tuple[Any, ...]:
    number = {node: index for index, node in enumerate(step.graph.nodes)}
    rows = [
        (
            node.op,
            node.target if node.op == "call_function" else None,
            repr(fx.map_arg((node.args, node.kwargs), lambda n: f"%{number[n]}")),
            _meta(node),
        )
        for node in step.graph.nodes
    ]
    fixed = [(name, tensor.dtype, tensor.tolist()) for name, tensor in step.constants.items()]
    return (tuple(rows), step.inputs, step.outputs, repr(fixed))


def _meta(node: fx.Node) -> str:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ""
    return f"{tuple(value.shape)} {value.dtype} {value.device}"


@dataclass(frozen=True)
class Slice:
    """Arithmetic of known scalars, cut out of a recording.

    Attributes:
        inputs: Labels of the scalars that it reads.
        module: ``(*inputs) -> (*results)`` on CPU, or None where there is no result.
    """

    inputs: tuple[str, ...]
    module: fx.GraphModule | None

    def run(self, concrete: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        if self.module is None:
            return ()
        return tuple(self.module(*(concrete[label] for label in self.inputs)))


@dataclass(frozen=True)
class Concretes:
    """What capture took from known scalars and from lengths in the data, as a function of them.

    Attributes:
        guards: The values that Python saw.
        guarded: Computes them anew.
        counters: Labels of scalars that the step changes.
        counted: Computes these.
    """

    guards: tuple[float | int | bool | list[int], ...]
    guarded: Slice
    counters: tuple[str, ...]
    counted: Slice

    @property
    def reads(self) -> set[str]:
        """Labels of all that the guards and counters depend on."""
        return {*self.guarded.inputs, *self.counted.inputs}

    def accept(self, concrete: Mapping[str, Tensor]) -> bool:
        """Whether Python would see the same values under `concrete`."""
        if any(label not in concrete for label in self.guarded.inputs):
            return False
        seen = self.guarded.run(concrete)
        return all(
            (s.tolist() if isinstance(g, list) else s.item()) == g
            for s, g in zip(seen, self.guards, strict=True)
        )

    def advance(self, concrete: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The counters after the step."""
        return dict(zip(self.counters, self.counted.run(concrete), strict=True))


def labels_of_nodes(
    recorder: Recorder, values: Sequence[Value], lifted: Sequence[Tensor]
) -> dict[fx.Node, str]:
    """The labels of a recording's explicit inputs, and of what it lifted from outside."""
    named = {value.name: value.label for value in values}
    labels = {node: named[node.name] for node in recorder.graph.nodes if node.name in named}
    for tensor, node in recorder.lifted:
        labels[node] = closure_label(next(i for i, t in enumerate(lifted) if t is tensor))
    return labels


def concretes_of(
    recorder: Recorder, labels: Mapping[fx.Node, str], counters: Mapping[str, fx.Node]
) -> Concretes:
    """Cut the arithmetic of known scalars out of a recording."""
    return Concretes(
        tuple(guard.value for guard in recorder.guards),
        _slice(recorder, labels, [guard.node for guard in recorder.guards]),
        tuple(counters),
        _slice(recorder, labels, list(counters.values())),
    )


def _slice(recorder: Recorder, labels: Mapping[fx.Node, str], results: list[fx.Node]) -> Slice:
    if not results:
        return Slice((), None)
    needed = _needed(results)
    graph = fx.Graph()
    root = torch.nn.Module()
    copies: dict[fx.Node, fx.Node] = {}
    inputs: list[str] = []
    for node in recorder.graph.nodes:
        if node not in needed or node.op != "placeholder":
            continue
        if node in labels:
            copies[node] = graph.placeholder(f"scalar_{len(inputs)}")
            inputs.append(labels[node])
        else:
            name = f"fixed_{len(copies)}"
            root.register_buffer(name, recorder.concrete[node])
            copies[node] = graph.get_attr(name)
    for node in _in_order(needed):
        copy = copies[node] = graph.node_copy(node, copies.__getitem__)
        copy.meta = {}
        if "device" in copy.kwargs:
            copy.kwargs = {**copy.kwargs, "device": torch.device("cpu")}
    graph.output(tuple(copies[node] for node in results))
    return Slice(tuple(inputs), fx.GraphModule(root, graph))
