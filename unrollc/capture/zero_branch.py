"""Hyperparameters that start at zero: ``if weight_decay != 0`` must not hide their gradient.

An optimizer skips a term whose factor is zero. The value is the same with and without the term,
the derivative with respect to the factor is not. So where a requested hyperparameter is exactly
zero, the step is captured a second time with the branch taken. Both captures are then run on the
user's own tensors: if they agree, the second one is used; if not (momentum brings state with it),
the gradient at zero is undefined and said to be so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from unrollc.capture.one_step import Cut, Kind
from unrollc.capture.problem import PerStep, Stock
from unrollc.errors import CaptureError
from unrollc.step import STATE_ROLES, Role, StepGraph, Value

Record = Callable[[frozenset[str]], tuple[StepGraph, Kind]]


def through_zero_branch(
    record: Record, requested: frozenset[str], stock: Stock, batch: Sequence[Tensor]
) -> tuple[StepGraph, Kind]:
    """Capture a step so that requested hyperparameters equal to zero keep their gradient.

    Args:
        record: Captures the step, given the hyperparameters to be taken as nonzero.
        requested: Hyperparameters whose gradient is asked for.
        stock: The user's tensors.
        batch: The step's batch.
    """
    graph, kind = record(frozenset())
    hidden = {label: source for label, source in kind.zero_tests if label in requested}
    if not hidden:
        return graph, kind
    with contextlib.suppress(CaptureError):  # code that expects what earlier steps would have made
        taken, other = record(frozenset(hidden))
        if other.after == kind.after and _agree(graph, taken, stock, batch):
            return taken, other
    cuts = tuple(
        Cut(
            (label,),
            source,
            "it is exactly zero, and the branch that is skipped then changes the values",
        )
        for label, source in hidden.items()
    )
    return graph, replace(kind, cuts=(*kind.cuts, *cuts))


def _agree(first: StepGraph, second: StepGraph, stock: Stock, batch: Sequence[Tensor]) -> bool:
    """Whether two captures of a step return the same new state for the same inputs."""
    generator = torch.Generator().manual_seed(0)
    known = {
        **stock.theta,
        **stock.opt_state,
        **stock.buffers,
        **stock.average,
        **stock.context,
        **{k: v.per_step[0] if isinstance(v, PerStep) else v for k, v in stock.hyper.items()},
    }
    batches = iter(batch)
    values: dict[str, Tensor] = {}
    for value, node in zip(first.inputs, first.placeholders, strict=True):
        if value.role is Role.BATCH:
            values[value.name] = next(batches)
        elif value.label in known:
            values[value.name] = known[value.label]
        else:
            values[value.name] = _made_up(value, node, generator)
    results = []
    for graph in (first, second):
        given = [
            graph.constants[v.name] if v.role is Role.CONSTANT else values.get(v.name)
            for v in graph.inputs
        ]
        if any(tensor is None for tensor in given):
            return False
        with torch.no_grad():
            outputs = graph.module(*given)
        pairs = zip(graph.outputs, outputs, strict=True)
        results.append([tensor for value, tensor in pairs if value.role in STATE_ROLES])
    return len(results[0]) == len(results[1]) and all(
        torch.allclose(a, b, rtol=1e-6, atol=1e-12, equal_nan=True)
        for a, b in zip(*results, strict=True)
    )


def _made_up(value: Value, node: fx.Node, generator: torch.Generator) -> Tensor:
    """A tensor for an input that the user does not hold (state of a later step, noise)."""
    like = node.meta["val"]
    drawn = torch.rand(like.shape, generator=generator)
    if value.role is Role.NOISE and value.noise is not None and not like.is_floating_point():
        drawn = torch.zeros(like.shape)
    return drawn.to(dtype=like.dtype, device=like.device)
