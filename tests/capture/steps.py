"""Captured steps, without a program around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from unrollc.capture.batches import read_train, read_val
from unrollc.capture.loop import Loop, capture_loop
from unrollc.capture.naming import Names
from unrollc.capture.problem import Objective, PerStep, Problem, Stock, take_stock
from unrollc.capture.validation import capture_val
from unrollc.step import STATE_ROLES, Role, StepGraph

Key = tuple[Role, str]


@dataclass(frozen=True)
class Captured:
    """A captured loop with its validation loss, and the meta-parameters besides θ_0."""

    stock: Stock
    loop: Loop
    val: StepGraph
    wanted: frozenset[Key]

    @property
    def first(self) -> StepGraph:
        return self.loop.steps[self.loop.sequence[0]]

    @property
    def steady(self) -> StepGraph:
        return self.loop.steps[self.loop.sequence[-1]]


def capture(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    loss: Any,
    train: Any,
    val: Any,
    *,
    val_loss: Any = None,
) -> Captured:
    """Capture the loop with every tensor that requires grad as a meta-parameter."""
    problem = Problem(model, opt, loss, loss if val_loss is None else val_loss)
    batches = read_train(train, paired=not isinstance(loss, Objective))
    single = read_val(val, paired=not isinstance(problem.val_loss, Objective))
    stock = take_stock(problem)
    hyper = {
        label
        for label, value in stock.hyper.items()
        if (value.per_step if isinstance(value, PerStep) else value).requires_grad
    }
    context = [label for label, tensor in stock.context.items() if tensor.requires_grad]
    pairs = zip(batches.labels, batches.leaves, strict=True)
    data = [
        label
        for label, leaf in pairs
        if any(t.requires_grad for t in (leaf if isinstance(leaf, tuple) else (leaf,)))
    ]
    names = Names()
    loop = capture_loop(problem, stock, batches, (*context, *data), frozenset(hyper), names)
    graph, _ = capture_val(problem, stock, single, loop, names)
    wanted = {
        *((Role.HYPER, label) for label in hyper),
        *((Role.CONTEXT, label) for label in context),
        *((Role.BATCH, label) for label in data),
    }
    return Captured(stock, loop, graph, frozenset(wanted))


def live_state(step: StepGraph) -> frozenset[Key]:
    """State outputs that may carry a cotangent: floating ones that are not counters."""
    counters = {
        value.label for value, node in step.inputs_with(*STATE_ROLES) if node.meta.get("counter")
    }
    return frozenset(
        (value.role, value.label)
        for value, node in step.outputs_with(Role.THETA, Role.OPT_STATE)
        if node is not None and node.meta["val"].is_floating_point() and value.label not in counters
    )
