"""Lowering: the stages in order, from the user's objects to generated code."""

from __future__ import annotations

import pathlib
from dataclasses import dataclass, replace

from torch import Tensor, fx

from unrollc.capture.assemble import assemble_graph
from unrollc.capture.batches import Batches
from unrollc.capture.loop import Loop, capture_loop
from unrollc.capture.model import explained
from unrollc.capture.naming import Names
from unrollc.capture.problem import PerStep, Problem, Stock
from unrollc.capture.validation import capture_val
from unrollc.codegen.module import GeneratedCode, generate
from unrollc.differentiate.adjoint import Key, StepAdjoint
from unrollc.differentiate.mixed import NoForwardFormulaError, mixed_adjoint, mixed_obstacle
from unrollc.differentiate.reverse import loss_gradient, reverse_adjoint
from unrollc.differentiate.symmetry import asymmetry
from unrollc.errors import InputError
from unrollc.optimize.simplify import simplify, structural_zeros
from unrollc.plan.cost import cost_of
from unrollc.plan.memory import MemoryPlan, plan_memory
from unrollc.plan.pieces import Pieces
from unrollc.plan.schedule import forward_only, keep_all
from unrollc.requirements.check import MetaParameter, check_requirements
from unrollc.requirements.verdict import Requirements
from unrollc.runtime.options import Options, candidates, labels_by_tensor, resolve_meta
from unrollc.step import STATE_ROLES, Role, StepGraph


@dataclass(frozen=True)
class Lowered:
    """Everything that is known before a program runs.

    Attributes:
        requirements: Verdicts on the meta-gradients; ``str()`` is a table.
        loop: The captured inner steps.
        val: The captured validation loss.
        pieces: The graphs of the program in the order of its schedule.
        plan: The memory plan; ``plan.peak_bytes``, ``plan.schedule``, ``plan.timeline``.
        generated: The generated module.
        meta: The meta-parameters.
        lifted_require: Which tensors from closures required grad.
    """

    requirements: Requirements
    loop: Loop
    val: StepGraph
    pieces: Pieces
    plan: MemoryPlan
    generated: GeneratedCode
    meta: tuple[MetaParameter, ...]
    lifted_require: tuple[bool, ...]

    @property
    def step(self) -> StepGraph:
        """The last captured step, typed."""
        return self.loop.steps[self.loop.sequence[-1]]

    @property
    def graph(self) -> fx.GraphModule:
        """The step graph of the last inner step (the steady one)."""
        return self.step.module

    @property
    def adjoint(self) -> fx.GraphModule | None:
        """The adjoint of the last inner step; None for a program that only adapts."""
        index = self.pieces.adjoint_sequence[-1] if self.pieces.adjoints else None
        return None if index is None else self.pieces.adjoints[index].graph.module

    @property
    def code(self) -> str:
        """The generated program, the same bytes at every compilation."""
        return self.generated.text

    def save(self, path: str | pathlib.Path) -> None:
        """Write the program as a module that needs torch alone.

        Its ``loss_and_gradients(inputs, seed=0)`` takes what ``program.inputs(train, val)``
        returns.
        """
        pathlib.Path(path).write_text(self.code, encoding="utf-8")


def capture_and_check(
    problem: Problem, options: Options, stock: Stock, train: Batches, val: Batches
) -> tuple[Loop, StepGraph, dict[str, Tensor], list[MetaParameter], Requirements]:
    """Capture the loop and decide the requirements; raises for no failed verdict."""
    _check_devices(stock, train, val)
    names = Names()
    early = resolve_meta(options, candidates(stock, train, val, {}), train.steps, complete=False)
    extra = tuple(
        m.label
        for m in early
        if m.role in (Role.CONTEXT, Role.BATCH) and not m.label.startswith("val.")
    )
    requested = frozenset(m.label for m in early if m.role is Role.HYPER)
    loop = capture_loop(problem, stock, train, extra, requested, names)
    graph, lifted = capture_val(problem, stock, val, loop, names)
    known = candidates(stock, train, val, lifted)
    meta = resolve_meta(options, known, train.steps, complete=True)
    requirements = check_requirements(
        loop,
        graph,
        meta,
        first_order=options.first_order,
        steps_back=options.steps_back(train.steps),
        ids=labels_by_tensor(known),
    )
    return loop, graph, lifted, meta, requirements


def lower(
    problem: Problem,
    options: Options,
    stock: Stock,
    train: Batches,
    val: Batches,
    *,
    differentiate: bool,
) -> Lowered:
    """Run every stage.

    Args:
        problem, options: What the user gave to ``compile``.
        stock: The tensors that it holds now.
        train, val: The data of this call.
        differentiate: Whether meta-gradients are wanted; otherwise the program only adapts.

    Raises:
        RequirementError: If a requested meta-gradient is zero or undefined.
    """
    loop, val_graph, lifted, meta, requirements = capture_and_check(
        problem, options, stock, train, val
    )
    loop = replace(loop, lifted=lifted)
    if differentiate:
        requirements.raise_for_failure()
        meta = [m for m in meta if m.requested]
    else:
        meta = []
    with explained("the derivative of the captured step", _UNDIFFERENTIABLE):
        pieces = _pieces(loop, val_graph, meta, options, stock, train)
    if differentiate:
        requirements = _confirmed(requirements, pieces)
        requirements.raise_for_failure()
    plan = plan_memory(pieces)
    return Lowered(
        requirements=requirements,
        loop=loop,
        val=val_graph,
        pieces=pieces,
        plan=plan,
        generated=generate(pieces, plan),
        meta=tuple(meta),
        lifted_require=tuple(tensor.requires_grad for tensor in lifted.values()),
    )


