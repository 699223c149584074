"""Passes that remove what a graph does not need. Each is ``before --> after``, values unchanged.

`simplify` applies them to a copy until nothing changes and verifies the graph after each. Only
`share_scaled_products` rounds in another order.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from unrollc.capture.faking import asked
from unrollc.optimize.fuse import FUSIONS
from unrollc.optimize.memory_format import follows_images, keep_images, propagate
from unrollc.optimize.scaled_products import share_scaled_products
from unrollc.optimize.views import refresh_views
from unrollc.step import ATTACH, DERIVED, StepGraph, copy, verify

aten = torch.ops.aten

Pass = Callable[[fx.Graph], bool]


def simplify(step: StepGraph) -> StepGraph:
    """A simplified copy of `step`."""
    result = copy(step)
    changed = True
    while changed:
        changed = False
        for rewrite in PASSES:
            if rewrite(result.graph):
                changed = True
                verify(result)
    if follows_images(result.graph):
        propagate(result)
        copy_once(result.graph)
    refresh_views(result.graph)
    return result


def remove_identities(graph: fx.Graph) -> bool:
    """``detach(x) --> x``, and other ops that change nothing about the value.

    Derivatives have been taken when this runs, so stop-gradients and declared derivatives have
    done their work.
    """
    changed = False
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        replacement = _identity(node)
        if replacement is not None:
            if "called" in node.meta:
                replacement.meta.setdefault("called", node.meta["called"])
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)
            changed = True
    return changed


def _identity(node: fx.Node) -> fx.Node | None:
    args: Any = node.args
    if node.target in (aten.detach.default, aten.alias.default, aten.clone.default, ATTACH):
        return args[0] if _alike(node, args[0]) else None
    if node.target is aten.copy.default and isinstance(args[1], fx.Node):
        return args[1] if _alike(node, args[1]) else None
    if node.target in (aten._to_copy.default, aten.expand.default, aten.reshape.default):
        return args[0] if _alike(node, args[0]) else None
    if node.target is aten.t.default and args[0].target is aten.t.default:
        return args[0].args[0]  # type: ignore[no-any-return]
    if node.target is aten.transpose.int and args[0].target is aten.transpose.int:
        return args[0].args[0] if _same_axes(node, args[0]) else None
    return None


def _same_axes(first: fx.Node, second: fx.Node) -> bool:
    """Whether two transpositions swap the same two axes."""
    axes = [{axis % n.meta["val"].dim() for axis in n.args[1:]} for n in (first, second)]
    return axes[0] == axes[1]


def _alike(first: fx.Node, second: fx.Node, *, strides: bool = True) -> bool:
    a, b = first.meta["val"], second.meta["val"]
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        and (a.stride() == b.stride() or (not strides and _is_image(a) and _is_image(b)))
    )


def _is_image(value: Tensor) -> bool:
    """Whether a tensor lies in memory as images do, in one of their two layouts."""
    return value.dim() == 4 and (
        value.is_contiguous() or value.is_contiguous(memory_format=torch.channels_last)
    )


def relax_views(graph: fx.Graph) -> bool:
    """``view(x, shape) --> reshape(x, shape)``.

    The strides that fake tensors predict are not always those of the kernels (seen: a difference
    with a reduced tensor), and a view of other strides would fail; a reshape copies if it must.
    """
    changed = False
    for node in graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
            changed = True
    return changed


def plain_zeros(graph: fx.Graph) -> bool:
    """``_efficientzerotensor(...) --> zeros(...)``.

    Tangents of what has none are tensors without memory, which no op may write over.
    """
    changed = False
    for node in graph.find_nodes(op="call_function", target=aten._efficientzerotensor.default):
        node.target = aten.zeros.default
        value = node.meta["val"]
        with torch.no_grad(), value.fake_mode:
            node.meta["val"] = torch.zeros(value.shape, dtype=value.dtype, device=value.device)
        changed = True
    return changed


_ZERO_MAKERS = (
    aten.zeros.default,
    aten.zeros_like.default,
    aten.new_zeros.default,
    aten._efficientzerotensor.default,
)
_ZERO_PRODUCTS = (
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.mm.default,
    aten.bmm.default,
    aten.neg.default,
    aten.t.default,
    aten.reshape.default,
    aten.expand.default,
    aten.permute.default,
    aten.transpose.int,
)


def propagate_zeros(graph: fx.Graph) -> bool:
    """``x + 0 --> x`` and ``x * 0 --> 0`` for zeros that differentiation made.

    Such a zero is structural (no path leads there), so unlike a zero of the user's it stays zero
    against an infinite factor.
    """
    changed = False
    for node in list(graph.nodes):
        if node.op != "call_function" or node.meta["phase"] not in DERIVED:
            continue
        args: Any = node.args
        zeros = [arg for arg in args if isinstance(arg, fx.Node) and _is_zero(arg)]
        if not zeros:
            continue
        if node.target in (aten.add.Tensor, aten.sub.Tensor) and len(args) == 2:
            other = args[1] if args[0] is zeros[0] else args[0]
            subtracted = node.target is aten.sub.Tensor and args[0] is zeros[0]
            scaled = args[0] is zeros[0] and bool(node.kwargs)  # alpha belongs to args[1]
            plain = not subtracted and not scaled
            if isinstance(other, fx.Node) and plain and _alike(node, other, strides=False):
                node.replace_all_uses_with(other)
                graph.erase_node(node)
                changed = True
        elif _is_zero_product(node, zeros) and node.users:
            with graph.inserting_before(node):
                value = node.meta["val"]
                zero = graph.call_function(
                    aten.zeros.default,
                    (list(value.shape),),
                    {"dtype": value.dtype, "device": value.device},
                )
            zero.meta = dict(node.meta)
            node.replace_all_uses_with(zero)
            graph.erase_node(node)
            changed = True
    return changed


def _is_zero_product(node: fx.Node, zeros: list[fx.Node]) -> bool:
    if node.target is aten.convolution.default:
        images, weight, bias = node.args[:3]
        return (images in zeros or weight in zeros) and (bias is None or bias in zeros)
    return node.target in _ZERO_PRODUCTS


def _is_zero(node: fx.Node) -> bool:
    return node.target in _ZERO_MAKERS and node.meta.get("phase") in DERIVED


def forget_running_statistics(graph: fx.Graph) -> bool:
    """``batch_norm_backward(g, x, w, running, μ, r) --> batch_norm_backward(g, x, w, None, μ, r)``.

    In training mode it reads the statistics of the batch alone. An adjoint that computed the
    running ones for it normalised every batch once more.
    """
    changed = False
    for node in graph.find_nodes(
        op="call_function", target=aten.native_batch_norm_backward.default
    ):
        if node.args[7] is True and node.args[3:5] != (None, None):
            node.args = (*node.args[:3], None, None, *node.args[5:])
            changed = True
    return changed


def copy_once(graph: fx.Graph) -> None:
    """``reshape(clone(x), shape) --> reshape(x, shape)``, where reshaping copies `x` itself.

    Flattening images with channels innermost is a copy. Autograd writes it as two ops, the step as
    one, and only what both write alike can be handed from a step to its adjoint.
    """
    for node in graph.find_nodes(op="call_function", target=aten.reshape.default):
        args: Any = node.args
        clone, *shape = args
        if not isinstance(clone, fx.Node) or clone.target is not aten.clone.default:
            continue
        images: Any = clone.args[0]
        if clone.kwargs != {"memory_format": torch.contiguous_format}:
            continue
        value = images.meta["val"]
        with torch.no_grad(), value.fake_mode:
            reshaped = asked(aten.reshape.default, (value, *shape), {})
        if reshaped.untyped_storage()._cdata == value.untyped_storage()._cdata:
            continue
        node.args = (images, *shape)
        if not clone.users:
            graph.erase_node(clone)


def merge_common(graph: fx.Graph) -> bool:
    """Two equal ops on equal arguments --> one."""
    seen: dict[Any, fx.Node] = {}
    changed = False
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        key = _key(node)
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            changed = True
    return changed


def _key(node: fx.Node) -> Any:
    return (node.target, _described(node.args), _described(tuple(sorted(node.kwargs.items()))))


def _described(value: Any) -> Any:
    """A hashable stand-in; numbers of different types or signs of zero stay apart."""
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, tuple | list):
        return (type(value), *(_described(item) for item in value))
    return (type(value), repr(value))


def remove_dead(graph: fx.Graph) -> bool:
    """Ops whose results nobody reads are dropped; inputs stay."""
    changed = False
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
            changed = True
    return changed


#: The pipeline, in order.
PASSES: tuple[Pass, ...] = (
    relax_views,
    plain_zeros,
    remove_identities,
    propagate_zeros,
    forget_running_statistics,
    merge_common,
    share_scaled_products,
    keep_images,
    *FUSIONS,
    remove_dead,
)


def structural_zeros(step: StepGraph) -> tuple[bool, ...]:
    """For each output, whether it is zero by structure."""
    return tuple(node is None or _is_zero(_origin(node)) for node in step.results)


def _origin(node: fx.Node) -> fx.Node:
    while node.target is operator.getitem:
        node = node.args[0]  # type: ignore[assignment]
    return node
