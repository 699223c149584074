"""The partition of a step: which values of the forward pass its adjoint keeps, which it recomputes.

An adjoint by itself reads the step's inputs and computes again what it needs of the forward pass.
What it has in common with the step, op by op down to the inputs, may be kept instead: the step
returns it, the adjoint takes it. `partition` finds the choice of least

    kept bytes · price + work of the ops that stay in the adjoint

as a minimum cut. (A cut between forward and backward: He & Yu 2023, "Transcending Runtime-Memory
Tradeoffs in Checkpointing by being Fusion Aware"; here recomputing has a cost of its own, as in the
closure problem of Picard 1976, "Maximal Closure of a Graph and Applications to Combinatorial
Problems".)
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx
from torch import Tensor, fx

from unrollc.errors import Source
from unrollc.plan.cost import NOTHING, Cost, cost_of_node, human_bytes
from unrollc.plan.liveness import storage_of
from unrollc.plan.op_rules import EQUALS, Equal, recompute_cost, rule_of
from unrollc.step import Role, StepGraph, Value, build, placeholder, tensors_of

_Key = tuple[Any, ...]


@dataclass(frozen=True)
class Kept:
    """A value that the step hands to its adjoint.

    Attributes:
        name: Of the step's output and the adjoint's input.
        bytes: Of its storage.
        source: The user's line.
    """

    name: str
    bytes: int
    source: Source | None


@dataclass(frozen=True)
class Partition:
    """A step and its adjoint, with what passes between them.

    Attributes:
        step: The primal step; outputs of `Role.RESIDUAL` follow its own.
        adjoint: The adjoint; inputs of `Role.RESIDUAL`, in the same order, follow its own. Inputs
            of `Role.NOISE` and `Role.CONSTANT` that it no longer reads are gone.
        kept: One entry a residual.
        recomputed: Work of the step that the adjoint does again.
        price: Of a kept byte, in operations.
    """

    step: StepGraph
    adjoint: StepGraph
    kept: tuple[Kept, ...]
    recomputed: Cost
    price: float

    @property
    def kept_bytes(self) -> int:
        return sum(each.bytes for each in self.kept)

    def __str__(self) -> str:
        lines = [
            f"{len(self.kept)} values kept for the adjoint, {human_bytes(self.kept_bytes)}; "
            f"{self.recomputed.calls} ops recomputed: {self.recomputed.operations:,} operations, "
            f"{human_bytes(self.recomputed.bytes_moved)} moved"
        ]
        for each in self.kept:
            where = f"  {each.source.short}" if each.source else ""
            lines.append(f"  {each.name:<32} {human_bytes(each.bytes):>12}{where}")
        return "\n".join(lines)


def partition(
    step: StepGraph, adjoint: StepGraph, price: float, *, spare_results: bool = False
) -> Partition:
    """Choose what is kept between a step and its adjoint.

    Args:
        step: New state and loss; simplified.
        adjoint: Of this step, reading its inputs and cotangents; simplified.
        price: What one kept byte costs, in operations (`Cost.weight`). ``math.inf`` keeps nothing,
            0 keeps all that the adjoint's own ops read, views and fills excepted.
        spare_results: Whether what the step returns is left alone: the last state is the user's,
            who may write to it before the backward pass.
    """
    assert price >= 0, f"the price of a byte is {price}"
    overwritten = [
        node for graph in (step, adjoint) for node in graph.graph.nodes if "into" in node.meta
    ]
    assert not overwritten, f"kept values could be overwritten: {overwritten}"
    common = shared(step, adjoint)
    barred = _returned(step) if spare_results else frozenset()
    keep, again = _needed(common, adjoint, _recomputed(common, adjoint, price, barred), barred)
    repeated = sum((cost_of_node(node) for node in _repeated(again, common)), NOTHING)
    if not keep:
        return Partition(step, adjoint, (), repeated, price)
    taken = {value.name for graph in (step, adjoint) for value in (*graph.inputs, *graph.outputs)}
    values = {node: _residual(common[node], taken) for node in keep}
    kept = tuple(
        Kept(value.name, kept_bytes(common[node]), common[node].meta.get("source"))
        for node, value in values.items()
    )
    recording = _returning(step, {value: common[node] for node, value in values.items()})
    return Partition(recording, _reading(adjoint, values), kept, repeated, price)


def kept_bytes(node: fx.Node) -> int:
    """What keeping a value takes: its whole storage."""
    return int(node.meta["val"].untyped_storage().nbytes())


# --- what a step and its adjoint have in common ------------------------------------------------


def shared(step: StepGraph, adjoint: StepGraph) -> dict[fx.Node, fx.Node]:
    """For each op of the adjoint that the step has too, the step's op.

    Equal are ops of one kind on equal arguments, down to inputs of one role and label.
    """
    numbers: dict[_Key, int] = {}
    computed: dict[int, fx.Node] = {}
    for node, number in _numbered(step, numbers).items():
        computed.setdefault(number, node)
    return {
        node: computed[number]
        for node, number in _numbered(adjoint, numbers).items()
        if node.op == "call_function" and number in computed
    }


def _numbered(graph: StepGraph, numbers: dict[_Key, int]) -> dict[fx.Node, int]:
    """A number for each node, the same for what computes the same; `numbers` grows."""
    found: dict[fx.Node, int] = {}

    def number(*key: Any) -> int:
        return numbers.setdefault(key, len(numbers))

    def described(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return ("node", found[value])
        if isinstance(value, tuple | list):
            return tuple(described(item) for item in value)
        return (type(value), repr(value))

    def call(target: Any, args: Any, kwargs: Any) -> int:
        return number(target, described(args), described(sorted(kwargs.items())))

    for value, node in zip(graph.inputs, graph.placeholders, strict=True):
        found[node] = number(*value.key)
        if value.role is Role.CONSTANT:
            tensor = graph.constants[value.name]
            described_constant = (tensor.dtype, str(tensor.device), tuple(tensor.shape))
            found[node] = number(*described_constant, repr(tensor.tolist()))
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        found[node] = call(node.target, node.args, node.kwargs)
        if node.target is operator.getitem and (equal := _equal(*node.args)):
            args = node.args[0].args
            other = call(equal.other, [args[i] for i in equal.arguments], {})
            index = described(node.args[1])
            found[node] = number(operator.getitem, (("node", other), index), ())
    return found


def _equal(source: fx.Node, index: int) -> Equal | None:
    """The row of `EQUALS` for a result of an op."""
    return next(
        (
            row
            for row in EQUALS
            if source.target is row.op and index in row.results and row.applies(source.args)
        ),
        None,
    )


# --- the cut ------------------------------------------------------------------------------------


def _recomputed(
    common: Mapping[fx.Node, fx.Node], adjoint: StepGraph, price: float, barred: frozenset[int]
) -> set[fx.Node]:
    """The ops of the adjoint that the minimum cut recomputes, should they be needed.

    Every op that depends on no cotangent is two vertices: on the source's side the first says that
    the adjoint needs the value, the second that it recomputes it. What is needed and not recomputed
    is kept and pays its bytes; what is recomputed pays its work and needs its arguments. Values
    that cannot be kept are one vertex.
    """
    inner = _without_cotangent(adjoint)
    if math.isinf(price):
        return set(inner)
    flow = nx.DiGraph()
    source, sink = -2, -1
    flow.add_nodes_from((source, sink))
    number = {node: 2 * index for index, node in enumerate(inner)}
    again = {
        node: first + 1 if keepable(node, common, barred) else first
        for node, first in number.items()
    }
    for node in inner:
        if again[node] != number[node]:
            capacity = round(price * kept_bytes(common[node]))
            flow.add_edge(number[node], again[node], capacity=capacity)
        work = recompute_cost(node)
        # No capacity is an infinite one.
        flow.add_edge(again[node], sink, **({} if work is None else {"capacity": work}))
        for argument in node.all_input_nodes:
            if argument in number:
                flow.add_edge(again[node], number[argument])
    for node in _roots(adjoint, inner):
        flow.add_edge(source, number[node])
    _, (chosen, _) = nx.minimum_cut(flow, source, sink)
    return {node for node in inner if again[node] in chosen}


def keepable(
    node: fx.Node, common: Mapping[fx.Node, fx.Node], barred: frozenset[int] = frozenset()
) -> bool:
    """Whether a value of the adjoint may come from the step, some of whose storages are barred."""
    single = isinstance(node.meta["val"], Tensor)
    return (
        node in common
        and single
        and rule_of(node).keep
        and storage_of(common[node].meta["val"]) not in barred
    )


def _returned(step: StepGraph) -> frozenset[int]:
    """Storages of what a step returns."""
    results = [node for node in step.results if node is not None]
    return frozenset(storage_of(tensor) for node in results for tensor in tensors_of(node))


def _without_cotangent(adjoint: StepGraph) -> list[fx.Node]:
    """The ops that depend on no cotangent, in order."""
    moved = {node for _, node in adjoint.inputs_with(Role.COTANGENT)}
    inner = []
    for node in adjoint.graph.nodes:
        if node.op != "call_function":
            continue
        if moved.isdisjoint(node.all_input_nodes):
            inner.append(node)
        else:
            moved.add(node)
    return inner


def _roots(adjoint: StepGraph, inner: Iterable[fx.Node]) -> list[fx.Node]:
    """Those of `inner` that the rest of the adjoint reads or that it returns."""
    inside = set(inner)
    return [node for node in inner if not inside.issuperset(node.users)]


def _needed(
    common: Mapping[fx.Node, fx.Node],
    adjoint: StepGraph,
    recomputed: set[fx.Node],
    barred: frozenset[int],
) -> tuple[list[fx.Node], list[fx.Node]]:
    """What is kept and what is recomputed, in order of the adjoint, of what its rest leads to."""
    inner = _without_cotangent(adjoint)
    inside = set(inner)
    reached: set[fx.Node] = set()
    stack = _roots(adjoint, inner)
    while stack:
        node = stack.pop()
        if node not in reached:
            reached.add(node)
            if node in recomputed:
                stack.extend(inside.intersection(node.all_input_nodes))
    keep = [node for node in inner if node in reached and node not in recomputed]
    again = [node for node in inner if node in reached and node in recomputed]
    assert all(keepable(node, common, barred) for node in keep), keep
    return keep, again


def _repeated(again: Iterable[fx.Node], common: Mapping[fx.Node, fx.Node]) -> list[fx.Node]:
    """Of the ops that are recomputed, those that the step runs too."""
    found: dict[fx.Node, None] = {}
    for node in again:
        if node in common:
            found[node.args[0] if node.target is operator.getitem else node] = None  # type: ignore[index]
    return list(found)


# --- the two graphs -----------------------------------------------------------------------------


def _residual(node: fx.Node, taken: set[str]) -> Value:
    """The value that passes between the graphs; `taken` holds the names in use, and grows."""
    name = f"kept_{node.name}"
    while name in taken:
        name += "_"
    taken.add(name)
    return Value(Role.RESIDUAL, name, name)


def _returning(step: StepGraph, residuals: Mapping[Value, fx.Node]) -> StepGraph:
    """`step` with more outputs."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    results: Any = graph.graph_copy(step.graph, copies)
    graph.output((*results, *(copies[node] for node in residuals.values())))
    return build(graph, step.inputs, (*step.outputs, *residuals), step.constants)


def _reading(adjoint: StepGraph, residuals: Mapping[fx.Node, Value]) -> StepGraph:
    """`adjoint` with more inputs, and without what only these depended on."""
    needed: set[fx.Node] = set()
    stack = [node for node in adjoint.results if node is not None]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(() if node in residuals else node.all_input_nodes)
    given = [
        (value, node)
        for value, node in zip(adjoint.inputs, adjoint.placeholders, strict=True)
        if node in needed or value.role not in (Role.NOISE, Role.CONSTANT)
    ]
    given += [(value, node) for node, value in residuals.items()]
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for value, node in given:
        copies[node] = placeholder(graph, value.name)
        copies[node].meta = dict(node.meta)
    for node in adjoint.graph.nodes:
        if node in needed and node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(None if node is None else copies[node] for node in adjoint.results))
    inputs = tuple(value for value, _ in given)
    constants = {v.name: adjoint.constants[v.name] for v in inputs if v.role is Role.CONSTANT}
    return build(graph, inputs, adjoint.outputs, constants)
