"""The verdict on one meta-parameter: what it is, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from unrollc.capture.kind import Cut
from unrollc.errors import Source
from unrollc.requirements.dependence import CutOp, Key, minimal_cut
from unrollc.requirements.edges import SHAPE_ONLY
from unrollc.requirements.findings import through_gradient, through_update
from unrollc.requirements.reach import Graphs, on_the_way
from unrollc.requirements.scaling import normalised_away
from unrollc.requirements.verdict import Finding, Verdict
from unrollc.step import STARTS, Role

_NOT_CONCERNED = Finding(None, "does not concern it")


@dataclass(frozen=True)
class MetaParameter:
    """A tensor whose meta-gradient is asked for, or could be.

    Attributes:
        role: Theta (then θ_0), hyper, context or batch.
        label: Its label.
        requested: Whether the user asks for its gradient.
        waiver: Why its gradient is not asked for, e.g. an approximation that cuts it.
        obstacle: Why it can have none, whatever the program does with it.
    """

    role: Role
    label: str
    requested: bool = True
    waiver: str = ""
    obstacle: str = ""

    @property
    def key(self) -> Key:
        return (self.role, self.label)


@dataclass(frozen=True)
class Facts:
    """What verdicts draw on.

    Attributes:
        graphs: The dependence graphs.
        undefined: For each graph of ``graphs.all``, edges without a derivative at the present
            values.
        values: These values.
        cuts: Meta-parameters whose value Python read, by label.
        I, II: The requirements that concern all meta-parameters alike.
    """

    graphs: Graphs
    undefined: Sequence[Mapping[tuple[fx.Node, fx.Node], str]]
    values: Mapping[Key, Tensor]
    cuts: Mapping[str, Cut]
    I: Finding
    II: Finding


@dataclass(frozen=True)
class _Ruling:
    status: str
    reason: str
    where: Source | None = None
    remedy: str = ""
    cuts: tuple[CutOp, ...] = ()


def judge(parameter: MetaParameter, facts: Facts) -> Verdict:
    """The verdict on `parameter`."""
    a, b = _findings(parameter, facts)
    ruling = _ruling(parameter, facts, a, b)
    if ruling.status == "undefined" and (parameter.role is Role.HYPER or parameter.obstacle):
        a = Finding(False, ruling.reason, ruling.where)
    return Verdict(
        parameter.label,
        ruling.status,
        ruling.reason,
        ruling.where,
        ruling.remedy,
        facts.I,
        facts.II,
        a,
        b,
        cuts=ruling.cuts,
    )


def _findings(parameter: MetaParameter, facts: Facts) -> tuple[Finding, Finding]:
    """III(a) and III(b); what is none of a parameter's business does not concern it."""
    if parameter.role in (Role.HYPER, Role.OPT_STATE):
        return through_update(facts.graphs, parameter.key), _NOT_CONCERNED
    b = through_gradient(facts.graphs, parameter.key)
    if parameter.role is Role.THETA:
        return _NOT_CONCERNED, b
    a = through_update(facts.graphs, parameter.key)
    if a.holds and not _acts_on_gradient(facts.graphs, parameter.key):
        return a, _NOT_CONCERNED  # a weight of a learned optimizer
    return (a if a.holds else _NOT_CONCERNED), b


def _acts_on_gradient(graphs: Graphs, key: Key) -> bool:
    return any(step.inputs.get(key) in step.acting_on_gradient for step in graphs.steps)


def _ruling(parameter: MetaParameter, facts: Facts, a: Finding, b: Finding) -> _Ruling:
    if parameter.obstacle:
        return _Ruling("undefined", parameter.obstacle, None, _CONTINUOUS_REMEDY)
    reached = parameter.key in facts.graphs.reached
    # Code may read a loss's tensor to print it; a hyperparameter is read to compute with it.
    if parameter.label in facts.cuts and (parameter.role is Role.HYPER or not reached):
        cut = facts.cuts[parameter.label]
        return _Ruling("undefined", cut.reason, cut.source, cut.remedy)
    if not reached:
        return _severed(parameter, facts, a, b)
    for graph, edges in zip(facts.graphs.all, facts.undefined, strict=True):
        start = graph.inputs.get(parameter.key)
        on_it = on_the_way(graph, start, list(edges)) if start is not None and edges else []
        for singular in on_it[:1]:
            where = singular[1].meta.get("source")
            return _Ruling("undefined", edges[singular], where, _SINGULAR_REMEDY)
    value = facts.values.get(parameter.key)
    if value is not None and value.numel() == 1 and value.device.type != "meta" and value.any():
        op = normalised_away(parameter.key, facts.graphs)
        if op is not None:
            reason = "it only scales, and the scale is divided out again: its derivative is zero"
            return _Ruling("zero", reason, op.meta.get("source"), _SCALE_REMEDY)
    return _Ruling("exists", _ways(parameter, facts, a, b))


