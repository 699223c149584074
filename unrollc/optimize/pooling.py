"""Pooling before rectifying: ``max_pool(relu(x)) --> relu(max_pool(x))``.

Both are monotone, so the values are the same bits, and the rectifier and its derivative run over
what pooling leaves, a quarter of the elements where windows are two by two. The backward pass turns
round with it:

    threshold_backward(max_pool_backward(g, y, places), y, 0)
        --> max_pool_backward(threshold_backward(g, pooled, 0), x, places)

An element takes the cotangents of the windows whose largest it is, and there it equals the pooled
value. In a window without a positive element another place may be the largest one; its cotangent is
zero either way. Pooling's backward pass reads no values of its operand, only its shape and layout.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from unrollc.optimize.rewriting import call
from unrollc.step import StepGraph, build, copy

aten = torch.ops.aten


@dataclass(frozen=True)
class _Match:
    """A rectifier that one pooling reads, and what of the backward pass belongs to the two.

    Attributes:
        relu, pool: The ops.
        pooled: The results of the pooling that are its values.
        places: The results that say where these stood.
        backward: Pairs of pooling's backward pass and the rectifier's.
    """

    relu: fx.Node
    pool: fx.Node
    pooled: tuple[fx.Node, ...]
    places: tuple[fx.Node, ...]
    backward: tuple[tuple[fx.Node, fx.Node], ...]


def pool_first(graph: StepGraph) -> StepGraph:
    """``max_pool(relu(x)) --> relu(max_pool(x))`` wherever nothing else reads ``relu(x)``.

    Args:
        graph: A step or a validation loss, with or without its gradient; it is left as it is.
    """
    if not _matches(graph):
        return graph
    new = copy(graph)
    for match in _matches(new):
        _turn_round(new.graph, match)
    return build(new.graph, new.inputs, new.outputs, new.constants)


def _matches(graph: StepGraph) -> list[_Match]:
    kept = {node for node in graph.results if node is not None}
    relus = graph.graph.find_nodes(op="call_function", target=aten.relu.default)
    found = [_match(relu) for relu in relus if relu not in kept]
    return [match for match in found if match is not None and not kept & set(match.places)]


def _match(relu: fx.Node) -> _Match | None:
    pools = _calling(relu.users, aten.max_pool2d_with_indices.default)
    if len(pools) != 1 or not relu.meta["val"].is_floating_point():
        return None
    (pool,) = pools
    parts: list[Any] = list(pool.users)
    if any(part.target is not operator.getitem for part in parts):
        return None
    pooled = tuple(part for part in parts if part.args[1] == 0)
    places = tuple(part for part in parts if part.args[1] == 1)
    pairs = []
    for back in _calling(relu.users, aten.max_pool2d_with_indices_backward.default):
        if back.args[0] is relu or back.args[1] is not relu or back.args[-1] not in places:
            return None
        if any(not _rectifies(user, back, relu) for user in back.users):
            return None
        pairs += [(back, user) for user in back.users]
    ours = {pool, *(node for pair in pairs for node in pair)}
    read = {user for part in places for user in part.users}
    if not pooled or not set(relu.users) <= ours or not read <= ours:
        return None
    return _Match(relu, pool, pooled, places, tuple(pairs))


def _calling(nodes: Any, target: Any) -> list[fx.Node]:
    return [node for node in nodes if node.target is target]


def _rectifies(node: fx.Node, gradient: fx.Node, result: fx.Node) -> bool:
    """Whether a node is the derivative of the rectifier, applied to `gradient`."""
    is_derivative = node.target is aten.threshold_backward.default
    return is_derivative and node.args == (gradient, result, 0)


def _turn_round(graph: fx.Graph, match: _Match) -> None:
    (x,) = match.relu.args
    with graph.inserting_before(match.pool):
        pool = call(graph, match.pool, match.pool.target, x, *match.pool.args[1:])
        value = call(graph, match.pool, operator.getitem, pool, 0)
        place = call(graph, match.pool, operator.getitem, pool, 1)
        rectified = call(graph, match.relu, aten.relu.default, value)
    for old, new in [*((p, rectified) for p in match.pooled), *((p, place) for p in match.places)]:
        old.replace_all_uses_with(new)
    for back, threshold in match.backward:
        with graph.inserting_before(threshold):
            slope = call(graph, threshold, threshold.target, back.args[0], rectified, 0)
            spread = call(graph, back, back.target, slope, x, *back.args[2:])
        threshold.replace_all_uses_with(spread)
        graph.erase_node(threshold)
    dead = [back for back, _ in match.backward if not back.users]
    for node in [*dict.fromkeys(dead), *match.pooled, *match.places, match.pool, match.relu]:
        graph.erase_node(node)
