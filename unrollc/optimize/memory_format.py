"""Layout of images: ``convolution(x) --> convolution(x in channels_last)``.

On a CPU, pooling, normalisation and the elementwise ops around them work on neighbouring channels
at once where these lie side by side; convolutions hand the layout of their input on. So images are
converted where they come in, and everything that is computed from them follows. An op may depend on
strides (``as_strided``, a view as another dtype), or its derivative may, so nothing is converted
unless all that reads the other layout is known.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from unrollc.capture.faking import asked
from unrollc.step import Phase, Role, StepGraph, build, copy, tensors_of

aten = torch.ops.aten

#: Ops whose results and derivatives are the same numbers in any layout of their operands.
ANY_LAYOUT = frozenset(
    {
        operator.getitem,
        aten._native_batch_norm_legit.no_stats,
        aten._native_batch_norm_legit_functional.default,
        aten.add.Tensor,
        aten.avg_pool2d.default,
        aten.avg_pool2d_backward.default,
        aten.cat.default,
        aten.clone.default,
        aten.convolution.default,
        aten.convolution_backward.default,
        aten.gelu.default,
        aten.gelu_backward.default,
        aten.max_pool2d_with_indices.default,
        aten.max_pool2d_with_indices_backward.default,
        aten.mul.Tensor,
        aten.native_batch_norm_backward.default,
        aten.relu.default,
        aten.reshape.default,
        aten.sigmoid.default,
        aten.sigmoid_backward.default,
        aten.silu.default,
        aten.silu_backward.default,
        aten.slice.Tensor,
        aten.sum.dim_IntList,
        aten.tanh.default,
        aten.tanh_backward.default,
        aten.threshold_backward.default,
    }
)


def channels_last(graph: StepGraph) -> StepGraph:
    """``convolution(batch) --> convolution(clone(batch, channels_last))``, on CPUs.

    The values stay as they are, their strides change; views that other strides do not allow become
    reshapes. The graph is returned as it is if an op that is not in `ANY_LAYOUT` would read them.
    """
    images = [
        node
        for value, node in graph.inputs_with(Role.BATCH)
        if any(_is_plain_convolution(user, node) for user in node.users)
    ]
    if not images:
        return graph
    new = copy(graph)
    names = {node.name: node for node in new.placeholders}
    last = new.placeholders[-1]
    for image in images:
        old = names[image.name]
        with new.graph.inserting_after(last):
            turned = new.graph.call_function(
                aten.clone.default, (old,), {"memory_format": torch.channels_last}
            )
        old.replace_all_uses_with(turned)
        turned.args = (old,)
        turned.meta = {"phase": Phase.FORWARD, "source": None}
    propagate(new)
    if any(node.target not in ANY_LAYOUT for node in _readers_of_other_strides(graph, new)):
        return graph
    return build(new.graph, new.inputs, new.outputs, new.constants)


def _readers_of_other_strides(before: StepGraph, after: StepGraph) -> list[fx.Node]:
    """The ops that read, or whose results are, values with other strides than before."""
    old = {node.name: _strides(node) for node in before.graph.nodes}
    moved = {
        node
        for node in after.graph.nodes
        if node.op == "call_function" and _strides(node) != old.get(node.name)
    }
    readers = [node for node in after.graph.nodes if moved & {node, *node.all_input_nodes}]
    return [node for node in readers if node.op == "call_function"]


def _strides(node: fx.Node) -> list[tuple[int, ...]]:
    return [tensor.stride() for tensor in tensors_of(node)]


def keep_images(graph: fx.Graph) -> bool:
    """``reshape(gather(...)) --> clone(reshape(gather(...)), channels_last)``.

    The derivative of pooling gathers by positions in an image, row by row; what comes out of it
    goes back to the layout of the rest.
    """
    if not follows_images(graph):
        return False
    changed = False
    for node in graph.find_nodes(op="call_function", target=aten.reshape.default):
        source, value = node.args[0], node.meta["val"]
        done = all(user.target is aten.clone.default for user in node.users)
        if source.target is not aten.gather.default or value.dim() != 4 or done:
            continue
        with graph.inserting_after(node):
            turned = graph.call_function(
                aten.clone.default, (node,), {"memory_format": torch.channels_last}
            )
        node.replace_all_uses_with(turned)
        turned.args = (node,)
        turned.meta = {key: node.meta[key] for key in ("phase", "source")}
        with torch.no_grad(), value.fake_mode:
            turned.meta["val"] = value.clone(memory_format=torch.channels_last)
        changed = True
    return changed


def follows_images(graph: fx.Graph) -> bool:
    """Whether a graph has images in channels_last."""
    return any(
        node.kwargs.get("memory_format") is torch.channels_last
        for node in graph.find_nodes(op="call_function", target=aten.clone.default)
    )


def _is_plain_convolution(node: fx.Node, image: fx.Node) -> bool:
    """Whether a node convolves `image` over two axes in one group, on a CPU in float32.

    For float64 PyTorch has convolutions of its own, in the default layout.
    """
    if node.target is not aten.convolution.default or node.args[0] is not image:
        return False
    value: Tensor = image.meta["val"]
    groups: Any = node.args[8]
    fast = value.device.type == "cpu" and value.dtype is torch.float32
    return value.dim() == 4 and fast and groups == 1


def propagate(graph: StepGraph) -> None:
    """Give every value the strides that follow from those of the inputs."""
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
        values, named = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        if node.target is operator.getitem:
            node.meta["val"] = values[0][values[1]]
            continue
        mode = graph.placeholders[0].meta["val"].fake_mode
        with torch.no_grad(), mode:
            node.meta["val"] = asked(node.target, values, named)
