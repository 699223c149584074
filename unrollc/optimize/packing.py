"""Packing: parameters and state of an elementwise optimizer travel as vectors.

An optimizer that updates every tensor alike launches the same dozen ops for each, and its adjoint
twice as many. Where the tensors are small, launching takes longer than computing. What is updated
alike, small enough and moved by the validation loss is packed: one update for all.

The first step takes the state as the user has it and returns it packed, so that inputs, and the
cotangents of where the loop starts, keep their labels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

from unrollc.capture.loop import Loop
from unrollc.optimize.congruence import equal_state, merged
from unrollc.optimize.grouping import groups_of
from unrollc.optimize.memory_format import channels_last
from unrollc.optimize.packed_loop import PackedLoop, as_captured
from unrollc.optimize.packed_step import UnpackableError, packed
from unrollc.optimize.pooling import pool_first
from unrollc.optimize.simplify import simplify
from unrollc.step import Role, StepGraph


def rewritten(
    loop: Loop,
    val: StepGraph,
    val_gradient: StepGraph | None,
    passes: Sequence[LoopPass] | None = None,
) -> PackedLoop:
    """``loop --> loop``: the passes over a loop as a whole, before it is differentiated.

    Args:
        loop: The captured steps.
        val: The validation loss.
        val_gradient: The validation loss with B_T, simplified; None without a backward pass.
        passes: Some of `PASSES`; None for all.
    """
    found = as_captured(loop, val, val_gradient)
    for rewrite in PASSES if passes is None else passes:
        found = rewrite(found)
    return found


def lay_out_images(loop: PackedLoop) -> PackedLoop:
    """``convolution(batch) --> convolution(batch in channels_last)`` (see `memory_format`)."""
    return _everywhere(loop, channels_last)


def pool_before_relu(loop: PackedLoop) -> PackedLoop:
    """``max_pool(relu(x)) --> relu(max_pool(x))`` (see `pooling`)."""
    return _everywhere(loop, pool_first)


def _everywhere(loop: PackedLoop, rewrite: Callable[[StepGraph], StepGraph]) -> PackedLoop:
    return replace(
        loop,
        steps=tuple(rewrite(step) for step in loop.steps),
        val=rewrite(loop.val),
        val_gradient=loop.val_gradient and rewrite(loop.val_gradient),
    )


def _may_pack(loop: PackedLoop) -> bool:
    """Whether there is a state to pack, which no average of weights reads."""
    averaged = any(step.outputs_with(Role.AVERAGE) for step in loop.steps)
    return len(loop.sequence) > 1 and not averaged


def share_equal_state(loop: PackedLoop) -> PackedLoop:
    """Step counters ``a, b`` that are equal after every step ``--> a``."""
    if not _may_pack(loop):
        return loop
    same = {k: s for k, s in equal_state(loop.steps, loop.sequence).items() if k != s}
    if not same:
        return loop
    found = _each_step(loop, functools.partial(merged, same=same))
    return replace(found, packing=replace(loop.packing, same=same))


def pack_alike(loop: PackedLoop) -> PackedLoop:
    """``n updates of n tensors --> one update of a vector``, for tensors that are updated alike."""
    if not _may_pack(loop):
        return loop
    for group in groups_of(loop):
        try:
            found = _each_step(loop, functools.partial(packed, group=group))
        except UnpackableError:
            continue
        groups = (*loop.packing.groups, group)
        loop = replace(found, packing=replace(loop.packing, groups=groups))
    return loop


LoopPass = Callable[[PackedLoop], PackedLoop]

#: The pipeline, in order.
PASSES: tuple[LoopPass, ...] = (
    pool_before_relu,
    lay_out_images,
    share_equal_state,
    pack_alike,
)


def _each_step(loop: PackedLoop, rewrite: Callable[..., StepGraph]) -> PackedLoop:
    """Every graph rewritten; the first step of the loop is one of its own."""
    known: dict[tuple[int, bool], int] = {}
    steps: list[StepGraph] = []
    order = []
    for number, index in enumerate(loop.sequence):
        key = (index, number == 0)
        if key not in known:
            known[key] = len(steps)
            steps.append(rewrite(loop.steps[index], first=number == 0))
        order.append(known[key])
    return replace(
        loop,
        steps=tuple(steps),
        sequence=tuple(order),
        origins=tuple(loop.origins[index] for index, _ in known),
        val=rewrite(loop.val),
        val_gradient=loop.val_gradient and simplify(rewrite(loop.val_gradient)),
    )
