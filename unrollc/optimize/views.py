"""Views: which values lie in the memory of others, as graphs and their fake tensors say."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from unrollc.capture.faking import asked
from unrollc.step import tensors_of

aten = torch.ops.aten


def is_view(node: fx.Node) -> bool:
    """Whether an op's result lies in the memory of its first argument.

    The schema says so rather than the storages of fake tensors, which a rewrite that replaces an
    argument leaves behind. ``reshape`` is a view where the strides of its argument allow one.
    """
    source: Any = node.args[0] if node.args else None
    if node.target is operator.getitem:
        return is_view(source)
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.returns or not isinstance(source, fx.Node):
        return False
    if any(result.alias_info is None for result in schema.returns):
        return False
    if node.target is not aten.reshape.default:
        return True
    return _viewable(source.meta["val"], tuple(node.meta["val"].shape))


def _viewable(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    bare = torch.empty_strided(
        tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device="meta"
    )
    try:
        bare.view(shape)
    except RuntimeError:
        return False
    return True


def refresh_views(graph: fx.Graph) -> None:
    """Give views the storage of what they now view.

    A view whose base was replaced by an equal value (``x + 0`` by ``x``, one of two equal ops by
    the other) still has the fake storage of the base that is gone: memory planned from that would
    hold bytes that no run holds, and free the new base while the view reads it.
    """
    for node in graph.nodes:
        refresh_view(node)


def refresh_view(node: fx.Node) -> None:
    """`refresh_views` for one node, once its operands are right."""
    target: Any = node.target
    args: Any = node.args
    if target is operator.getitem:
        node.meta["val"] = args[0].meta["val"][args[1]]
    elif node.op == "call_function" and aliases(target) and not _shares(node):
        given: Any = fx.map_arg((args, node.kwargs), lambda n: n.meta["val"])
        args, kwargs = given
        with torch.no_grad(), args[0].fake_mode:
            node.meta["val"] = asked(target, args, kwargs)


def aliases(op: Any) -> bool:
    """Whether an op may return a view of an argument."""
    returns: Any = op._schema.returns
    return any(returned.alias_info is not None for returned in returns)


def _shares(node: fx.Node) -> bool:
    """Whether the node's storage is that of one of its operands, as its metadata has it."""
    storages = {t.untyped_storage()._cdata for n in node.all_input_nodes for t in tensors_of(n)}
    return all(t.untyped_storage()._cdata in storages for t in tensors_of(node))
