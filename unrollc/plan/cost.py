"""What a graph costs: multiplications of its products and bytes that its ops move."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry

from unrollc.plan.calibration import current_rates
from unrollc.step import StepGraph, iterate_calls, tensors_of


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
        """One number to compare: operations that take as long, by this machine's rates."""
        rates = current_rates()
        moved = self.bytes_moved * rates.operations_per_byte
        return self.operations + moved + self.calls * rates.operations_per_call

    @property
    def seconds(self) -> float:
        """A rough prediction: the parts one after the other."""
        return self.weight / current_rates().operations_per_second

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
