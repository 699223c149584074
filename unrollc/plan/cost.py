"""What a graph costs: multiplications of its products and bytes that its ops move."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry

from unrollc.step import StepGraph, iterate_calls, tensors_of

#: A double or float read or written costs about as much as this many operations of a product
#: (a CPU core does some 100 GFLOP/s in a product and moves some 10 GB/s), an op launch as much
#: as this many. Only ratios matter: the numbers choose between two graphs of one step.
_OPERATIONS_PER_BYTE = 10.0
_OPERATIONS_PER_CALL = 200_000.0


@dataclass(frozen=True)
class Cost:
    """Predicted work of one execution of a graph.

    Attributes:
        operations: Floating-point operations of matrix products and convolutions.
        bytes_moved: Bytes read and written by all ops.
        calls: Ops.
    """

    operations: int
    bytes_moved: int
    calls: int

    @property
    def weight(self) -> float:
        """One number to compare."""
        moved = self.bytes_moved * _OPERATIONS_PER_BYTE
        return self.operations + moved + self.calls * _OPERATIONS_PER_CALL

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.operations + other.operations,
            self.bytes_moved + other.bytes_moved,
            self.calls + other.calls,
        )


NOTHING = Cost(0, 0, 0)


def cost_of(step: StepGraph) -> Cost:
    """The cost of a graph."""
    return sum((cost_of_node(node) for node in iterate_calls(step)), NOTHING)


def cost_of_node(node: fx.Node) -> Cost:
    """The cost of one op."""
    moved = 0
    if not _is_view(node):
        sizes = [t for source in node.all_input_nodes for t in tensors_of(source)]
        moved = sum(t.numel() * t.element_size() for t in (*sizes, *tensors_of(node)))
    return Cost(_operations(node), moved, 1)


def _operations(node: fx.Node) -> int:
    target: Any = node.target
    count = flop_registry.get(target.overloadpacket)
    if count is None:
        return 0
    value = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    args, kwargs = value
    return int(count(*args, **kwargs, out_val=node.meta["val"]))


def _is_view(node: fx.Node) -> bool:
    result = node.meta["val"]
    if not isinstance(result, Tensor):
        return False
    storage = result.untyped_storage()._cdata
    return any(
        t.untyped_storage()._cdata == storage
        for source in node.all_input_nodes
        for t in tensors_of(source)
    )


def human_bytes(count: int) -> str:
    """``64.0 MiB``"""
    if count < 1024:
        return f"{count} B"
    power = min(int(math.log(count, 1024)), 4)
    return f"{count / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
