"""Lowering: the stages in order, from the user's objects to generated code."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from unrollc.capture.assemble import assemble_graph
from unrollc.capture.batches import Batches
from unrollc.capture.garbage import collection_paused
from unrollc.capture.loop import Loop, capture_loop
from unrollc.capture.model import explained
from unrollc.capture.naming import Names
from unrollc.capture.problem import PerStep, Problem, Stock
from unrollc.capture.validation import capture_val
from unrollc.codegen.module import GeneratedCode, generate
from unrollc.errors import BudgetError, InputError
from unrollc.optimize.hoist import hoist
from unrollc.optimize.packed_loop import PackedLoop, Packing
from unrollc.optimize.packing import rewritten
from unrollc.optimize.simplify import simplify
from unrollc.optimize.vectorize import TaskLoop, vectorized
from unrollc.plan.memory import MemoryPlan, plan_program
from unrollc.plan.pieces import ForwardMode, Pieces
from unrollc.plan.schedule import forward_only, keep_all
from unrollc.requirements.check import check_requirements, settle_singularities
from unrollc.requirements.judge import MetaParameter
from unrollc.requirements.verdict import Requirements
from unrollc.runtime.adjoints import Differentiated, confirmed, differentiated
from unrollc.runtime.options import (
    Options,
    candidates,
    labels_by_tensor,
    refuse_averages,
    resolve_meta,
)
from unrollc.runtime.tangents import forward_mode
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
        packing: How the state travels from step to step.
        meta: The meta-parameters.
        lifted_require: Which tensors from closures required grad.
    """

    requirements: Requirements
    loop: Loop
    val: StepGraph
    pieces: Pieces
    plan: MemoryPlan
    generated: GeneratedCode
    packing: Packing
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
        """The adjoint of the last inner step; None where no step is reversed."""
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


@dataclass(frozen=True)
class Captured:
    """What capture and the requirements found.

    Attributes:
        loop: The inner steps.
        val: The validation loss.
        lifted: Tensors from closures, by label.
        meta: Every meta-parameter, requested or not.
        requirements: Verdicts by dependence.
    """

    loop: Loop
    val: StepGraph
    lifted: dict[str, Tensor]
    meta: tuple[MetaParameter, ...]
    requirements: Requirements


@collection_paused()
def check(
    problem: Problem, options: Options, stock: Stock, train: Batches, val: Batches
) -> Requirements:
    """Decide the requirements, on the differentiated graphs as well; raises for no failed one."""
    captured = capture(problem, options, stock, train, val)
    verdicts = captured.requirements
    meta = [m for m in captured.meta if verdicts.verdicts[m.label].status == "exists"]
    if not meta:
        return verdicts
    with explained("the derivative of the captured step", _UNDIFFERENTIABLE):
        found = differentiated(captured.loop, captured.val, meta, options, final=False)
    return confirmed(verdicts, found)


def capture(
    problem: Problem, options: Options, stock: Stock, train: Batches, val: Batches
) -> Captured:
    """Capture the loop and the validation loss, and decide the requirements by dependence."""
    _check_devices(stock, train, val)
    refuse_averages(options, stock)
    names = Names()
    early = resolve_meta(options, candidates(stock, train, val, {}), train.steps, complete=False)
    extra = tuple(
        m.label
        for m in early
        if m.role in (Role.CONTEXT, Role.BATCH)
        and not m.label.startswith("val.")
        and not m.obstacle
    )
    requested = frozenset(m.label for m in early if m.role is Role.HYPER)
    loop = capture_loop(problem, stock, train, extra, requested, names)
    settle_singularities(loop.steps)
    graph, loop = capture_val(problem, stock, val, loop, names)
    lifted = loop.lifted
    known = candidates(stock, train, val, lifted)
    meta = resolve_meta(options, known, train.steps, complete=True)
    requirements = check_requirements(
        loop,
        graph,
        meta,
        first_order=options.first_order,
        steps_back=options.steps_back(train.steps),
        ids=labels_by_tensor(known),
        values=_present_values(stock, lifted),
    )
    return Captured(loop, graph, lifted, tuple(meta), requirements)


def _present_values(stock: Stock, lifted: dict[str, Tensor]) -> dict[tuple[Role, str], Tensor]:
    """What no inner step changes: hyperparameters of one value, loss parameters, closures."""
    hyper = {k: t for k, t in stock.hyper.items() if not isinstance(t, PerStep)}
    context = {**stock.context, **lifted}
    return {
        **{(Role.HYPER, label): tensor for label, tensor in hyper.items()},
        **{(Role.CONTEXT, label): tensor for label, tensor in context.items()},
    }