_UNDIFFERENTIABLE = (
    "an op on the way has no (second) derivative in PyTorch; replace it by ops that have one, or "
    "leave the meta-parameters that need it out of meta="
)


def _check_devices(stock: Stock, train: Batches, val: Batches) -> None:
    """Parameters, context and data live on one device; 0-dim tensors may stay on the CPU."""
    named = {**stock.theta, **stock.context, **stock.buffers}
    for batches in (train, val):
        for label, leaf in zip(batches.labels, batches.leaves, strict=True):
            steps = leaf if isinstance(leaf, tuple) else (leaf,)
            named.update((f"{label} of step {i}" if i else label, t) for i, t in enumerate(steps))
    home_label, home = next(iter(stock.theta.items()))
    for label, tensor in named.items():
        if tensor.device != home.device and not (tensor.dim() == 0 and tensor.device.type == "cpu"):
            raise InputError(
                f"{label} is on {tensor.device}, {home_label} on {home.device}",
                why="model, losses and data must be on one device",
                remedy=f'move it with .to("{home.device}")',
            )


def _pieces(
    loop: Loop,
    val: StepGraph,
    meta: list[MetaParameter],
    options: Options,
    stock: Stock,
    train: Batches,
) -> Pieces:
    steps = len(loop.sequence)
    wanted = frozenset(m.key for m in meta if m.role is not Role.THETA)
    want_theta = frozenset(m.key for m in meta if m.role is Role.THETA)
    stop = steps - options.steps_back(steps)
    adjoints: list[StepAdjoint] = []
    order: list[int | None] = [None] * steps
    val_gradient = None
    if meta:
        val_gradient = simplify(loss_gradient(val, wanted))
        adjoints, order = _adjoints(loop, val_gradient, wanted, want_theta, stop, options)
    batch_labels = train.labels if train.form in ("list", "stacked") else ()
    per_step = {label for label, value in stock.hyper.items() if isinstance(value, PerStep)}
    stacked = per_step | set(batch_labels if train.form == "stacked" else ())
    return Pieces(
        steps=tuple(simplify(_primal(step)) for step in loop.steps),
        sequence=loop.sequence,
        adjoints=tuple(adjoints),
        adjoint_sequence=tuple(order),
        val=simplify(val),
        val_gradient=val_gradient,
        schedule=keep_all(steps, stop) if meta else forward_only(steps),
        per_step=frozenset(per_step | set(batch_labels)),
        stacked=frozenset(stacked),
        wanted=tuple(m.label for m in meta),
    )


def _primal(step: StepGraph) -> StepGraph:
    """The step without the outputs that only differentiation reads."""
    pairs = zip(step.outputs, step.results, strict=True)
    outputs = [(value, node) for value, node in pairs if value.role in (*STATE_ROLES, Role.LOSS)]
    inputs = zip(step.inputs, step.placeholders, strict=True)
    return assemble_graph(step, inputs, outputs)


def _adjoints(
    loop: Loop,
    val_gradient: StepGraph,
    wanted: frozenset[Key],
    want_theta: frozenset[Key],
    stop: int,
    options: Options,
) -> tuple[list[StepAdjoint], list[int | None]]:
    """The distinct adjoints, following the live cotangents from step T-1 back."""
    found: list[StepAdjoint] = []
    known: dict[tuple[int, frozenset[Key], bool], int] = {}
    order: list[int | None] = [None] * len(loop.sequence)
    live = _state_keys(val_gradient)
    chooser = _Chooser(loop, wanted, options)
    for number in reversed(range(stop, len(loop.sequence))):
        index = loop.sequence[number]
        last = number == stop
        key = (index, live, last)
        if key not in known:
            adjoint = chooser.adjoint(index, live)
            if last:
                keep = wanted | (want_theta if stop == 0 else frozenset())
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


class _Chooser:
    """Makes adjoints, in mixed mode where symmetry is proved and the cost model prefers it.

    The two modes are compared once; steps differ in their update, hardly in their products.
    """

    def __init__(self, loop: Loop, wanted: frozenset[Key], options: Options) -> None:
        self._loop, self._wanted, self._options = loop, wanted, options
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
        chosen = _cheaper(mixed, reverse)
        self._preferred = (chosen.mode, chosen.reason)
        return chosen

    def _obstacle(self, index: int) -> str | None:
        if index not in self._reasons:
            self._reasons[index] = asymmetry(self._loop.steps[index])
        return self._reasons[index]


def _cheaper(mixed: StepAdjoint, reverse: StepAdjoint) -> StepAdjoint:
    first, second = cost_of(mixed.graph).weight, cost_of(reverse.graph).weight
    ratio = first / second
    if first <= second:
        return replace(mixed, reason=f"{mixed.reason}; predicted cost {ratio:.2f} of reverse mode")
    return replace(
        reverse, reason=f"symmetry is proved, but mixed mode costs {ratio:.2f} times as much"
    )


def _confirmed(requirements: Requirements, pieces: Pieces) -> Requirements:
    """Verdicts after differentiation: what turned out structurally zero is said to be so."""
    graphs = [adjoint.graph for adjoint in pieces.adjoints]
    if pieces.val_gradient is not None:
        graphs.append(pieces.val_gradient)
    reached = {
        value.label
        for graph in graphs
        for value, zero in zip(graph.outputs, structural_zeros(graph), strict=True)
        if not zero and value.role is Role.COTANGENT
    }
    verdicts = {
        verdict.label: verdict
        if verdict.label in reached or verdict.status != "exists" or not verdict.requested
        else replace(
            verdict,
            status="zero",
            reason="every path to it vanishes when the step is differentiated",
            remedy="leave it out: pass meta=[...], or requires_grad_(False)",
        )
        for verdict in requirements
    }
    return Requirements(verdicts, requirements.labels)
