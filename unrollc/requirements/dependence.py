"""Which inputs of a graph reach which outputs along differentiable paths, and where paths end."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx

from unrollc.step import StepGraph

aten = torch.ops.aten

#: Ops that hand on no derivative, with the reason. Integer results are cut by their dtype.
_CUTTING: dict[str, str] = {
    "detach": "detach() or no_grad stops the gradient",
    "sign": "the derivative of sign is zero everywhere it exists",
    "sgn": "the derivative of sgn is zero everywhere it exists",
    "round": "the derivative of round is zero everywhere it exists",
    "floor": "the derivative of floor is zero everywhere it exists",
    "ceil": "the derivative of ceil is zero everywhere it exists",
    "trunc": "the derivative of trunc is zero everywhere it exists",
    "floor_divide": "the derivative of floor_divide is zero everywhere it exists",
    "heaviside": "the derivative of heaviside is zero everywhere it exists",
    "zeros_like": "only the shape is used",
    "ones_like": "only the shape is used",
    "full_like": "only the shape is used",
    "empty_like": "only the shape is used",
    "new_zeros": "only the shape is used",
    "new_ones": "only the shape is used",
    "new_full": "only the shape is used",
    "new_empty": "only the shape is used",
}


def dependence(step: StepGraph) -> nx.DiGraph:
    """The graph of values; an edge's ``cut`` says why it carries no derivative, or is None."""
    edges = nx.DiGraph()
    edges.add_nodes_from(step.graph.nodes)
    for node in step.graph.nodes:
        if node.op != "call_function":
            continue
        reason = _cut(node)
        for source in node.all_input_nodes:
            edges.add_edge(source, node, cut=reason)
    return edges


def _cut(node: fx.Node) -> str | None:
    if node.target is operator.getitem:
        value = node.meta.get("val")
        return None if _is_smooth(value) else "the result is an integer or a truth value"
    target: Any = node.target
    name = target._schema.name.split("::")[-1]
    if name in _CUTTING:
        return _CUTTING[name]
    if name == "div" and node.kwargs.get("rounding_mode") is not None:
        return "the derivative of a rounded quotient is zero everywhere it exists"
    results = node.meta["val"]
    parts = results if isinstance(results, tuple | list) else (results,)
    if not any(_is_smooth(part) for part in parts):
        return f"{name} yields integers or truth values, which have no derivative"
    return None


def _is_smooth(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def sources_of(edges: nx.DiGraph, targets: Iterable[fx.Node]) -> set[fx.Node]:
    """Every node with a differentiable path to one of `targets`, these included."""
    smooth = nx.subgraph_view(edges, filter_edge=lambda a, b: edges.edges[a, b]["cut"] is None)
    found: set[fx.Node] = set()
    for target in targets:
        if target not in found:
            found |= {target} | nx.ancestors(smooth, target)
    return found


def first_cut(
    edges: nx.DiGraph, source: fx.Node, targets: Iterable[fx.Node]
) -> tuple[fx.Node, str] | None:
    """The first cutting op on the least cut path from `source`, or None if there is no path."""
    best: tuple[int, fx.Node, str] | None = None
    for target in targets:
        try:
            path = nx.shortest_path(
                edges, source, target, weight=lambda a, b, data: 1000 if data["cut"] else 1
            )
        except nx.NetworkXNoPath:
            continue
        cuts = [
            (b, edges.edges[a, b]["cut"])
            for a, b in itertools.pairwise(path)
            if edges.edges[a, b]["cut"]
        ]
        if cuts and (best is None or len(cuts) < best[0]):
            best = (len(cuts), *cuts[0])
    return None if best is None else best[1:]
