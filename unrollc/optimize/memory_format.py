"""Layout of images: ``convolution(x) --> convolution(x in channels_last)``.

On a CPU, pooling, normalisation and the elementwise ops around them work on neighbouring channels
at once where these lie side by side; convolutions hand the layout of their input on. So images are
converted where they come in, and everything that is computed from them follows.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from unrollc.step import Phase, Role, StepGraph, build, copy

aten = torch.ops.aten


def channels_last(graph: StepGraph) -> StepGraph:
    """``convolution(batch) --> convolution(clone(batch, channels_last))``, on CPUs.

    The values stay as they are, their strides change; views that other strides do not allow become
    reshapes.
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
    return build(new.graph, new.inputs, new.outputs, new.constants)


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
            node.meta["val"] = node.target(*values, **named)
