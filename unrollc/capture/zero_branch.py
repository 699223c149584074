"""Hyperparameters that start at zero: ``if weight_decay != 0`` must not hide their gradient.

An optimizer skips a term whose factor is zero. The value is the same with and without the term,
the derivative with respect to the factor is not. So where a requested hyperparameter is exactly
zero, the step is captured a second time with the branch taken. Both captures are then run near the
user's own tensors: if they are the same function of all other tensors, the second one is used,
with the state that its branch brings (a momentum that is multiplied by zero). If not (dampening
acts only where there is momentum), the gradient at zero is undefined and said to be so.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace

import torch
from torch import Tensor, fx

from unrollc.capture.kind import Cut, Kind
from unrollc.capture.layout import Layout
from unrollc.capture.problem import PerStep, Stock
from unrollc.errors import CaptureError
from unrollc.step import STATE_ROLES, Role, StepGraph, Value

Record = Callable[[frozenset[str]], tuple[StepGraph, Kind]]


def through_zero_branch(
    record: Record, requested: frozenset[str], stock: Stock, batch: Sequence[Tensor], step: int
) -> tuple[StepGraph, Kind]:
    """Capture a step so that requested hyperparameters equal to zero keep their gradient.

    Args:
        record: Captures the step, given the hyperparameters to be taken as nonzero.
        requested: Hyperparameters whose gradient is asked for.
        stock: The user's tensors.
        batch: The step's batch.
        step: Its number.
    """
    stock = replace(stock, hyper={k: _at(v, step) for k, v in stock.hyper.items()})
    graph, kind = record(frozenset())
    hidden = {label: source for label, source in kind.zero_tests if label in requested}
    if not hidden:
        return graph, kind
    taken: frozenset[str] = frozenset()
    best = graph, kind
    for label in hidden:
        with contextlib.suppress(CaptureError):  # code that expects what earlier steps had made
            other = record(taken | {label})
            moved = stock.hyper.keys() - taken - {label}
            if _extends(other[1].after, kind.after) and _agree(
                graph, other[0], moved, stock, batch
            ):
                taken, best = taken | {label}, other
    cuts = tuple(
        Cut(
            (label,),
            source,
            "it is exactly zero, and the branch that is skipped there computes something else",
            "start it away from 0, or leave it out: pass meta=[...]",
        )
        for label, source in hidden.items()
        if label not in taken
    )
    return best[0], replace(best[1], cuts=(*best[1].cuts, *cuts))


def _at(value: Tensor | PerStep, step: int) -> Tensor:
    return value.per_step[step] if isinstance(value, PerStep) else value


def _extends(more: Layout, less: Layout) -> bool:
    """Whether one layout has all the state of another, and the same groups."""
    return more.groups == less.groups and set(less.labels) <= set(more.labels)


def _agree(
    first: StepGraph,
    second: StepGraph,
    moved: Set[str],
    stock: Stock,
    batch: Sequence[Tensor],
) -> bool:
    """Whether two captures of a step return the same new state, as functions of what may move.

    Optimizer state may differ where nothing else depends on it: a momentum that is multiplied
    by zero.

    Args:
        moved: Hyperparameters that may move, besides weights, state and data. A tensor may have
            another value at the next call.
    """
    generator = torch.Generator().manual_seed(0)
    values = _values((first, second), moved, stock, batch, generator)
    plain, taken = _state_after(first, values), _state_after(second, values)
    idle = {v.label for v in second.outputs if v.role is Role.OPT_STATE}
    idle -= {label for label in plain if _same(plain[label], taken[label])}
    other = {
        value.name: _near(_near(values[value.name], generator), generator)
        for value in second.inputs
        if value.role is Role.OPT_STATE and value.label in idle
    }
    again = _state_after(second, values | other)
    kept = plain.keys() - idle
    if not all(_same(plain[k], taken[k]) and _same(plain[k], again[k]) for k in kept):
        return False
    slopes = [_slopes(graph, values, moved, generator.manual_seed(0)) for graph in (first, second)]
    return all(torch.allclose(slopes[0][k], slopes[1][k], rtol=1e-4) for k in slopes[0])


def same_start(first: StepGraph, second: StepGraph, stock: Stock, batch: Sequence[Tensor]) -> bool:
    """Whether two captures of the first step return the same, to half of the digits."""
    generator = torch.Generator().manual_seed(0)
    values = _values((first, second), frozenset(), stock, batch, generator)
    one, other = _state_after(first, values), _state_after(second, values)
    return all(_alike(one[label], other[label]) for label in one.keys() & other.keys())


def _alike(first: Tensor, second: Tensor) -> bool:
    if not second.is_floating_point() or not second.numel():
        return True
    scale = float(second.abs().nan_to_num().max())
    error = (first - second.to(first.dtype)).nan_to_num().abs().max()
    return bool(float(error) <= math.sqrt(torch.finfo(second.dtype).eps) * scale)


def _values(
    graphs: Sequence[StepGraph],
    moved: Set[str],
    stock: Stock,
    batch: Sequence[Tensor],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Values for the inputs of several captures of a step, by name, near the user's own."""
    known = {
        **stock.theta,
        **stock.opt_state,
        **stock.buffers,
        **stock.average,
        **stock.context,
        **{label: _at(value, 0) for label, value in stock.hyper.items()},
    }
    batches = iter(batch)
    values: dict[str, Tensor] = {}
    for graph in graphs:
        for value, node in zip(graph.inputs, graph.placeholders, strict=True):
            if value.role is Role.CONSTANT or value.name in values:
                continue
            if value.role is Role.BATCH:
                values[value.name] = next(batches).detach()
            elif value.label in known:
                values[value.name] = known[value.label].detach()
            else:
                values[value.name] = _made_up(value, node, generator)
            if value.role is Role.THETA or value.label in moved:
                values[value.name] = _near(values[value.name], generator)
    return values


