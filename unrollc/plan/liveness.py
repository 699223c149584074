"""Liveness: what one execution of a graph allocates, when it is freed, and its peak."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import Tensor, fx

from unrollc.step import StepGraph, tensors_of


@dataclass(frozen=True)
class Frame:
    """Memory of one call of a generated function.

    Attributes:
        peak: Most bytes that the call holds at once, its inputs excluded.
        peak_node: Name of the value at whose computation the peak is reached.
        results: For each output the storages behind it: an input's name, or a number for a
            storage that the call allocated; None for a structural zero.
        sizes: Bytes of the allocated storages by number.
    """

    peak: int
    peak_node: str
    results: tuple[str | int | None, ...]
    sizes: dict[int, int]


def storage_of(tensor: Tensor) -> int:
    """Identity of the memory behind a fake tensor."""
    return int(tensor.untyped_storage()._cdata)


def last_uses(step: StepGraph) -> dict[fx.Node, list[fx.Node]]:
    """For each op the values whose names are deleted right after it.

    Returned values and inputs are never deleted; a value that nobody reads goes at once.
    """
    returned = {node for node in step.results if node is not None}
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
        if node.op == "call_function" and node not in returned:
            ends.setdefault(end, []).append(node)
    return ends


def frame_of(step: StepGraph) -> Frame:
    """Walk the graph in order, allocating and freeing as the generated function does."""
    owners: dict[int, str] = {}
    for node in step.placeholders:
        for tensor in tensors_of(node):
            owners[storage_of(tensor)] = node.name
    ends = last_uses(step)
    numbers: dict[int, int] = {}
    sizes: dict[int, int] = {}
    holders: dict[int, set[fx.Node]] = {}
    live = peak = 0
    peak_node = ""
    for node in step.graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        fresh = []
        for tensor in tensors_of(node):
            storage = storage_of(tensor)
            if storage in owners:
                continue
            if storage not in numbers:
                numbers[storage] = len(numbers)
                sizes[numbers[storage]] = _bytes(tensor)
            if storage not in holders:
                holders[storage] = set()
                live += sizes[numbers[storage]]
                fresh.append(storage)
        for part in (node, *_projections(node)):
            for tensor in tensors_of(part):
                if storage_of(tensor) in holders and (part is not node or _single(node)):
                    holders[storage_of(tensor)].add(part)
        if live > peak:
            peak, peak_node = live, node.name
        for dead in ends.get(node, []):
            for storage in list(holders):
                holders[storage].discard(dead)
        for storage in [s for s, names in holders.items() if not names]:
            live -= sizes[numbers[storage]]
            del holders[storage]
    results = tuple(
        None if node is None else _result(node, owners, numbers) for node in step.results
    )
    return Frame(peak, peak_node, results, sizes)


def _bytes(tensor: Tensor) -> int:
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