def _severed(parameter: MetaParameter, facts: Facts, a: Finding, b: Finding) -> _Ruling:
    """Why no differentiable path leads from the parameter to Lval."""
    graphs, key = facts.graphs, parameter.key
    if facts.I.holds is False and not _directly_cut(graphs, key):
        stopped = "stops the gradient" in facts.I.reason
        return _Ruling("zero", facts.I.reason, facts.I.where, _STOP if stopped else _I_REMEDY)
    if parameter.role in STARTS and graphs.steps_back < len(graphs.sequence):
        start = "θ_0" if parameter.role is Role.THETA else "the first state"
        reason = f"Truncated({graphs.steps_back}) does not go back to {start}"
        return _Ruling("zero", reason, None, 'use gradient="exact"')
    if graphs.first_order and b.holds:
        reason = "it acts through the inner gradient alone, which FirstOrder takes as a constant"
        return _Ruling("zero", reason, None, 'use gradient="exact"')
    cuts = _cuts(graphs, key)
    real = any(cut.reason != SHAPE_ONLY for cut in cuts)
    if not real and (additive := _additive(graphs, key)) is not None:
        return _Ruling("zero", _ADDITIVE, additive, _UNUSED_REMEDY)
    if cuts:
        reason = "; ".join(dict.fromkeys(cut.reason for cut in cuts))
        return _Ruling("zero", reason, cuts[0].where, _remedy(cuts), cuts)
    if parameter.role is Role.HYPER and not a.holds:
        if not any(graph.gradients for graph in graphs.steps):
            return _Ruling("zero", facts.II.reason, facts.II.where, _UNUSED_REMEDY)
        return _Ruling("zero", _UNREAD, None, _UNUSED_REMEDY)
    states = graphs.states_reached(key)
    if states and parameter.role is not Role.THETA:
        named = ", ".join(states[:3]) + (", …" if len(states) > 3 else "")
        reason = f"it reaches {named} alone, on which Lval does not depend"
        return _Ruling("zero", reason, None, _UNUSED_REMEDY)
    if a.holds:
        return _Ruling("zero", _ONLY_STATE, None, _UNUSED_REMEDY)
    reason = "neither the inner steps nor the validation loss depend on it"
    return _Ruling("zero", reason, None, _UNUSED_REMEDY)


def _directly_cut(graphs: Graphs, key: Key) -> bool:
    """Whether Lval reads a parameter other than θ itself, along paths that are cut."""
    node = graphs.val.inputs.get(key) if key[0] is not Role.THETA else None
    return node is not None and bool(minimal_cut(graphs.val, [node], graphs.val.results(Role.LOSS)))


def _additive(graphs: Graphs, key: Key) -> Source | None:
    """The inner loss's line, if the loss depends on the parameter and its gradient does not."""
    for graph in graphs.steps:
        node = graph.inputs.get(key)
        if node is not None and node in graph.into_loss and node not in graph.into_gradient:
            (loss,) = graph.results(Role.LOSS)
            return loss.meta.get("source")
    return None


def _cuts(graphs: Graphs, key: Key) -> tuple[CutOp, ...]:
    """A minimal set of ops that sever the parameter from the new state and from Lval.

    Of the inner steps the last one in which something is cut speaks for all (first steps make
    state, which severs more).
    """
    val, node = graphs.val, graphs.val.inputs.get(key)
    outer = minimal_cut(val, [node], val.results(Role.LOSS)) if node is not None else ()
    for graph in reversed(graphs.steps):
        if key in graph.inputs:
            ends = graph.state_results(set(graphs.live))
            if inner := minimal_cut(graph, [graph.inputs[key]], ends):
                return tuple(dict.fromkeys((*inner, *outer)))
    return outer


def _ways(parameter: MetaParameter, facts: Facts, a: Finding, b: Finding) -> str:
    """By which ways the parameter reaches Lval."""
    if parameter.role is Role.THETA:
        if b.holds:
            return "θ_0 reaches θ_T through the updates and the Hessian"
        return "θ_0 reaches θ_T through the updates alone (∂opt/∂θ): its Hessian is zero"
    val = facts.graphs.val
    node = val.inputs.get(parameter.key)
    ways = [
        ("through the update", a.holds),
        ("through the inner gradient", b.holds),
        ("directly in Lval", node is not None and node in val.into_loss),
    ]
    return " and ".join(way for way, taken in ways if taken)


_ADDITIVE = "it adds to the inner loss a term that does not depend on the weights"
_UNREAD = (
    "no step computes with it (a branch that is not taken, or parameters without inner gradient)"
)
_ONLY_STATE = "it reaches optimizer state alone, which no later step hands on to the weights"
_I_REMEDY = "use a differentiable validation loss of the adapted weights (a proxy metric)"
_CONTINUOUS_REMEDY = "make it a floating-point tensor, or leave it out of meta="
_SINGULAR_REMEDY = "start from a value at which the derivative exists, or add a small constant"
_SCALE_REMEDY = "remove the normalisation, or leave the parameter out: pass meta=[...]"
_UNUSED_REMEDY = "leave it out: pass meta=[...], or requires_grad_(False)"

_STOP = "remove the detach() or no_grad, or leave it out: pass meta=[...]"

#: What helps against a cut, by words of its reason.
_REMEDIES = (
    ("stops the gradient", _STOP),
    ("declares another derivative", "let the Function's backward return the true derivative"),
    ("at the present value", "start inside the bounds, or clip without a flat part"),
    ("integers or truth values", "use a smooth surrogate in place of the integer or comparison"),
    ("of sign is zero", "use an update that is differentiable in the gradient"),
    ("zero everywhere it exists", "use a smooth function (or a straight-through estimator)"),
)


def _remedy(cuts: Sequence[CutOp]) -> str:
    for words, remedy in _REMEDIES:
        if words in cuts[0].reason:
            return remedy
    return "remove the op, or leave it out: pass meta=[...]"
