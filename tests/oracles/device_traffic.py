"""What in a program would make the host wait for the device, or copy between the two."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from unrollc.step import Role, StepGraph

aten = torch.ops.aten

#: Ops whose answer the host reads, or whose result has a shape that depends on data. PyTorch tags
#: most of them; some untagged ones count on the device too.
_WAITING = {
    aten._local_scalar_dense,
    aten.bincount,
    aten.equal,
    aten.histc,
    aten.is_nonzero,
    aten.item,
    aten.masked_select,
    aten.nonzero,
    aten.repeat_interleave,
    aten.unique_consecutive,
    aten.unique_dim,
    aten._unique2,
}
_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index}

#: What generated code must not contain.
_TELLTALE = re.compile(
    r"\bcpu\b|\.(item|tolist|cpu|numpy|nonzero|synchronize)\(|\b(bool|float|int)\(|\.to\("
    r"|^\w+ = torch\.tensor\(\[[^\]]*\], dtype=[\w.]*\)",
    re.MULTILINE,
)


def faults_of_call(func: Any, operands: Sequence[Tensor], results: Sequence[Tensor]) -> list[str]:
    """What is wrong with one op, in words; nothing where all of it stays on one device.

    A number on the CPU (0-dim) beside operands on the device is none: its value travels with the
    launch of an elementwise kernel.
    """
    packet = getattr(func, "overloadpacket", None)
    away = [tensor for tensor in operands if tensor.device.type != "cpu"]
    host = [tensor for tensor in operands if tensor.device.type == "cpu"]
    arrived = {tensor.device.type for tensor in results}
    found = []
    if away and (packet in _WAITING or (packet not in _INDEXING and _TAGS & set(func.tags))):
        found.append(f"{func} waits for the device")
    if away and packet in _INDEXING and any(t.dtype in (torch.bool, torch.uint8) for t in away[1:]):
        found.append(f"{func} with a mask waits for the device")
    if away and "cpu" in arrived:
        found.append(f"{func} copies to the host")
    if host and not away and arrived - {"cpu"}:
        found.append(f"{func} copies to the device")
    if host and away:
        writes = func._schema.is_mutable or packet in (aten.copy, aten._to_copy)
        if (
            any(t.dim() for t in host)
            or torch.Tag.pointwise not in func.tags
            or packet is aten.copy
        ):
            found.append(f"{func} takes a tensor of the host")
        elif writes and operands[0].device.type == "cpu":
            found.append(f"{func} copies to the host")
    return found


def faults_of_graph(graph: StepGraph) -> list[str]:
    """What is wrong with the ops of a graph, and with constants that are no single numbers."""
    found = []
    for node in graph.module.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            operands = [each.meta["val"] for each in node.all_input_nodes]
            found += faults_of_call(node.target, _tensors(operands), _tensors(node.meta["val"]))
    for value, node in graph.inputs_with(Role.CONSTANT):
        found += _of_constant(value.name, node)
    return found


def faults_of_code(code: str) -> list[str]:
    """The lines of a generated program that name the host or read a tensor."""
    lines = (line.partition("#")[0] for line in code.splitlines())
    return [line for line in lines if _TELLTALE.search(line)]


def _of_constant(name: str, node: fx.Node) -> Iterable[str]:
    if node.meta["val"].dim() and node.meta["val"].device.type == "cpu":
        yield f"constant {name} of shape {list(node.meta['val'].shape)} is on the host"


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
