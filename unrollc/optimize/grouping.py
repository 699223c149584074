"""Which parameters are packed with one another: those that are updated alike, where it pays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from unrollc.optimize.congruence import Key, key_of, numbered
from unrollc.optimize.lanes import Kind, Lanes, Tuple
from unrollc.optimize.packed_loop import PackedLoop
from unrollc.optimize.packed_step import Group, Pack
from unrollc.optimize.simplify import structural_zeros
from unrollc.step import STATE_ROLES, Role, StepGraph, Value

#: Copying so many bytes takes as long as launching an op: 64 KiB at 40 GB/s, as caches do.
BYTES_PER_LAUNCH = 65536


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


def groups_of(loop: PackedLoop) -> list[Group]:
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
