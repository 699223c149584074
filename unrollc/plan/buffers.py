"""Buffers: where in one slab of bytes each storage of a graph lives, and for how long.

Two storages may share bytes when no op runs during the life of both. Placing intervals of given
lengths and heights without overlap is dynamic storage allocation, which is NP-hard; the greedy
placements are those that Pisarchyk & Lee (2020, "Efficient Memory Management for Deep Neural Net
Inference") found best, improved by placing first what stuck out at the top. The result says how far
it is from the lower bound, the most bytes that live at once.
"""

from __future__ import annotations

import bisect
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from unrollc.plan.liveness import TAKEN_OVER, storage_bytes, storage_of
from unrollc.step import Role, StepGraph, iterate_calls, tensors_of

#: A cache line, and what the CPU allocator of PyTorch aligns to.
ALIGNMENT = 64

#: The search ends with a slab within this factor of the bound: the next byte costs a placement
#: more, tenths of a second for the thousands of storages of a transformer's adjoint.
_ENOUGH = 1.02

#: Placements that the search tries for each order before it settles for the best so far.
_ROUNDS = 16


@dataclass(frozen=True)
class Lifetime:
    """The life of one storage within one call of a generated function.

    Attributes:
        name: The value that brings the storage into being: an op's result (``sort[1]`` where
            nobody reads that result of several) or an input that the call owns.
        bytes: Its size.
        first: Position of the op that allocates it (`step.iterate_calls` counts); 0 for an input.
        last: Position of the last op that runs while it must be there; the number of ops for what
            is returned.
    """

    name: str
    bytes: int
    first: int
    last: int


@dataclass(frozen=True)
class Slot:
    """A place in the slab: ``bytes`` bytes from ``offset`` on, those of `storage`."""

    storage: str
    offset: int
    bytes: int


@dataclass(frozen=True)
class BufferPlan:
    """Where the storages of one call live.

    Attributes:
        lifetimes: Every storage that the call allocates or owns, in order of appearance.
        offsets: For each storage its first byte in the slab, a multiple of `ALIGNMENT`.
        slots: The place of every value by name; views have that of their base.
        slab_bytes: Size of the slab.
        lower_bound: Largest sum of bytes that live at once: no placement takes less.
    """

    lifetimes: tuple[Lifetime, ...]
    offsets: dict[str, int]
    slots: dict[str, Slot]
    slab_bytes: int
    lower_bound: int


def plan_buffers(step: StepGraph, owned: Collection[Role] = TAKEN_OVER) -> BufferPlan:
    """``graph --> plan``: lifetimes, and an offset for each.

    Args:
        step: The graph that one call executes, op by op.
        owned: Roles of the inputs that the call owns; they die at their last use like any value
            of its own. The others are somebody else's memory and take no part.
    """
    holders = _holders(step, owned)
    lifetimes = _lifetimes(step, holders)
    offsets = place(lifetimes)
    by_name = {lifetime.name: lifetime for lifetime in lifetimes}
    slots: dict[str, Slot] = {}
    for node in (*step.placeholders, *iterate_calls(step)):
        for value, tensor in _named_results(node):
            if (name := holders.get(storage_of(tensor))) is not None:
                slots[value] = Slot(name, offsets[name], by_name[name].bytes)
    height = slab_bytes(lifetimes, offsets)
    return BufferPlan(lifetimes, offsets, slots, height, most_live(lifetimes))


# --- lifetimes --------------------------------------------------------------------------------


def lifetimes_of(step: StepGraph, owned: Collection[Role] = TAKEN_OVER) -> tuple[Lifetime, ...]:
    """The lives of the storages that one call allocates or owns, in order of appearance."""
    return _lifetimes(step, _holders(step, owned))


def _holders(step: StepGraph, owned: Collection[Role]) -> dict[int, str]:
    """For each storage that the call allocates or owns the name of its first value."""
    foreign: set[int] = set()
    holders: dict[int, str] = {}
    for value, node in zip(step.inputs, step.placeholders, strict=True):
        for name, tensor in _named_results(node):
            if value.role in owned:
                holders.setdefault(storage_of(tensor), name)
            else:
                foreign.add(storage_of(tensor))
    for node in iterate_calls(step):
        for name, tensor in _named_results(node):
            if storage_of(tensor) not in foreign:
                holders.setdefault(storage_of(tensor), name)
    return holders