@collection_paused()
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
        RequirementError: If a requested meta-gradient is zero or undefined, or if the inner loss
            reaches no fast weight.
    """
    captured = capture(problem, options, stock, train, val)
    meta = []
    if differentiate:
        captured.requirements.raise_for_failure()
        meta = [m for m in captured.meta if m.requested]
    captured.requirements.raise_if_idle()
    return _lowered(captured, meta, options, stock, train)


def lower_tasks(
    lowered: Lowered, options: Options, stock: Stock, train: Batches, count: int
) -> tuple[Lowered, TaskLoop]:
    """Lower a program once more, for many tasks at once.

    Args:
        lowered: The program of one task.
        options, stock, train: What it was lowered with.
        count: The number of tasks.

    Returns:
        The program, whose losses have shape ``[count]`` and whose meta-gradients are those of
        their sum, and what of its state each task has of its own.

    Raises:
        NotVectorizableError: If an op cannot run for many tasks at once.
        BudgetError: If no schedule fits.
    """
    tasks = vectorized(lowered.loop, lowered.val, count)
    closures = lowered.loop.lifted
    captured = Captured(tasks.loop, tasks.val, closures, lowered.meta, lowered.requirements)
    made = _lowered(captured, list(lowered.meta), options, stock, train, proved=lowered.loop)
    return made, tasks


def _lowered(
    captured: Captured,
    meta: list[MetaParameter],
    options: Options,
    stock: Stock,
    train: Batches,
    proved: Loop | None = None,
) -> Lowered:
    """The stages behind capture; `meta` are the meta-parameters whose gradient is computed.

    `proved` is the loop whose steps show that mixed mode may be used, if that is another.
    """
    loop, requirements = captured.loop, captured.requirements
    derive = functools.partial(
        differentiated, loop, captured.val, meta, options, captured=proved or loop
    )
    per_step = _per_step(stock, train)
    with explained("the derivative of the captured step", _UNDIFFERENTIABLE):
        found = derive(per_step=per_step) if meta else None
    if found is not None:
        requirements = confirmed(requirements, found)
        requirements.raise_for_failure()
    program = found.program if found else _adapting(loop, captured.val, per_step)

    def plan(found: Differentiated | None) -> MemoryPlan:
        pieces = _pieces(found.program if found else program, found, meta, options, stock, train)
        return plan_program(pieces, options.memory, spill=options.spill is not None)

    chosen = _planned(plan, found, options, functools.partial(derive, favour_mixed=True), per_step)
    return Lowered(
        requirements=requirements,
        loop=loop,
        val=captured.val,
        pieces=chosen.pieces,
        plan=chosen,
        generated=generate(chosen.pieces, chosen),
        packing=program.packing,
        meta=tuple(meta),
        lifted_require=tuple(tensor.requires_grad for tensor in captured.lifted.values()),
    )


_UNDIFFERENTIABLE = (
    "an op on the way has no (second) derivative in PyTorch; replace it by ops that have one, or "
    "leave the meta-parameters that need it out of meta="
)


def _check_devices(stock: Stock, train: Batches, val: Batches) -> None:
    """Parameters, context and data live on one device; 0-dim tensors may stay on the CPU."""
    named = {**stock.theta, **stock.context, **stock.buffers, **stock.average}
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


def _planned(
    plan: Callable[[Differentiated | None], MemoryPlan],
    found: Differentiated | None,
    options: Options,
    in_mixed_mode: Callable[..., Differentiated],
    per_step: frozenset[str],
) -> MemoryPlan:
    """The plan of what will run.

    Under a budget the adjoint that holds less can win by the steps that need not be repeated, so
    both modes are planned; and what is computed before the loop is held all along.
    """
    if options.memory is None or found is None:
        return plan(found)
    others = [in_mixed_mode(per_step=per_step)] if found.mixed_spurned else []
    if found.program.prologue is not None:
        others.append(in_mixed_mode())
    plans, errors = [], []
    for each in (found, *others):
        try:
            plans.append(plan(each))
        except BudgetError as error:
            errors.append(error)
    if not plans:
        raise min(errors, key=lambda error: error.smallest)
    return min(plans, key=lambda each: each.cost.weight)


def _pieces(
    loop: PackedLoop,
    found: Differentiated | None,
    meta: Sequence[MetaParameter],
    options: Options,
    stock: Stock,
    train: Batches,
) -> Pieces:
    steps = len(loop.sequence)
    stop = steps - options.steps_back(steps)
    every = _per_step(stock, train)
    stacked = every if train.form == "stacked" else every - set(train.labels)
    forward = forward_mode(loop, found.val_gradient, meta, every, options) if found else ""
    return Pieces(
        steps=tuple(simplify(_primal(step)) for step in loop.steps),
        sequence=loop.sequence,
        adjoints=found.adjoints if found else (),
        adjoint_sequence=found.order if found else (None,) * steps,
        val=simplify(loop.val),
        val_gradient=found.val_gradient if found else None,
        schedule=keep_all(steps, stop) if found else forward_only(steps),
        per_step=every,
        stacked=stacked,
        wanted=tuple(m.label for m in meta),
        forward=forward if isinstance(forward, ForwardMode) else None,
        no_forward=forward if isinstance(forward, str) else "",
        packed=str(loop.packing),
        prologue=loop.prologue and simplify(loop.prologue),
        epilogue=found.epilogue if found else None,
    )


def _per_step(stock: Stock, train: Batches) -> frozenset[str]:
    """Labels of inputs with one entry a step."""
    rates = {label for label, value in stock.hyper.items() if isinstance(value, PerStep)}
    return frozenset(rates | set(train.labels if train.form in ("list", "stacked") else ()))


def _adapting(loop: Loop, val: StepGraph, per_step: frozenset[str]) -> PackedLoop:
    """The program without a backward pass."""
    return hoist(rewritten(loop, val, None), per_step, frozenset(), deep=True)


def _primal(step: StepGraph) -> StepGraph:
    """The step without the outputs that only differentiation reads."""
    pairs = zip(step.outputs, step.results, strict=True)
    outputs = [(value, node) for value, node in pairs if value.role in (*STATE_ROLES, Role.LOSS)]
    inputs = zip(step.inputs, step.placeholders, strict=True)
    return assemble_graph(step, inputs, outputs)
