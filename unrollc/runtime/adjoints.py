"""The adjoints of a program: following live cotangents back, and choosing a mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from unrollc.capture.assemble import assemble_graph
from unrollc.capture.loop import Loop
from unrollc.differentiate.adjoint import Key, StepAdjoint
from unrollc.differentiate.mixed import mixed_adjoint, mixed_obstacle
from unrollc.differentiate.pushforward import NoForwardFormulaError
from unrollc.differentiate.reverse import loss_gradient, reverse_adjoint
from unrollc.differentiate.symmetry import asymmetry
from unrollc.optimize.hoist import hoist, moved_by
from unrollc.optimize.packed_loop import PackedLoop, as_captured
from unrollc.optimize.packing import rewritten
from unrollc.optimize.simplify import simplify
from unrollc.plan.cost import cost_of
from unrollc.requirements.judge import MetaParameter
from unrollc.requirements.verdict import Requirements
from unrollc.requirements.zeros import zeros_of
from unrollc.runtime.options import Options
from unrollc.runtime.tangents import MOST_DIRECTIONS
from unrollc.step import STARTS, STATE_ROLES, Role, StepGraph

#: Makes the adjoint of the step with this index for these live state outputs.
Make = Callable[[int, frozenset[Key]], StepAdjoint]


@dataclass(frozen=True)
class Differentiated:
    """A program's derivative as graphs.

    Attributes:
        val_gradient: The validation loss with B_T and its direct contributions.
        adjoints: The distinct adjoints of the steps.
        order: For each step an index into `adjoints`, or None where the backward pass does not
            go.
        program: The loop that was differentiated, its state packed where that pays.
        epilogue: The adjoint of the program's prologue, for the meta-parameters that it reads.
        mixed_spurned: Whether mixed mode was possible and reverse mode preferred.
    """

    val_gradient: StepGraph
    adjoints: tuple[StepAdjoint, ...]
    order: tuple[int | None, ...]
    program: PackedLoop
    epilogue: StepGraph | None = None
    mixed_spurned: bool = False


def differentiated(
    loop: Loop,
    val: StepGraph,
    meta: Sequence[MetaParameter],
    options: Options,
    *,
    final: bool = True,
    favour_mixed: bool = False,
    captured: Loop | None = None,
    per_step: frozenset[str] | None = None,
) -> Differentiated:
    """The graphs of the backward pass.

    Args:
        loop: The inner steps.
        val: The validation loss.
        meta: The meta-parameters whose gradient is computed.
        options: The user's options.
        final: Whether the graphs will run, so that the better mode is worth looking for.
        favour_mixed: Whether mixed mode is taken wherever it is possible.
        captured: The loop whose steps show whether their Jacobian is symmetric, if that is another.
        per_step: Labels of inputs with one entry a step; with None nothing is hoisted.
    """
    wanted = frozenset(m.key for m in meta if m.role not in STARTS)
    starts = frozenset(m.key for m in meta if m.role in STARTS)
    steps = len(loop.sequence)
    stop = steps - options.steps_back(steps)
    val_gradient = simplify(loss_gradient(val, wanted))
    program = rewritten(loop, val, val_gradient) if final else as_captured(loop, val, val_gradient)
    if per_step is not None:
        program = _hoisted(program, per_step, wanted)
    assert program.val_gradient is not None
    inner = wanted | moved_by(program.prologue, wanted)
    chooser = _Chooser(captured or loop, program, inner, options, favour_mixed)
    make = chooser.adjoint if final else _in_reverse(program, inner, options)
    adjoints, order = _adjoints(program, program.val_gradient, inner, starts, stop, make)
    return Differentiated(
        val_gradient=program.val_gradient,
        adjoints=tuple(adjoints),
        order=tuple(order),
        program=program,
        epilogue=_epilogue(program.prologue, adjoints, wanted),
        mixed_spurned=chooser.mixed_spurned,
    )


def _hoisted(program: PackedLoop, per_step: frozenset[str], wanted: frozenset[Key]) -> PackedLoop:
    """The program with what no step changes before the loop.

    Where meta-parameters move what is hoisted, mixed mode is not to be had, which must be worth
    it; nor is forward mode, which is for few meta-parameters.
    """
    plain = hoist(program, per_step, wanted, deep=False)
    deep = hoist(program, per_step, wanted, deep=True)
    if not moved_by(deep.prologue, wanted) or _are_few(program, wanted):
        return plain
    step = program.steps[program.sequence[-1]]
    saved = _weight(deep.prologue) - _weight(plain.prologue)
    return deep if saved > _WORTH_HOISTING * cost_of(step).weight else plain


#: Share of a step that must be saved. Where both modes are possible their costs hardly differ.
_WORTH_HOISTING = 0.05


def _weight(graph: StepGraph | None) -> float:
    return 0.0 if graph is None else cost_of(graph).weight


def _are_few(program: PackedLoop, wanted: frozenset[Key]) -> bool:
    sizes: dict[Key, int] = {
        (value.role, value.label): node.meta["val"].numel()
        for step in program.steps
        for value, node in zip(step.inputs, step.placeholders, strict=True)
    }
    return sum(sizes.get(key, 0) for key in wanted) <= MOST_DIRECTIONS


def _epilogue(
    prologue: StepGraph | None, adjoints: Sequence[StepAdjoint], wanted: frozenset[Key]
) -> StepGraph | None:
    live = {
        (value.of, value.label)
        for adjoint in adjoints
        for value, node in adjoint.graph.outputs_with(Role.COTANGENT)
        if node is not None and value.of is Role.INVARIANT
    }
    if prologue is None or not live:
        return None
    return simplify(reverse_adjoint(prologue, wanted, frozenset(live)).graph)


def _adjoints(
    loop: PackedLoop,
    val_gradient: StepGraph,
    wanted: frozenset[Key],
    starts: frozenset[Key],
    stop: int,
    make: Make,
) -> tuple[list[StepAdjoint], list[int | None]]:
    """The distinct adjoints, following the live cotangents from step T-1 back."""
    found: list[StepAdjoint] = []
    known: dict[tuple[int, frozenset[Key], bool], int] = {}
    order: list[int | None] = [None] * len(loop.sequence)
    live = _state_keys(val_gradient)
    for number in reversed(range(stop, len(loop.sequence))):
        index = loop.sequence[number]
        last = number == stop
        key = (index, live, last)
        if key not in known:
            adjoint = make(index, live)
            if last:
                keep = wanted | (starts if stop == 0 else frozenset())
                adjoint = _pruned(adjoint, keep)
            same = next((i for i, old in enumerate(found) if old is adjoint), len(found))
            if same == len(found):
                found.append(adjoint)
            known[key] = same
        order[number] = known[key]
        live = _state_keys(found[known[key]].graph)
    return found, order


def _state_keys(graph: StepGraph) -> frozenset[Key]:
    pairs = zip(graph.outputs, graph.results, strict=True)
    return frozenset(
        (value.of, value.label)
        for value, node in pairs
        if node is not None and value.role is Role.COTANGENT and value.of in STATE_ROLES
    )


def _pruned(adjoint: StepAdjoint, keep: frozenset[Key]) -> StepAdjoint:
    """The adjoint of the first step, without cotangents that nothing reads."""
    graph = adjoint.graph
    outputs = [
        (value, node)
        for value, node in zip(graph.outputs, graph.results, strict=True)
        if (value.of, value.label) in keep
    ]
    if len(outputs) == len(graph.outputs):
        return adjoint
    inputs = zip(graph.inputs, graph.placeholders, strict=True)
    return replace(adjoint, graph=simplify(assemble_graph(graph, inputs, outputs)))


def _in_reverse(loop: PackedLoop, wanted: frozenset[Key], options: Options) -> Make:
    def make(index: int, live: frozenset[Key]) -> StepAdjoint:
        step = loop.steps[index]
        made = reverse_adjoint(step, wanted, live, first_order=options.first_order)
        return replace(made, graph=simplify(made.graph))

    return make


class _Chooser:
    """Makes adjoints, in mixed mode where symmetry is proved and the cost model prefers it.

    The two modes are compared once; steps differ in their update, hardly in their products.
    """

    def __init__(
        self,
        captured: Loop,
        loop: PackedLoop,
        wanted: frozenset[Key],
        options: Options,
        favour_mixed: bool,
    ) -> None:
        self._captured, self._loop, self._wanted, self._options = captured, loop, wanted, options
        self._limit = math.inf if favour_mixed else _CLEARLY_CHEAPER
        self.mixed_spurned = False
        self._reasons: dict[int, str | None] = {}
        self._made: dict[tuple[int, frozenset[Key]], StepAdjoint] = {}
        self._preferred: tuple[str, str] | None = None

    def adjoint(self, index: int, live: frozenset[Key]) -> StepAdjoint:
        key = (index, live)
        if key not in self._made:
            self._made[key] = self._make(index, live)
        return self._made[key]

    def _make(self, index: int, live: frozenset[Key]) -> StepAdjoint:
        step = self._loop.steps[index]
        if self._options.first_order:
            made = reverse_adjoint(
                step, self._wanted, live, first_order=True, reason="the inner gradient is constant"
            )
            return replace(made, graph=simplify(made.graph))
        obstacle = self._obstacle(index) or mixed_obstacle(step, self._wanted, live)
        if obstacle is None and (self._preferred is None or self._preferred[0] == "mixed"):
            try:
                mixed = mixed_adjoint(step, self._wanted, live)
                mixed = replace(mixed, graph=simplify(mixed.graph))
                if self._preferred is not None:
                    return replace(mixed, reason=self._preferred[1])
            except NoForwardFormulaError as error:
                obstacle, mixed = str(error), None
        else:
            mixed = None
        reason = obstacle or (self._preferred[1] if self._preferred else "")
        reverse = reverse_adjoint(step, self._wanted, live, reason=reason)
        reverse = replace(reverse, graph=simplify(reverse.graph))
        if mixed is None:
            return reverse
        chosen = _cheaper(mixed, reverse, self._limit)
        self.mixed_spurned |= chosen is not mixed
        self._preferred = (chosen.mode, chosen.reason)
        return chosen

    def _obstacle(self, index: int) -> str | None:
        origin = self._loop.origins[index]
        if origin not in self._reasons:
            self._reasons[origin] = asymmetry(self._captured.steps[origin])
        return self._reasons[origin]


#: Reverse mode rounds as PyTorch's own double backward does; mixed mode must be worth a difference.
_CLEARLY_CHEAPER = 0.9


def _cheaper(mixed: StepAdjoint, reverse: StepAdjoint, limit: float) -> StepAdjoint:
    """The adjoint in mixed mode, if it costs at most `limit` times what reverse mode does."""
    first, second = cost_of(mixed.graph).weight, cost_of(reverse.graph).weight
    if second == 0:  # a linear loss: nothing is computed
        return reverse
    ratio = first / second
    if ratio <= limit:
        return replace(mixed, reason=f"{mixed.reason}; predicted cost {ratio:.2f} of reverse mode")
    return replace(
        reverse, reason=f"symmetry is proved, but mixed mode costs {ratio:.2f} times as much"
    )


def confirmed(requirements: Requirements, found: Differentiated) -> Requirements:
    """Verdicts after differentiation: what turned out structurally zero is said to be so."""
    reached: set[Key] = set()
    first = found.order[0] if found.order else None
    graphs = [(found.val_gradient, not found.order)]
    graphs += [(adjoint.graph, index == first) for index, adjoint in enumerate(found.adjoints)]
    graphs += [] if found.epilogue is None else [(found.epilogue, False)]
    for graph, initial in graphs:
        if graph is found.epilogue and not any(role is Role.INVARIANT for role, _ in reached):
            continue
        zeros = zeros_of(graph)
        for value, node in graph.outputs_with(Role.COTANGENT):
            vanishes = node is None or node in zeros
            if not vanishes and value.of and (initial or value.of not in STARTS):
                reached.add((value.of, value.label))
    labels = {label for _, label in reached}
    verdicts = {
        verdict.label: verdict
        if verdict.label in labels or verdict.status != "exists" or not verdict.requested
        else replace(
            verdict,
            status="zero",
            reason="every path to it vanishes when the step is differentiated",
            remedy="leave it out: pass meta=[...], or requires_grad_(False)",
        )
        for verdict in requirements
    }
    return replace(requirements, verdicts=verdicts)
