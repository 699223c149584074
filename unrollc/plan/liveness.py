"""Liveness: what one execution of a graph allocates, when it is freed, and its peak."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from unrollc.plan.scratch import scratch_of
from unrollc.step import CARRIED, Role, StepGraph, tensors_of

#: Roles of inputs that a generated function takes over: lists that it empties, so that a tensor
#: that nobody else holds dies after its last use.
TAKEN_OVER = (*CARRIED, Role.RESIDUAL, Role.COTANGENT, Role.NOISE)


@dataclass(frozen=True)
class Owned:
    """An input whose memory belongs to the call.

    Attributes:
        name: The input.
        storage: Its storage; inputs that share one have the same number.
        bytes: The storage's size.
    """

    name: str
    storage: int
    bytes: int


@dataclass(frozen=True)
class Frame:
    """Memory of one call of a generated function.

    Attributes:
        peak: Most bytes that the call holds at once beyond what was there when it began. Negative
            where it frees more of its inputs than it ever allocates.
        peak_node: Name of the value at whose computation the peak is reached.
        held: What the call has allocated and holds at that moment: bytes by name of a value; the
            scratch memory of the op that runs goes by its name as well.
        freed: Which of the owned storages are gone by then, with their bytes.
        results: For each output the storages behind it: an input's name, or a number for a
            storage that the call allocated; None for a structural zero.
        sizes: Bytes of the allocated storages by number.
    """

    peak: int
    peak_node: str
    held: tuple[tuple[str, int], ...]
    freed: tuple[tuple[int, int], ...]
    results: tuple[str | int | None, ...]
    sizes: dict[int, int]


def storage_of(tensor: Tensor) -> int:
    """Identity of the memory behind a fake tensor."""
    return int(tensor.untyped_storage()._cdata)


def last_uses(step: StepGraph) -> dict[fx.Node, list[fx.Node]]:
    """For each op the values whose names are deleted right after it.

    Returned values are never deleted, and of inputs only those that the function takes over; a
    value that nobody reads goes at once.
    """
    returned = {node for node in step.results if node is not None}
    taken = {node for _, node in step.inputs_with(*TAKEN_OVER)}
    last: dict[fx.Node, fx.Node] = {}
    for node in step.graph.nodes:
        if node.op != "call_function":
            continue
        last[node] = node
        anchor = node.args[0] if node.target is operator.getitem else node
        for source in node.all_input_nodes:
            last[source] = anchor
        if node.target is operator.getitem:
            last[node] = anchor
    ends: dict[fx.Node, list[fx.Node]] = {}
    for node, end in last.items():
        if (node.op == "call_function" or node in taken) and node not in returned:
            ends.setdefault(end, []).append(node)
    return ends


def unread(step: StepGraph) -> list[fx.Node]:
    """Inputs that the function takes over and neither reads nor returns; they go at once."""
    returned = set(step.results)
    drawn = draws_noise(step)
    return [
        node
        for value, node in step.inputs_with(*TAKEN_OVER)
        if not node.users and node not in returned and (value.role is not Role.NOISE or drawn)
    ]


def draws_noise(step: StepGraph) -> bool:
    """Whether the graph reads any of its noise; where it does not, none is drawn for it."""
    return any(node.users for _, node in step.inputs_with(Role.NOISE))


def frame_of(step: StepGraph, owned: Sequence[Owned] = ()) -> Frame:
    """Walk the graph in order, allocating and freeing as the generated function does.

    Args:
        step: The graph.
        owned: The inputs that nobody but the call holds.
    """
    walk = _Walk(step, owned)
    for node in step.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            walk.execute(node)
    return walk.frame()


class _Walk:
    """The storages that a call holds while its ops run."""

    def __init__(self, step: StepGraph, owned: Sequence[Owned]) -> None:
        self.step = step
        self.ends = last_uses(step)
        self.owners: dict[int, str] = {}
        for node in step.placeholders:
            for tensor in tensors_of(node):
                self.owners[storage_of(tensor)] = node.name
        self.numbers: dict[int, int] = {}
        self.sizes: dict[int, int] = {}
        self.holders: dict[int, set[fx.Node]] = {}
        self.first: dict[int, str] = {}
        self.live = self.peak = 0
        self.peak_node = ""
        self.held: tuple[tuple[str, int], ...] = ()
        self.gone: list[tuple[int, int]] = []
        self.freed: tuple[tuple[int, int], ...] = ()
        # An owned storage goes with the last of the inputs that share it.
        self.owned = {each.name: each for each in owned}
        self.sharing: dict[int, set[int]] = {}
        by_name = {node.name: node for node in step.placeholders}
        for each in owned:
            (tensor,) = tensors_of(by_name[each.name])
            self.holders[storage_of(tensor)] = {by_name[each.name]}
            self.sharing.setdefault(each.storage, set()).add(storage_of(tensor))
        for node in unread(step):
            self._release(node)
        self._free()
        self.peak, self.freed = self.live, tuple(self.gone)

    def execute(self, node: fx.Node) -> None:
        for tensor in tensors_of(node):
            storage = storage_of(tensor)
            if storage in self.owners:
                continue
            if storage not in self.numbers:
                self.numbers[storage] = len(self.numbers)
                self.sizes[self.numbers[storage]] = storage_bytes(tensor)
                self.first[storage] = node.name
            if storage not in self.holders:
                self.holders[storage] = set()
                self.live += self.sizes[self.numbers[storage]]
        for part in (node, *_projections(node)):
            for tensor in tensors_of(part):
                if storage_of(tensor) in self.holders and (part is not node or _single(node)):
                    self.holders[storage_of(tensor)].add(part)
        scratch = scratch_of(node)
        if self.live + scratch > self.peak:
            self.peak, self.peak_node = self.live + scratch, node.name
            self.freed = tuple(self.gone)
            held = [
                (self.first[storage], self.sizes[self.numbers[storage]])
                for storage in self.holders
                if storage in self.numbers
            ]
            self.held = (*held, (node.name, scratch)) if scratch else tuple(held)
        for dead in self.ends.get(node, []):
            self._release(dead)
        self._free()

    def _release(self, node: fx.Node) -> None:
        for holders in self.holders.values():
            holders.discard(node)

    def _free(self) -> None:
        for storage in [s for s, names in self.holders.items() if not names]:
            del self.holders[storage]
            if storage in self.numbers:
                self.live -= self.sizes[self.numbers[storage]]
                continue
            each = self.owned[self.owners[storage]]
            others = self.sharing[each.storage]
            others.discard(storage)
            if not others:
                self.live -= each.bytes
                self.gone.append((each.storage, each.bytes))

    def frame(self) -> Frame:
        results = tuple(
            None if node is None else _result(node, self.owners, self.numbers)
            for node in self.step.results
        )
        return Frame(self.peak, self.peak_node, self.held, self.freed, results, self.sizes)


def storage_bytes(tensor: Tensor) -> int:
    """Bytes of the memory behind a fake tensor."""
    return int(tensor.untyped_storage().nbytes())


def _single(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _projections(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if user.target is operator.getitem]


def _result(node: fx.Node, owners: dict[int, str], numbers: dict[int, int]) -> str | int:
    if node.op == "placeholder":
        return node.name
    storage = storage_of(node.meta["val"])
    return owners[storage] if storage in owners else numbers[storage]