def _named_results(node: fx.Node) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an input or op with the names of the nodes that stand for them."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        yield node.name, value
        return
    parts = {user.args[1]: user.name for user in node.users if user.target is operator.getitem}
    for index, item in enumerate(value if isinstance(value, tuple | list) else ()):
        if isinstance(item, Tensor):
            yield parts.get(index, f"{node.name}[{index}]"), item


def _lifetimes(step: StepGraph, holders: dict[int, str]) -> tuple[Lifetime, ...]:
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    sizes: dict[str, int] = {}

    def touch(tensor: Tensor, position: int) -> None:
        name = holders.get(storage_of(tensor))
        if name is not None:
            first.setdefault(name, position)
            last[name] = position
            sizes[name] = storage_bytes(tensor)

    for node in step.placeholders:
        for tensor in tensors_of(node):
            touch(tensor, 0)
    position = 0
    for position, node in enumerate(iterate_calls(step)):
        for operand in (*node.all_input_nodes, node):
            for tensor in tensors_of(operand):
                touch(tensor, position)
    for result in step.results:
        for tensor in [] if result is None else tensors_of(result):
            touch(tensor, position + 1)
    return tuple(Lifetime(name, sizes[name], first[name], last[name]) for name in first)


def most_live(lifetimes: Sequence[Lifetime]) -> int:
    """Largest sum of bytes that live at once: the lower bound of every slab."""
    changes: dict[int, int] = {}
    for lifetime in lifetimes:
        changes[lifetime.first] = changes.get(lifetime.first, 0) + lifetime.bytes
        changes[lifetime.last + 1] = changes.get(lifetime.last + 1, 0) - lifetime.bytes
    live = most = 0
    for position in sorted(changes):
        live += changes[position]
        most = max(most, live)
    return most


# --- placement --------------------------------------------------------------------------------


def aligned(size: int) -> int:
    """`size` rounded up to a multiple of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def slab_bytes(lifetimes: Sequence[Lifetime], offsets: dict[str, int]) -> int:
    """Bytes from the slab's start to the end of its last storage."""
    return max((offsets[life.name] + aligned(life.bytes) for life in lifetimes), default=0)


def place(lifetimes: Sequence[Lifetime]) -> dict[str, int]:
    """Offsets by name, so that storages whose lives meet share no byte.

    The best of several greedy orders, each improved by `_promoted`; the same input gives the same
    offsets.
    """
    bound = most_live([Lifetime(x.name, aligned(x.bytes), x.first, x.last) for x in lifetimes])
    best: dict[str, int] = {}
    height = None
    for key in _ORDERS:
        for offsets in _promoted(sorted(lifetimes, key=key)):
            top = slab_bytes(lifetimes, offsets)
            if height is None or top < height:
                best, height = offsets, top
            if height <= bound * _ENOUGH:
                return best
    return best


#: Largest first; largest in bytes and time first; in order of appearance (ties: the largest).
_ORDERS: tuple[Callable[[Lifetime], tuple[int, int]], ...] = (
    lambda life: (-life.bytes, life.first),
    lambda life: (-life.bytes * (life.last - life.first + 1), life.first),
    lambda life: (life.first, -life.bytes),
)


def _promoted(order: list[Lifetime]) -> Iterator[dict[str, int]]:
    """Greedy placements: of `order`, then with what stood at the top placed before all else.

    Ends when the topmost storage stands at the front already, or after `_ROUNDS`.
    """
    for _ in range(_ROUNDS):
        offsets = _place_in(order)
        yield offsets
        top = slab_bytes(order, offsets)
        peaks = [life for life in order if offsets[life.name] + aligned(life.bytes) == top]
        if order[: len(peaks)] == peaks:
            return
        order = peaks + [life for life in order if life not in peaks]


def _place_in(order: Sequence[Lifetime]) -> dict[str, int]:
    """Each storage in turn into the tightest gap that its lifetime leaves (best fit)."""
    offsets: dict[str, int] = {}
    placed: list[tuple[int, int, int, int]] = []  # start and end in bytes, first and last; sorted
    for life in order:
        size, first, last = aligned(life.bytes), life.first, life.last
        end = 0
        best: tuple[int, int] | None = None
        for start, stop, other_first, other_last in placed:
            if first <= other_last and other_first <= last and stop > end:
                gap = start - end
                if gap >= size and (best is None or gap < best[0]):
                    best = (gap, end)
                end = stop
        offset = end if best is None else best[1]
        offsets[life.name] = offset
        bisect.insort(placed, (offset, offset + size, first, last))
    return offsets
