"""What holds of each requirement: I for the validation loss, II for the update, III(a) and III(b)
for one meta-parameter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from torch import fx

from unrollc.requirements.dependence import (
    CutOp,
    Dependence,
    Key,
    minimal_cut,
    reached_from,
    shortest_path,
)
from unrollc.requirements.kinks import Kink, kinks_between
from unrollc.requirements.reach import Graphs
from unrollc.requirements.verdict import Finding
from unrollc.step import STATE_ROLES, Phase, Role

#: Where kinks of the loss are looked for; those of its gradient come from the same ops.
_LOSS = (Phase.FORWARD, Phase.LOSS)
_UPDATE = (Phase.UPDATE,)


def requirement_i(graphs: Graphs) -> Finding:
    """Lval is a differentiable function of θ_T."""
    val = graphs.val
    thetas = [node for (role, _), node in val.inputs.items() if role is Role.THETA]
    loss = val.results(Role.LOSS)
    if any(node in val.into_loss for node in thetas):
        kinks = kinks_between(val, thetas, val.acting_on_result, _LOSS)
        trace = functools.partial(shortest_path, val.smooth, thetas, loss)
        reason = "Lval has a differentiable path from the adapted weights"
        return Finding(True, reason, kinks=kinks, trace=trace)
    return _failed("Lval", minimal_cut(val, thetas, loss), "Lval does not use the adapted weights")


def requirement_ii(graphs: Graphs) -> Finding:
    """opt is a differentiable function of θ, of G and of its state."""
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
    if trace is not None:
        reason = "the update has a differentiable path from θ and G"
        return Finding(True, reason, kinks=tuple(kinks), trace=trace)
    if not used:
        return no_inner_gradient(graphs)
    return _failed("the update", tuple(severed), "the update does not use the inner gradient")


def no_inner_gradient(graphs: Graphs) -> Finding:
    """Why no fast weight has an inner gradient."""
    for step in graphs.steps:
        thetas = [node for (role, _), node in step.inputs.items() if role is Role.THETA]
        cuts = minimal_cut(step, thetas, step.results(Role.LOSS))
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
        if node in (step.into_gradient if what == "inner gradient" else step.into_update):
            trace = _trace(step, node, what)
            kinks.update(dict.fromkeys(_kinks_on(step, node, what)))
        elif what == "inner gradient":
            cuts = minimal_cut(step, [node], step.gradients)
            severed += [cut for cut in cuts if cut not in severed]
    if trace is not None:
        return Finding(True, f"the {what} depends on it", kinks=tuple(kinks), trace=trace)
    if key[0] is Role.THETA:
        return Finding(False, "the inner gradient does not depend on it: its Hessian is zero")
    return _failed("", tuple(severed), f"the {what} has no differentiable path from it")


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
