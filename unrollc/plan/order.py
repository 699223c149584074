"""The order of a graph's ops: later, so that less is held at once.

Differentiation lists ops by phase: all of the forward pass, all of the gradient, all of the
adjoint. What the gradient makes for a layer is read by the adjoint of that layer alone, so it can
as well be made right before. Any order in which each op follows its operands computes the same
bits.

Finding the best order is NP-complete (Sethi 1975). The graph is put together from its end, op by
op, and of the ops whose readers are all placed the next is chosen by what it makes live; a few such
rules are tried, and the order with the lowest peak is taken.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

from torch import fx

from unrollc.optimize.in_place import write_in_place
from unrollc.plan.liveness import TAKEN_OVER, Owned, frame_of, storage_bytes, storage_of
from unrollc.step import StepGraph, copy, tensors_of

#: What is preferred among the ops that may come last: a key of the bytes that placing one makes
#: live, and of its place in the given order; the smallest is taken.
Rule = Callable[[int, int], tuple[int, ...]]

#: Bytes that an op may make live without being put off.
_TOLERATED = 65_536

RULES: tuple[Rule, ...] = (
    lambda grown, place: (grown, -place),
    lambda grown, place: (grown > _TOLERATED, -place),
)

#: An order is changed for this part of the peak at least; the given one reads better.
_WORTH = 0.02


def in_lean_order(step: StepGraph) -> StepGraph:
    """The graph with its ops in the order of the lowest peak that a rule finds, or as it is."""
    given = _peak(step)
    found = [_placed(step, rule) for rule in RULES]
    best = min(found, key=_peak)
    return best if _peak(best) < (1 - _WORTH) * given else step


def _peak(step: StepGraph) -> int:
    """Most bytes that a call holds, its own lists counted, once it writes in place."""
    owned = [
        Owned(node.name, number, storage_bytes(node.meta["val"]))
        for number, (_, node) in enumerate(step.inputs_with(*TAKEN_OVER))
    ]
    return frame_of(write_in_place(step), owned).peak + sum(each.bytes for each in owned)


def _placed(step: StepGraph, rule: Rule) -> StepGraph:
    result = copy(step)
    output = result.graph.output_node()
    for node in _Placing(result).order(rule):
        output.prepend(node)
        for user in [user for user in node.users if user.target is operator.getitem]:
            output.prepend(user)
    result.graph.lint()
    return result


class _Placing:
    """Chooses, from the end of a graph to its start, which op comes before the placed ones."""

    def __init__(self, step: StepGraph) -> None:
        nodes = list(step.graph.nodes)
        self._place = {node: n for n, node in enumerate(nodes) if _is_op(node)}
        taken = {node for _, node in step.inputs_with(*TAKEN_OVER)}
        self._bytes: dict[int, int] = {}
        self._makes: dict[fx.Node, list[int]] = {}
        for node in nodes:
            if node.op == "placeholder":
                for tensor in tensors_of(node):
                    self._bytes[storage_of(tensor)] = storage_bytes(tensor) if node in taken else 0
        for node in self._place:
            fresh = {storage_of(t): storage_bytes(t) for t in tensors_of(node)}
            self._makes[node] = [storage for storage in fresh if storage not in self._bytes]
            self._bytes.update({storage: fresh[storage] for storage in self._makes[node]})
        self._reads = {
            node: {storage_of(t) for source in node.all_input_nodes for t in tensors_of(source)}
            for node in self._place
        }
        self._before = {
            node: {_op_of(source) for source in node.all_input_nodes} & self._place.keys()
            for node in self._place
        }
        self._live = {storage_of(t) for node in step.results if node for t in tensors_of(node)}

    def order(self, rule: Rule) -> list[fx.Node]:
        """The ops, the first one first."""
        waiting = dict.fromkeys(self._place, 0)
        for node in self._place:
            for source in self._before[node]:
                waiting[source] += 1
        ready = [node for node, readers in waiting.items() if not readers]
        order = []
        while ready:
            chosen = min(ready, key=lambda node: rule(self._grown(node), self._place[node]))
            ready.remove(chosen)
            order.append(chosen)
            self._live |= self._reads[chosen]
            self._live.difference_update(self._makes[chosen])
            for source in self._before[chosen]:
                waiting[source] -= 1
                if not waiting[source]:
                    ready.append(source)
        return order[::-1]

    def _grown(self, node: fx.Node) -> int:
        """Bytes that are live before the op and not after it, less those that it makes."""
        read = sum(self._bytes[s] for s in self._reads[node] if s not in self._live)
        return read - sum(self._bytes[s] for s in self._makes[node] if s in self._live)


def _is_op(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is not operator.getitem


def _op_of(node: fx.Node) -> fx.Node:
    """The op behind a value; a projection of a tuple belongs to the op that made it."""
    while node.target is operator.getitem:
        (node,) = node.all_input_nodes
    return node
