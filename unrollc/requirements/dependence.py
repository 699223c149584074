"""Which inputs of a graph reach which outputs along differentiable paths, and where paths end.

An edge leads from an operand to the result of an op that reads it, past the op itself where it
has several results. Whether it carries a derivative is found by differentiating the op (`edges`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
from torch import fx

from unrollc.errors import Source
from unrollc.requirements.edges import SHAPE_ONLY, carried, cut_reason, is_projection
from unrollc.requirements.zeros import PRODUCTS, zeros_of
from unrollc.step import STATE_ROLES, Role, StepGraph

Key = tuple[Role, str]


@dataclass(frozen=True)
class CutOp:
    """An op that hands on no derivative.

    Attributes:
        op: The op's name.
        reason: Why.
        where: The user's line.
    """

    op: str
    reason: str
    where: Source | None


@dataclass(frozen=True)
class Dependence:
    """A graph with its differentiable edges.

    Attributes:
        step: The graph.
        edges: A directed graph over its nodes; an edge's ``cut`` says why it carries no
            derivative, or is None.
    """

    step: StepGraph
    edges: nx.DiGraph

    @functools.cached_property
    def smooth(self) -> nx.DiGraph:
        """The edges that carry a derivative."""
        kept = [(a, b) for a, b, cut in self.edges.edges(data="cut") if cut is None]
        graph = nx.DiGraph()
        graph.add_nodes_from(self.edges)
        graph.add_edges_from(kept)
        return graph

    @functools.cached_property
    def inputs(self) -> dict[Key, fx.Node]:
        pairs = zip(self.step.inputs, self.step.placeholders, strict=True)
        return {(value.role, value.label): node for value, node in pairs}

    def results(self, *roles: Role) -> list[fx.Node]:
        return [node for _, node in self.step.outputs_with(*roles) if node is not None]

    def state_results(self, live: set[Key]) -> list[fx.Node]:
        return [
            node
            for value, node in self.step.outputs_with(*STATE_ROLES)
            if node is not None and (value.role, value.label) in live
        ]

    @functools.cached_property
    def zeros(self) -> set[fx.Node]:
        """Nodes whose values are zero by structure."""
        return zeros_of(self.step)

    @functools.cached_property
    def influence(self) -> dict[fx.Node, int]:
        """For each node the set of inputs that it depends on, differentiably or not.

        The set is an integer with one bit for each placeholder, in order.
        """
        found: dict[fx.Node, int] = {}
        for bit, node in enumerate(self.step.placeholders):
            found[node] = 1 << bit
        for node in self.step.graph.nodes:
            if node.op != "placeholder":
                found[node] = 0
                for source in node.all_input_nodes:  # edges lead past ops of several results
                    found[node] |= found[source]
        return found

    @property
    def gradients(self) -> list[fx.Node]:
        """The inner gradients of the fast weights."""
        pairs = self.step.outputs_with(Role.GRADIENT)
        return [node for value, node in pairs if node is not None and value.of is Role.THETA]

    @functools.cached_property
    def into_loss(self) -> set[fx.Node]:
        """What reaches the loss."""
        return sources_of(self.smooth, self.results(Role.LOSS))

    @functools.cached_property
    def into_gradient(self) -> set[fx.Node]:
        """What reaches an inner gradient."""
        return sources_of(self.smooth, self.gradients)

    @functools.cached_property
    def into_result(self) -> set[fx.Node]:
        """What reaches the new state, or the loss where there is no state."""
        return sources_of(self.smooth, self.results(*STATE_ROLES) or self.results(Role.LOSS))

    @functools.cached_property
    def acting_on_gradient(self) -> set[fx.Node]:
        """What an inner gradient depends on, differentiably or not."""
        return sources_of(self.edges, self.gradients)

    @functools.cached_property
    def acting_on_result(self) -> set[fx.Node]:
        """What the new state or the loss depends on, differentiably or not."""
        return sources_of(self.edges, self.results(*STATE_ROLES, Role.LOSS))

    @functools.cached_property
    def direct(self) -> nx.DiGraph:
        """The smooth edges without those that leave an inner gradient."""
        gradients = set(self.gradients)
        return nx.DiGraph((a, b) for a, b in self.smooth.edges if a not in gradients)

    @functools.cached_property
    def into_update(self) -> set[fx.Node]:
        """What reaches the new state other than through an inner gradient."""
        return sources_of(self.direct, self.results(*STATE_ROLES))


def dependence(
    step: StepGraph, saturated: Mapping[tuple[fx.Node, fx.Node], str] | None = None
) -> Dependence:
    """The graph of values and of what carries a derivative between them.

    Args:
        step: Any captured graph.
        saturated: (operand, op) whose derivative is zero at the present values of the
            meta-parameters, with the reason.
    """
    saturated = saturated or {}
    edges = nx.DiGraph()
    edges.add_nodes_from(step.graph.nodes)
    graph = Dependence(step, edges)
    zeros = graph.zeros
    for node in step.graph.nodes:
        if node.op != "call_function" or is_projection(node):
            continue
        reached = carried(node, zeros)
        operands = node.all_input_nodes
        for position, result in _results(node):
            for index, operand in enumerate(operands):
                reason = None
                if result in zeros or (index, position) not in reached:
                    reason = _reason(node, operand, result, zeros)
                elif (operand, node) in saturated:
                    reason = saturated[operand, node]
                edges.add_edge(operand, result, cut=reason)
    return graph


def _reason(node: fx.Node, operand: fx.Node, result: fx.Node, zeros: set[fx.Node]) -> str:
    others: list[Any] = [arg for arg in node.args if arg is not operand]
    if op_name(node) in PRODUCTS and any(other == 0 or other in zeros for other in others):
        return "it is multiplied by zero"
    if result in zeros:
        return "the value is always zero"
    return cut_reason(node, operand, result.meta["val"])


def _results(node: fx.Node) -> list[tuple[int, fx.Node]]:
    """The nodes that stand for the results of an op, with their positions."""
    if isinstance(node.meta["val"], tuple | list):
        return [(int(user.args[1]), user) for user in node.users if is_projection(user)]  # type: ignore[arg-type]
    return [(0, node)]


def sources_of(edges: nx.DiGraph, targets: Iterable[fx.Node]) -> set[fx.Node]:
    """Every node with a path to one of `targets`, these included."""
    found = set(targets)
    stack = [target for target in found if target in edges]
    while stack:
        for source in edges.predecessors(stack.pop()):
            if source not in found:
                found.add(source)
                stack.append(source)
    return found


def reached_from(edges: nx.DiGraph, sources: Iterable[fx.Node]) -> set[fx.Node]:
    """Every node with a path from one of `sources`, these included."""
    return sources_of(edges.reverse(copy=False), sources)


def shortest_path(
    edges: nx.DiGraph, starts: Sequence[fx.Node], ends: Sequence[fx.Node]
) -> tuple[str, ...]:
    """The ops of a shortest path from one of `starts` to one of `ends`, with their lines.

    Ops that follow each other with one name on one line stand once.
    """
    reached = nx.multi_source_dijkstra_path(edges, {n for n in starts if n in edges})
    found: list[fx.Node] = min(
        (reached[end] for end in ends if end in reached), key=len, default=[]
    )
    words = []
    for node in found:
        if node.op == "call_function":
            source: Source | None = node.meta.get("source")
            words.append(op_name(node) + (f" ({source.short})" if source else ""))
    return tuple(word for word, _ in itertools.groupby(words))


def minimal_cut(
    graph: Dependence, starts: Sequence[fx.Node], ends: Sequence[fx.Node]
) -> tuple[CutOp, ...]:
    """A smallest set of ops that cut every path from `starts` to `ends`, in order.

    Empty where a differentiable path remains, or where not even a cut path leads there.
    """
    if not sources_of(graph.edges, ends).intersection(starts):
        return ()
    real = graph.edges.edge_subgraph(
        (a, b) for a, b, cut in graph.edges.edges(data="cut") if cut != SHAPE_ONLY
    )
    cuts = _cut_nodes(graph.step, real, starts, ends)
    cuts = cuts or _cut_nodes(graph.step, graph.edges, starts, ends)
    return tuple(
        dict.fromkeys(CutOp(op_name(node), why, node.meta.get("source")) for node, why in cuts)
    )


def _cut_nodes(
    step: StepGraph, edges: nx.DiGraph, starts: Sequence[fx.Node], ends: Sequence[fx.Node]
) -> list[tuple[fx.Node, str]]:
    flow = nx.DiGraph()
    reasons: dict[fx.Node, dict[str, None]] = {}  # an op may cut its operands for several reasons
    relevant = reached_from(edges, starts) & sources_of(edges, ends)
    for a, b, cut in edges.subgraph(relevant).edges(data="cut"):
        if cut is None:
            flow.add_edge(a, b)  # no capacity attribute: infinite
        else:
            reasons.setdefault(b, {})[cut] = None
            flow.add_edge(a, ("cut", b))
            flow.add_edge(("cut", b), b, capacity=1)
    for start in starts:
        if start in flow:
            flow.add_edge("source", start)
    for end in ends:
        if end in flow:
            flow.add_edge(end, "sink")
    if "source" not in flow or "sink" not in flow or not nx.has_path(flow, "source", "sink"):
        return []
    try:
        # Of several smallest cuts networkx returns the one nearest to its second end; reversed,
        # that is the one where the gradient is lost first.
        _, (_, before) = nx.minimum_cut(flow.reverse(copy=False), "sink", "source")
    except nx.NetworkXUnbounded:
        return []
    order = {node: number for number, node in enumerate(step.graph.nodes)}
    cutting = [n for n in reasons if ("cut", n) in before and n not in before]
    return [(node, "; ".join(reasons[node])) for node in sorted(cutting, key=order.__getitem__)]


def op_name(node: fx.Node) -> str:
    """The ATen op's name without overload; for a projection, that of the op it projects."""
    origin: Any = node
    while is_projection(origin):
        origin = origin.args[0]
    return str(origin.target._schema.name.split("::")[-1])
