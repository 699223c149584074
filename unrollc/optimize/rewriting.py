"""What passes that make ops have in common."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from unrollc.capture.faking import asked


def call(graph: fx.Graph, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new op with the metadata of `like` and a value of its own."""
    node = graph.call_function(target, args, kwargs)
    node.meta = dict(like.meta)
    values, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    if target is operator.getitem:
        node.meta["val"] = values[0][values[1]]
        return node
    mode = next(n.meta["val"].fake_mode for n in node.all_input_nodes)
    with torch.no_grad(), mode:
        node.meta["val"] = asked(target, values, named)
    return node


class Maker:
    """Makes ops before a node, with its metadata and the fake value of their results."""

    def __init__(self, graph: fx.Graph, anchor: fx.Node) -> None:
        self._graph = graph
        self._anchor = anchor

    def __call__(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        with self._graph.inserting_before(self._anchor):
            return call(self._graph, self._anchor, target, *args)


def sort(graph: fx.Graph) -> None:
    """Put ops that stand before their operands right behind them; the others stay."""
    output = graph.output_node()
    placed = {node for node in graph.nodes if node.op == "placeholder"}
    missing: dict[fx.Node, int] = {}
    waiting_for: dict[fx.Node, list[fx.Node]] = {}
    for node in [n for n in graph.nodes if n.op == "call_function"]:
        late = [operand for operand in node.all_input_nodes if operand not in placed]
        for operand in late:
            waiting_for.setdefault(operand, []).append(node)
        missing[node] = len(late)
        stack = [] if late else [node]
        while stack:
            ready = stack.pop()
            output.prepend(ready)
            placed.add(ready)
            for user in reversed(waiting_for.pop(ready, [])):
                missing[user] -= 1
                if not missing[user]:
                    stack.append(user)
