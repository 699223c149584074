"""Packing: parameters and state of an elementwise optimizer travel as vectors.

An optimizer that updates every tensor alike launches the same dozen ops for each, and its adjoint
twice as many. Where the tensors are small, launching takes longer than computing. What is updated
alike, small enough and moved by the validation loss is packed: one update for all.

The first step takes the state as the user has it and returns it packed, so that inputs, and the
cotangents of where the loop starts, keep their labels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from unrollc.capture.loop import Loop
from unrollc.optimize.congruence import Key, equal_state, key_of, merged, numbered
from unrollc.optimize.lanes import Kind, Lanes, Tuple
from unrollc.optimize.memory_format import channels_last
from unrollc.optimize.packed_step import Group, Pack, UnpackableError, packed
from unrollc.optimize.pooling import pool_first
from unrollc.optimize.simplify import simplify, structural_zeros
from unrollc.step import STATE_ROLES, Role, StepGraph, Value

#: Copying so many bytes takes as long as launching an op: 64 KiB at 40 GB/s, as caches do.
BYTES_PER_LAUNCH = 65536


@dataclass(frozen=True)
class Packing:
    """How the state of a program travels.

    Attributes:
        groups: What is packed.
        same: State that is equal at every step, with what stands for it.
    """

    groups: tuple[Group, ...] = ()
    same: Mapping[Key, Key] = field(default_factory=dict)

    def unpacked(self, values: Sequence[Value], state: Sequence[Tensor]) -> dict[Key, Tensor]:
        """The state as the user knows it, as views of what travels.

        Args:
            values: What travels.
            state: Its tensors.
        """
        packs = {pack.value: pack for group in self.groups for pack in group.packs}
        found: dict[Key, Tensor] = {}
        for value, tensor in zip(values, state, strict=True):
            if value not in packs:
                found[key_of(value)] = tensor
                continue
            pack = packs[value]
            parts = tensor.split(pack.sizes)
            for key, part, shape in zip(pack.members, parts, pack.shapes, strict=True):
                found[key] = part.view(shape)
        return found | {key: found[stands].clone() for key, stands in self.same.items()}

    def __str__(self) -> str:
        lines = [
            f"{len(group.shapes)} tensors of {sum(group.packs[0].sizes):,} elements in all, and "
            f"what the optimizer keeps for each, travel as {len(group.packs)} vectors"
            for group in self.groups
        ]
        if equal := sum(key != stands for key, stands in self.same.items()):
            lines.append(f"{equal} numbers of the optimizer's state are equal to others")
        return "\n".join(lines)


@dataclass(frozen=True)
class PackedLoop:
    """A loop whose state travels packed.

    Attributes:
        steps, sequence: As in `Loop`.
        origins: For each step the index of the captured step that it computes.
        val: The validation loss.
        val_gradient: The validation loss with B_T.
        packing: How the state travels.
        prologue: What no step changes, computed once before the first; None if that is nothing.
    """

    steps: tuple[StepGraph, ...]
    sequence: tuple[int, ...]
    origins: tuple[int, ...]
    val: StepGraph
    val_gradient: StepGraph | None
    packing: Packing
    prologue: StepGraph | None = None


def as_captured(loop: Loop, val: StepGraph, val_gradient: StepGraph | None) -> PackedLoop:
    """``loop --> the same loop``, nothing packed."""
    origins = tuple(range(len(loop.steps)))
    return PackedLoop(loop.steps, loop.sequence, origins, val, val_gradient, Packing())


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
    for group in _groups(loop):
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


# -- what is packed with what -----------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """A step for looking up: its state, its gradients, and what is equal in it."""

    inputs: Mapping[fx.Node, Key]
    results: Mapping[Key, fx.Node | None]
    gradients: Mapping[str, fx.Node | None]
    numbers: Mapping[fx.Node, int]

    @staticmethod
    def of(step: StepGraph) -> _View:
        pairs = zip(step.inputs, step.placeholders, strict=True)
        return _View(
            {node: key_of(value) for value, node in pairs},
            {key_of(value): node for value, node in step.outputs_with(*STATE_ROLES)},
            {v.label: n for v, n in step.outputs_with(Role.GRADIENT) if v.of is Role.THETA},
            numbered(step, {}),
        )


@dataclass(frozen=True)
class _Alignment:
    """Two parameters that are updated alike.

    Attributes:
        state: For each value of the state of the first that of the second.
        ops: Ops of the update that are one for both.
        spread: Numbers that each has of its own.
    """

    state: Mapping[Key, Key]
    ops: int
    spread: int

    @property
    def launches(self) -> int:
        """Launches that packing another member saves in a step and its adjoint.

        The adjoint has about two ops for each; what is gathered is reshaped and sliced.
        """
        return 3 * self.ops - 6 - 3 * self.spread

    def pays_for(self, size: int) -> bool:
        """Whether they are worth the copies of so many bytes of parameters.

        Gradients and cotangents are concatenated, numbers repeated and summed up: each is read and
        written once.
        """
        return self.launches * BYTES_PER_LAUNCH > 4 * (1 + self.spread) * size


def _groups(loop: PackedLoop) -> list[Group]:
    """The parameters that are packed with one another."""
    views = [_View.of(loop.steps[index]) for index in dict.fromkeys(loop.sequence[1:])]
    steady = loop.steps[loop.sequence[-1]]
    sizes = _candidates(loop, steady)
    classes: list[tuple[str, dict[str, _Alignment]]] = []
    for label in sizes:
        for leader, members in classes:
            found = _aligned(views, leader, label)
            if found is not None and all(
                found.state.keys() == other.state.keys() for other in members.values()
            ):
                members[label] = found
                break
        else:
            classes.append((label, {}))
    names = _Names(loop)
    groups: list[Group] = []
    taken: set[Key] = set()
    for leader, members in classes:
        if not members:
            continue
        last = next(reversed(members.values()))
        own = replace(last, state={key: key for key in last.state})
        every = {leader: own, **members}
        paying = {k: found for k, found in every.items() if found.pays_for(sizes[k])}
        if len(paying) > 1 and last.launches * (len(paying) - 1) > _ONCE:
            group = _group(steady, paying, names)
            keys = [key for pack in group.packs for key in pack.members]
            if len(taken | set(keys)) == len(taken) + len(keys):  # a number may serve several
                groups.append(group)
                taken.update(keys)
    return groups


#: Launches for a group as a whole: splits and concatenations of a step and its adjoint.
_ONCE = 8


def _candidates(loop: PackedLoop, steady: StepGraph) -> dict[str, int]:
    """Bytes of the parameters that may be packed: dense ones that the validation loss moves.

    The cotangent of a vector is one value: where that of a member is a structural zero, verdicts
    would no longer see it.
    """
    moved = None
    if loop.val_gradient is not None:
        zeros = structural_zeros(loop.val_gradient)
        moved = {
            value.label
            for value, zero in zip(loop.val_gradient.outputs, zeros, strict=True)
            if value.role is Role.COTANGENT and value.of is Role.THETA and not zero
        }
    read = {value.label for value, _ in loop.val.inputs_with(Role.THETA)}
    found = {}
    for value, node in steady.inputs_with(Role.THETA):
        tensor = node.meta["val"]
        dense = tensor.dtype in _DTYPES and tensor.dim() > 0 and tensor.numel() > 0
        if dense and tensor.is_contiguous() and value.label in (read if moved is None else moved):
            found[value.label] = tensor.numel() * tensor.element_size()
    return found


#: In narrower types an op takes a number that is no part of a vector in a wider type.
_DTYPES = (torch.float32, torch.float64)


def _aligned(views: Sequence[_View], first: str, second: str) -> _Alignment | None:
    """Whether two parameters are updated alike in all steps but the first of the loop."""
    state: dict[Key, Key] = {(Role.THETA, first): (Role.THETA, second)}
    lanes: list[Lanes] = []
    for view in views:
        both = [view.results[Role.THETA, label] for label in (first, second)]
        if any(node is None for node in both):
            return None
        shapes = [node.meta["val"].shape for node in both if node is not None]
        lanes.append(Lanes(shapes, view.numbers, set()))
    followed = 0
    while followed < len(state):
        mine, theirs = list(state.items())[followed]
        followed += 1
        for view, found in zip(views, lanes, strict=True):
            ends = (view.results.get(mine), view.results.get(theirs))
            if None in ends or not found.follow(ends):  # type: ignore[arg-type]
                return None
            if not _are_leaves(view, found, state, (first, second)):
                return None
    if len(set(state.values())) < len(state):
        return None
    return _counted(state, lanes[-1])


def _are_leaves(view: _View, lanes: Lanes, state: dict[Key, Key], labels: tuple[str, str]) -> bool:
    """Whether what is gathered is state, gradients and numbers; state that is met is noted."""
    gradients = tuple(view.gradients.get(label) for label in labels)
    for nodes, kind in lanes.gathered.items():
        keys = [view.inputs.get(node) for node in nodes]
        mine, theirs = keys
        if mine and theirs and mine[0] is theirs[0] is Role.OPT_STATE:
            if state.setdefault(mine, theirs) != theirs:
                return False
        elif kind is Kind.FULL and nodes != gradients and state.get(mine) != theirs:  # type: ignore[arg-type]
            return False
    return True


def _counted(state: Mapping[Key, Key], lanes: Lanes) -> _Alignment:
    full = [lane for lane in lanes.found.values() if lane.kind is Kind.FULL and lane.target]
    numbers: set[Tuple] = {
        operand
        for lane in full
        for operand in lane.operands
        if isinstance(operand, tuple) and lanes.kind_of(operand) is Kind.SCALAR
    }
    return _Alignment(state, len(full), len(numbers))


def _group(steady: StepGraph, members: Mapping[str, _Alignment], names: _Names) -> Group:
    values = {key_of(value): value for value, _ in steady.outputs_with(*STATE_ROLES)}
    nodes = {key_of(value): node for value, node in steady.outputs_with(*STATE_ROLES)}
    first = next(iter(members.values()))
    packs = []
    for leading in first.state:
        keys = tuple(found.state[leading] for found in members.values())
        named = values[keys[0]]
        label = f"{named.label} and {len(keys) - 1} more"
        shapes = tuple(nodes[key].meta["val"].shape for key in keys)  # type: ignore[union-attr]
        value = Value(named.role, label, names(f"packed_{named.name}"))
        packs.append(Pack(value, keys, shapes))
    return Group(tuple(packs))


class _Names:
    """Names of vectors, which no other value of the program has."""

    def __init__(self, loop: PackedLoop) -> None:
        graphs = (*loop.steps, loop.val)
        self._taken = {v.name for graph in graphs for v in (*graph.inputs, *graph.outputs)}

    def __call__(self, name: str) -> str:
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name
