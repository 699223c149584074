"""Requirements I-III of the GIMLI paper (§2.4) for every meta-parameter of a captured program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from unrollc.capture.loop import Loop
from unrollc.requirements.calculus.singular import NEVER, removable
from unrollc.requirements.dependence import Key, dependence
from unrollc.requirements.findings import declared_stops, requirement_i, requirement_ii
from unrollc.requirements.judge import Facts, MetaParameter, judge
from unrollc.requirements.present import present_slopes
from unrollc.requirements.reach import Graphs
from unrollc.requirements.verdict import Requirements
from unrollc.step import StepGraph


def settle_singularities(steps: Sequence[StepGraph]) -> None:
    """Mark the roots of the updates that calculus decides, for verdicts and differentiation.

    ``node.meta["removable"]`` says why the derivative has a limit where the root's argument is
    zero, ``node.meta["nonsingular"]`` why it never is.
    """
    for step in steps:
        for node, reason in removable(step).items():
            node.meta["nonsingular" if reason.startswith(NEVER) else "removable"] = reason


def check_requirements(
    loop: Loop,
    val: StepGraph,
    meta: Sequence[MetaParameter],
    *,
    first_order: bool = False,
    steps_back: int | None = None,
    ids: Mapping[int, tuple[str, ...]] | None = None,
    values: Mapping[Key, Tensor] | None = None,
) -> Requirements:
    """Verdicts on `meta`, decided on the captured graphs.

    Args:
        loop: The captured inner loop.
        val: The captured validation loss.
        meta: The meta-parameters.
        first_order: The inner gradient counts as a constant.
        steps_back: How many steps the backward pass goes back; None for all.
        ids: Labels of tensors by id, for look-up.
        values: The present values of hyperparameters and other tensors that no step changes.
    """
    captured = (*loop.steps, val)
    present = [present_slopes(step, values or {}) for step in captured]
    views = [dependence(s, p.saturated) for s, p in zip(captured, present, strict=True)]
    back = len(loop.sequence) if steps_back is None else steps_back
    graphs = Graphs(tuple(views[:-1]), loop.sequence, views[-1], first_order, back)
    facts = Facts(
        graphs=graphs,
        undefined=[slopes.undefined for slopes in present],
        values=values or {},
        cuts={label: cut for kind in loop.kinds for cut in kind.cuts for label in cut.labels},
        I=requirement_i(graphs),
        II=requirement_ii(graphs),
    )
    verdicts = {}
    for parameter in meta:
        verdict = judge(parameter, facts)
        if not parameter.requested:
            verdict = replace(verdict, requested=False)
            if parameter.waiver and verdict.status != "exists":
                verdict = replace(verdict, reason=parameter.waiver)
        verdicts[parameter.label] = verdict
    stops = declared_stops(graphs)
    idle = not any(graph.gradients for graph in graphs.steps)
    return Requirements(
        verdicts,
        dict(ids or {}),
        loop.steps,
        facts.I,
        facts.II,
        stops,
        idle,
        tuple(dict.fromkeys(branch for kind in loop.kinds for branch in kind.branches)),
    )