def _state_after(graph: StepGraph, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a step returns, by label."""
    given = [graph.constants.get(value.name, values.get(value.name)) for value in graph.inputs]
    pairs = zip(graph.outputs, graph.module(*given), strict=True)
    return {value.label: tensor for value, tensor in pairs if value.role in STATE_ROLES}


def _slopes(
    graph: StepGraph, values: Mapping[str, Tensor], moved: Set[str], generator: torch.Generator
) -> dict[str, Tensor]:
    """Derivatives of a random projection of the new weights in each of `moved`.

    They see what a difference of values cannot: an effect far below the weights' rounding.
    """
    leaves = {
        value.label: values[value.name].clone().requires_grad_()
        for value in graph.inputs
        if value.role is Role.HYPER and value.label in moved
    }
    names = {value.label: value.name for value in graph.inputs}
    with torch.enable_grad():
        after = _state_after(graph, {**values, **{names[k]: leaf for k, leaf in leaves.items()}})
        weights = [after[value.label] for value in graph.outputs if value.role is Role.THETA]
        drawn = [torch.rand(w.shape, generator=generator).to(w) for w in weights]
        projected = sum(((w * d).sum().real for w, d in zip(weights, drawn, strict=True)))
    zero = {label: torch.zeros_like(leaf) for label, leaf in leaves.items()}
    if not leaves or not isinstance(projected, Tensor) or not projected.requires_grad:
        return zero
    found = torch.autograd.grad(projected, list(leaves.values()), allow_unused=True)
    pairs = zip(leaves, found, strict=True)
    return zero | {label: slope for label, slope in pairs if slope is not None}


def _same(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first, second, rtol=1e-6, atol=1e-12, equal_nan=True)


def _near(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A tensor a little off the given one, towards zero: a decay rate stays below one."""
    drawn = torch.rand(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
    return torch.where(tensor == 0, 1e-2 * drawn, tensor * (1 - 1e-2 * drawn))


def _made_up(value: Value, node: fx.Node, generator: torch.Generator) -> Tensor:
    """A tensor for an input that the user does not hold (state of a later step, noise)."""
    like = node.meta["val"]
    drawn = torch.rand(like.shape, generator=generator)
    if value.role is Role.NOISE and value.noise is not None and not like.is_floating_point():
        drawn = torch.zeros(like.shape)
    return drawn.to(dtype=like.dtype, device=like.device)
