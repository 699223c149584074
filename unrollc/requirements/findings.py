"""What holds of each requirement: I for the validation loss, II for the update, III(a) and III(b)
for one meta-parameter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from unrollc.requirements.dependence import (
    CutOp,
    Dependence,
    Key,
    minimal_cut,
    op_name,
    reached_from,
    shortest_path,
)
from unrollc.requirements.edges import DECLARED, RUNNING_STATISTICS, is_projection
from unrollc.requirements.kinks import Kink, kinks_between
from unrollc.requirements.reach import Graphs
from unrollc.requirements.verdict import Finding
from unrollc.step import STATE_ROLES, Phase, Role

#: Where kinks of the loss are looked for; those of its gradient come from the same ops.
_LOSS = (Phase.FORWARD, Phase.LOSS)
_UPDATE = (Phase.UPDATE,)

#: Roles that depend on no meta-parameter unless they are one.
_DATA = (Role.BATCH, Role.NOISE, Role.CONSTANT)

#: Roles of θ_T, and of an average of the weights where Lval is that of the average.
_ADAPTED = (Role.THETA, Role.AVERAGE)

#: Roles of running statistics that the inner loop changes.
_STATISTICS = (Role.BUFFER, Role.AVERAGE)
_PADDING = "the padding row gets no gradient"


def requirement_i(graphs: Graphs) -> Finding:
    """Lval is a differentiable function of θ_T."""
    val = graphs.val
    thetas = [node for (role, _), node in val.inputs.items() if role in _ADAPTED]
    loss = val.results(Role.LOSS)
    if any(node in val.into_loss for node in thetas):
        kinks = kinks_between(val, thetas, val.acting_on_result, _LOSS)
        trace = functools.partial(shortest_path, val.smooth, thetas, loss)
        reason = "Lval has a differentiable path from the adapted weights"
        return Finding(True, reason, kinks=kinks, trace=trace)
    return _failed("Lval", minimal_cut(val, thetas, loss), "Lval does not use the adapted weights")


def requirement_ii(graphs: Graphs) -> Finding:
    """opt is a differentiable function of θ, of G and of its state.

    What acts through more than one step also passes G as a function of θ_j, so its kinks count.
    """
    severed: list[CutOp] = []
    kinks: dict[Kink, None] = {}
    used = False
    trace = None
    for step in graphs.steps:
        gradients, thetas = step.gradients, step.results(Role.THETA)
        used = used or bool(gradients)
        if set(thetas) & reached_from(step.smooth, gradients):
            trace = functools.partial(shortest_path, step.smooth, gradients, thetas)
        severed += [cut for cut in minimal_cut(step, gradients, thetas) if cut not in severed]
        found = kinks_between(step, step.step.placeholders, step.acting_on_result, _UPDATE)
        kinks.update(dict.fromkeys(found))
        if graphs.steps_back > 1 and not graphs.first_order:
            inner = kinks_between(step, _thetas(step), step.acting_on_gradient, _LOSS)
            kinks.update(dict.fromkeys(inner))
    if trace is not None:
        reason = "the update has a differentiable path from θ and G"
        return Finding(True, reason, kinks=tuple(kinks), trace=trace)
    if not used:
        return no_inner_gradient(graphs)
    return _failed("the update", tuple(severed), "the update does not use the inner gradient")


def declared_stops(graphs: Graphs) -> tuple[CutOp, ...]:
    """Where a derivative is declared to be zero on the way, although the value depends on θ or φ.

    The meta-gradient is then the derivative of the program as declared, as in eager PyTorch, and
    finite differences of its value differ: `detach`, custom functions, running statistics that
    the validation reads, padding rows of embeddings. In an update these are the stops in networks
    of a learned optimizer.
    """
    found: dict[CutOp, None] = {}
    for graph in graphs.all:
        moving = 0
        for (role, _), node in graph.inputs.items():
            moving |= 0 if role in _DATA else graph.influence[node]
        within = graph.acting_on_result if graph is graphs.val else _declaring(graph)
        for operand, node, cut in graph.edges.edges(data="cut"):
            if cut not in DECLARED or node not in within:
                continue
            if cut == RUNNING_STATISTICS and not _reads_statistics(graph, operand, node):
                continue
            if graph.influence[operand] & moving:
                found[CutOp(op_name(node), cut, node.meta.get("source"))] = None
        for node in graph.step.graph.nodes:
            padded = node.op == "call_function" and node in within and _pads(node)
            if padded:
                found[CutOp("embedding", _PADDING, node.meta.get("source"))] = None
    return tuple(found)


def _declaring(step: Dependence) -> set[fx.Node]:
    """What the inner gradient depends on, and what the update makes of it."""
    made = {n for n in step.acting_on_result if n.meta.get("phase") is Phase.UPDATE}
    return step.acting_on_gradient | made


def _reads_statistics(graph: Dependence, operand: fx.Node, node: fx.Node) -> bool:
    """Whether a BatchNorm uses statistics that the inner loop changes."""
    origin: Any = node.args[0] if is_projection(node) else node
    flag = {"_native_batch_norm_legit_functional": 5, "native_batch_norm_backward": 7}
    training = op_name(origin) in flag and bool(origin.args[flag[op_name(origin)]])
    changing = {n for (role, _), n in graph.inputs.items() if role in _STATISTICS}
    return not training and operand in changing


def _pads(node: fx.Node) -> bool:
    """Whether the node is the gradient of an embedding with a padding row."""
    padding: Any = node.args[3] if op_name(node) == "embedding_dense_backward" else -1
    return bool(padding >= 0)


def no_inner_gradient(graphs: Graphs) -> Finding:
    """Why no fast weight has an inner gradient."""
    for step in graphs.steps:
        cuts = minimal_cut(step, _thetas(step), step.results(Role.LOSS))
        if cuts:
            return _failed("the inner loss", cuts, "")
    return Finding(False, "the inner loss does not use the fast weights")


def through_update(graphs: Graphs, key: Key) -> Finding:
    """III(a): opt is differentiable in the meta-parameter, θ_j and G_j held fixed."""
    return _through(graphs, key, "update")


def through_gradient(graphs: Graphs, key: Key) -> Finding:
    """III(b): G_j is a differentiable function of the meta-parameter (for θ_0: the Hessian)."""
    return _through(graphs, key, "inner gradient")


def _through(graphs: Graphs, key: Key, what: str) -> Finding:
    severed: list[CutOp] = []
    kinks: dict[Kink, None] = {}
    trace = None
    for step in graphs.steps:
        node = step.inputs.get(key)
        if node is None:
            continue
        kinks.update(dict.fromkeys(_kinks_on(step, node, what)))
        if node in (step.into_gradient if what == "inner gradient" else step.into_update):
            trace = _trace(step, node, what)
        elif what == "inner gradient":
            cuts = minimal_cut(step, [node], step.gradients)
            severed += [cut for cut in cuts if cut not in severed]
    if trace is not None:
        return Finding(True, f"the {what} depends on it", kinks=tuple(kinks), trace=trace)
    if key[0] is Role.THETA:
        reason = "the inner gradient does not depend on it: its Hessian is zero"
        return Finding(False, reason, kinks=tuple(kinks))
    finding = _failed("", tuple(severed), f"the {what} has no differentiable path from it")
    return replace(finding, kinks=tuple(kinks))


def _thetas(step: Dependence) -> list[fx.Node]:
    return [node for (role, _), node in step.inputs.items() if role is Role.THETA]


def _trace(step: Dependence, node: fx.Node, what: str) -> Callable[[], tuple[str, ...]]:
    if what == "inner gradient":
        return functools.partial(shortest_path, step.smooth, [node], step.gradients)

    def find() -> tuple[str, ...]:
        found = shortest_path(step.direct, [node], step.results(Role.THETA))
        return found or shortest_path(step.direct, [node], step.results(*STATE_ROLES))

    return find


def _kinks_on(step: Dependence, node: fx.Node, what: str) -> tuple[Kink, ...]:
    if what == "inner gradient":
        return kinks_between(step, [node], step.acting_on_gradient, _LOSS)
    return kinks_between(step, [node], step.acting_on_result, _UPDATE)


def _failed(subject: str, cuts: Sequence[CutOp], otherwise: str) -> Finding:
    if not cuts:
        return Finding(False, otherwise)
    prefix = f"{subject}: " if subject else ""
    return Finding(False, prefix + "; ".join(dict.fromkeys(c.reason for c in cuts)), cuts[0].where)
