"""Values of the data that the shapes of a captured step depend on.

Lengths of sequences decide how a packed batch is laid out, so a step is captured for the lengths
that its batch has. They are read here alone, where an op cannot do without, and each reading is a
guard: batches of other lengths are captured anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from unrollc.capture.reading import Guard
from unrollc.capture.record import Recorder
from unrollc.errors import CaptureError


def read_values(recorder: Recorder, tensor: Tensor) -> list[int]:
    """The entries of a tensor of integers that follows from the data alone; guarded.

    Raises:
        CaptureError: If it depends on parameters or on state.
    """
    node = recorder.node_of(tensor)
    if node is None:  # the user's own, which is met where ops are recorded
        node = recorder.node_of(torch.ops.aten.alias.default(tensor))
        assert node is not None
    value = _value(recorder, node)
    source = recorder._line()
    if value is None:
        raise CaptureError(
            "lengths of sequences depend on parameters or on random numbers",
            where=source,
            why="the layout of a packed batch follows from them, and one graph has one layout",
            remedy="compute the lengths from the batch alone",
        )
    entries: list[int] = value.tolist()
    recorder.guards.append(Guard(node, entries, source, truth=True))
    return entries


def _value(recorder: Recorder, node: fx.Node) -> Tensor | None:
    """The value of a node, where it follows from data and constants."""
    known: dict[fx.Node, Any] = {
        **{placeholder: tensor for tensor, placeholder in recorder.lifted},
        **recorder.readable,
        **recorder.concrete,
    }
    needed, stack = set(), [node]
    while stack:
        current = stack.pop()
        if current not in needed and current not in known:
            needed.add(current)
            stack.extend(current.all_input_nodes)
    if any(each.op == "placeholder" for each in needed):
        return None
    with torch._C._DisableTorchDispatch(), torch.no_grad():
        for each in [n for n in recorder.graph.nodes if n in needed]:
            args, kwargs = fx.map_arg((each.args, each.kwargs), known.__getitem__)
            known[each] = each.target(*args, **kwargs)
    found: Tensor = known[node]
    return found
