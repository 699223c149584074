"""The outer validation loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from unrollc.capture.assemble import (
    assemble,
    closure_label,
    concretes_of,
    labels_of_nodes,
)
from unrollc.capture.averaging import averaged_labels
from unrollc.capture.batches import Batches
from unrollc.capture.gradients import steady_loss
from unrollc.capture.home import at_home
from unrollc.capture.loop import Loop
from unrollc.capture.model import captured, capturing, explained, module_names, run_user_loss
from unrollc.capture.naming import Names
from unrollc.capture.problem import Problem, Stock
from unrollc.capture.record import Recorder
from unrollc.capture.source import SourceFinder
from unrollc.step import Role, StepGraph, Value


def capture_val(
    problem: Problem,
    stock: Stock,
    val: Batches,
    loop: Loop,
    names: Names,
) -> tuple[StepGraph, Loop]:
    """The validation loss as a graph over θ_T, buffers, context and the validation batch.

    Where there is an average of the weights, it takes the place of the model's tensors.

    Returns:
        The graph, and `loop` with the tensors from outside that only the validation loss brings
        in, and with the values that it read from known scalars and lengths.
    """
    return captured(lambda compiling: _recorded(problem, stock, val, loop, names, compiling))


def _recorded(
    problem: Problem, stock: Stock, val: Batches, loop: Loop, names: Names, compiling: bool
) -> tuple[StepGraph, Loop]:
    recorder = Recorder(SourceFinder(module_names(problem)))
    recorder.compiling = compiling
    recorder.watch({**stock.theta, **stock.average})
    recorder.home = stock.home
    groups = _inputs(stock, val, loop, averaged := _averaged(problem))
    values = [Value(role, k, names(k)) for role, tensors in groups for k in tensors]
    examples = [at_home(t, stock.home) for _, tensors in groups for t in tensors.values()]
    inputs = [
        recorder.input(v.name, t, loop.known.get(v.label) if v.role is Role.BUFFER else None)
        for v, t in zip(values, examples, strict=True)
    ]
    for (value, given), tensor in zip(_nodes(recorder, values, inputs), examples, strict=True):
        if value.role is Role.BATCH:
            recorder.readable[given] = tensor.detach()

    def run_user_validation(*given: Tensor) -> Tensor:
        tensors = {v.label: t for v, t in zip(values, given, strict=True)}
        tensors |= {label: tensors[its] for label, its in averaged.items()}
        theta = {label: tensors.pop(label) for label in stock.theta}

        def evaluate(theta: dict[str, Tensor], rest: dict[str, Tensor]) -> Tensor:
            batch = pytree.tree_unflatten([rest[label] for label in val.labels], val.spec)
            tensors = {**rest, **theta}
            return run_user_loss(problem, stock, problem.val_loss, recorder, tensors, batch)

        # Under torch.func.grad custom functions are captured as in the inner loss; the gradient
        # itself is dead code here.
        loss: Tensor = torch.func.grad_and_value(evaluate)(theta, tensors)[1]
        return loss

    with (
        capturing(problem, recorder, loop.attributes),
        explained("the validation loss"),
        steady_loss(problem, problem.val_loss),
    ):
        loss = recorder.run(run_user_validation, inputs)
    node = recorder.node_of(loss)
    assert node is not None
    lifted = list(loop.lifted.values())
    graph = assemble(
        recorder, values, [(Value(Role.LOSS, "val_loss", "val_loss"), node)], names, lifted
    )
    labels = labels_of_nodes(recorder, values, lifted)
    loop = replace(
        loop,
        lifted={closure_label(index): tensor for index, tensor in enumerate(lifted)},
        ending=concretes_of(recorder, labels, {}),
    )
    return graph, loop


def _nodes(
    recorder: Recorder, values: list[Value], inputs: list[Tensor]
) -> Iterator[tuple[Value, fx.Node]]:
    for value, fake in zip(values, inputs, strict=True):
        node = recorder.node_of(fake)
        assert node is not None
        yield value, node


def _averaged(problem: Problem) -> dict[str, str]:
    """What stands for the model's tensors where Lval is that of an average of the weights."""
    return {} if problem.average is None else averaged_labels(problem)


def _inputs(
    stock: Stock, val: Batches, loop: Loop, averaged: Mapping[str, str]
) -> tuple[tuple[Role, dict[str, Tensor]], ...]:
    """The tensors that Lval may read, by role and label."""
    changing = {value.label for value, _ in loop.steps[0].inputs_with(Role.BUFFER)}
    mine = {k: t for k, t in stock.buffers.items() if k not in averaged}
    still = {k: t for k, t in mine.items() if k not in changing}
    context = {k: t for k, t in stock.context.items() if k not in averaged}
    return (
        (Role.THETA, {k: t for k, t in stock.theta.items() if k not in averaged}),
        (Role.BUFFER, {k: t for k, t in mine.items() if k in changing}),
        (Role.AVERAGE, stock.average),
        (Role.CONTEXT, {**still, **context}),
        (Role.BATCH, dict(zip(val.labels, val.leaves, strict=True))),
    )
