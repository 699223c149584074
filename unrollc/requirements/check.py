"""Dependence verdicts: the live sets of the backward pass, followed without differentiating."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import networkx as nx
from torch import fx

from unrollc.capture.loop import Loop
from unrollc.capture.one_step import Cut
from unrollc.errors import Source
from unrollc.requirements.dependence import dependence, first_cut, sources_of
from unrollc.requirements.verdict import Finding, Requirements, Verdict
from unrollc.step import STATE_ROLES, Phase, Role, StepGraph

Key = tuple[Role, str]

_NOT_CONCERNED = Finding(None, "does not concern it")


@dataclass(frozen=True)
class MetaParameter:
    """A tensor whose meta-gradient is asked for, or could be.

    Attributes:
        role: Theta (then θ_0), hyper, context or batch.
        label: Its label.
        requested: Whether the user asks for its gradient.
        waiver: Why its gradient is not asked for, e.g. an approximation that cuts it.
    """

    role: Role
    label: str
    requested: bool = True
    waiver: str = ""

    @property
    def key(self) -> Key:
        return (self.role, self.label)


@dataclass(frozen=True)
class _View:
    """A graph with what its dependence analysis needs."""

    step: StepGraph
    edges: nx.DiGraph

    def inputs(self) -> dict[Key, fx.Node]:
        pairs = zip(self.step.inputs, self.step.placeholders, strict=True)
        return {(value.role, value.label): node for value, node in pairs}

    def state_results(self, live: set[Key]) -> list[fx.Node]:
        return [
            node
            for value, node in self.step.outputs_with(*STATE_ROLES)
            if node is not None and (value.role, value.label) in live
        ]

    def results(self, role: Role) -> list[fx.Node]:
        return [node for _, node in self.step.outputs_with(role) if node is not None]

    @functools.cached_property
    def into_loss(self) -> set[fx.Node]:
        """What reaches the loss."""
        return sources_of(self.edges, self.results(Role.LOSS))

    @functools.cached_property
    def into_gradient(self) -> set[fx.Node]:
        """What reaches an inner gradient."""
        return sources_of(self.edges, self.results(Role.GRADIENT))

    @functools.cached_property
    def into_update(self) -> set[fx.Node]:
        """What reaches the new state other than through an inner gradient."""
        gradients = set(self.results(Role.GRADIENT))
        direct = nx.subgraph_view(self.edges, filter_edge=lambda a, b: a not in gradients)
        state = [node for _, node in self.step.outputs_with(*STATE_ROLES) if node is not None]
        return sources_of(direct, state)


def check_requirements(
    loop: Loop,
    val: StepGraph,
    meta: Sequence[MetaParameter],
    *,
    first_order: bool = False,
    steps_back: int | None = None,
    ids: Mapping[int, tuple[str, ...]] | None = None,
) -> Requirements:
    """Verdicts on `meta` by dependence.

    Args:
        loop: The captured inner loop.
        val: The captured validation loss.
        meta: The meta-parameters.
        first_order: The inner gradient counts as a constant.
        steps_back: How many steps the backward pass goes back; None for all.
        ids: Labels of tensors by id, for look-up.
    """
    views = tuple(_View(step, dependence(step)) for step in loop.steps)
    outer = _View(val, dependence(val))
    live = {key for key, node in outer.inputs().items() if node in outer.into_loss}
    requirement_i = _requirement_i(outer, live)
    reached = {key for key in live if key[0] not in STATE_ROLES}
    state = {key for key in live if key[0] in STATE_ROLES}
    last = len(loop.sequence) - (steps_back if steps_back is not None else len(loop.sequence))
    before: dict[tuple[int, frozenset[Key]], set[Key]] = {}
    for index in reversed(loop.sequence[max(last, 0) :]):
        memo = (index, frozenset(state))
        if memo not in before:
            view = views[index]
            sources = sources_of(_without_gradients(view, first_order), view.state_results(state))
            before[memo] = {key for key, node in view.inputs().items() if node in sources}
        reached |= {key for key in before[memo] if key[0] not in STATE_ROLES}
        state = {key for key in before[memo] if key[0] in STATE_ROLES}
    if last <= 0:
        reached |= {key for key in state if key[0] is Role.THETA}
    cuts = {label: cut for kind in loop.kinds for cut in kind.cuts for label in cut.labels}
    verdicts = {}
    for parameter in meta:
        verdict = _verdict(parameter, views, outer, reached, requirement_i, cuts, first_order)
        if not parameter.requested:
            verdict = replace(verdict, requested=False)
            if parameter.waiver and verdict.status != "exists":
                verdict = replace(verdict, reason=parameter.waiver)
        verdicts[parameter.label] = verdict
    return Requirements(verdicts, dict(ids or {}))


def _without_gradients(view: _View, first_order: bool) -> nx.DiGraph:
    if not first_order:
        return view.edges
    gradients = set(view.results(Role.GRADIENT))
    return nx.subgraph_view(view.edges, filter_edge=lambda a, b: a not in gradients)


def _requirement_i(outer: _View, live: set[Key]) -> Finding:
    if any(role is Role.THETA for role, _ in live):
        return Finding(True, "Lval has a differentiable path from the adapted weights")
    inputs = outer.inputs()
    for key, node in inputs.items():
        if key[0] is Role.THETA:
            cut = first_cut(outer.edges, node, outer.results(Role.LOSS))
            if cut is not None:
                return Finding(False, f"Lval: {cut[1]}", cut[0].meta.get("source"))
    return Finding(False, "Lval does not use the adapted weights")


def _verdict(
    parameter: MetaParameter,
    views: Sequence[_View],
    outer: _View,
    reached: set[Key],
    requirement_i: Finding,
    cuts: Mapping[str, Cut],
    first_order: bool,
) -> Verdict:
    view = views[-1]
    requirement_ii = _requirement_ii(view)
    through_update = _through(views, parameter, Phase.UPDATE)
    through_gradient = _through(views, parameter, Phase.GRADIENT)
    if parameter.role is Role.HYPER:
        through_gradient = _NOT_CONCERNED
    elif parameter.role is not Role.THETA:
        through_update = through_update if through_update.holds else _NOT_CONCERNED
    else:
        through_update = _NOT_CONCERNED

    def verdict(status: str, reason: str, where: Source | None = None, remedy: str = "") -> Verdict:
        return Verdict(
            parameter.label,
            status,
            reason,
            where,
            remedy,
            requirement_i,
            requirement_ii,
            through_update,
            through_gradient,
        )

    if parameter.label in cuts:
        cut = cuts[parameter.label]
        through_update = Finding(False, cut.reason, cut.source)
        remedy = "keep it a tensor (x ** 0.5 for math.sqrt(x), no float() or .item()), away from 0"
        return verdict("undefined", cut.reason, cut.source, remedy)
    if parameter.key in reached:
        return verdict("exists", _path_reason(parameter, views, outer))
    if requirement_i.holds is False:
        return verdict("zero", requirement_i.reason, requirement_i.where, _I_REMEDY)
    severed = _where_cut(parameter, views, outer)
    if severed is not None:
        node, reason = severed
        source: Source | None = node.meta.get("source")
        return verdict("zero", reason, source, "remove the op, or leave it out of meta=")
    if first_order and through_gradient.holds:
        return verdict(
            "zero",
            "it acts through the inner gradient alone, which FirstOrder takes as a constant",
            None,
            'use gradient="exact"',
        )
    return verdict(
        "zero",
        "neither the inner steps nor the validation loss depend on it",
        None,
        "leave it out: pass meta=[...], or requires_grad_(False)",
    )


_I_REMEDY = "use a differentiable validation loss of the adapted weights (a proxy metric)"


def _requirement_ii(view: _View) -> Finding:
    thetas = view.state_results({v.key[:2] for v, _ in view.step.outputs_with(Role.THETA)})
    sources = sources_of(view.edges, thetas)
    gradients = view.results(Role.GRADIENT)
    if any(node in sources for node in gradients):
        return Finding(True, "the update has a differentiable path from θ and G")
    for node in gradients:
        cut = first_cut(view.edges, node, thetas)
        if cut is not None:
            return Finding(False, f"the update: {cut[1]}", cut[0].meta.get("source"))
    return Finding(False, "the update does not use the inner gradient")


def _through(views: Sequence[_View], parameter: MetaParameter, phase: Phase) -> Finding:
    """Whether the parameter reaches G (phase gradient) or θ' directly (phase update)."""
    for view in views:
        node = view.inputs().get(parameter.key)
        if node is None:
            continue
        if phase is Phase.GRADIENT and node in view.into_gradient:
            return Finding(True, "the inner gradient depends on it")
        if phase is Phase.UPDATE and node in view.into_update:
            return Finding(True, "the update depends on it")
    what = "inner gradient" if phase is Phase.GRADIENT else "update"
    return Finding(False, f"the {what} has no differentiable path from it")


def _path_reason(parameter: MetaParameter, views: Sequence[_View], outer: _View) -> str:
    ways = []
    if parameter.role is Role.THETA:
        ways.append("θ_0 reaches θ_T through the updates")
        if _through(views, parameter, Phase.GRADIENT).holds:
            ways.append("the Hessian")
    else:
        if _through(views, parameter, Phase.UPDATE).holds:
            ways.append("through the update")
        if _through(views, parameter, Phase.GRADIENT).holds:
            ways.append("through the inner gradient")
        node = outer.inputs().get(parameter.key)
        if node is not None and node in outer.into_loss:
            ways.append("directly in Lval")
    return " and ".join(ways)


def _where_cut(
    parameter: MetaParameter, views: Sequence[_View], outer: _View
) -> tuple[fx.Node, str] | None:
    for view in views:
        node = view.inputs().get(parameter.key)
        if node is not None:
            results = [n for _, n in view.step.outputs_with(*STATE_ROLES) if n is not None]
            cut = first_cut(view.edges, node, results)
            if cut is not None:
                return cut
    node = outer.inputs().get(parameter.key)
    if node is not None:
        return first_cut(outer.edges, node, outer.results(Role.LOSS))
    return None
