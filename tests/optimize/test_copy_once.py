"""Flattening images is written in one way, so that a step can hand it to its adjoint."""

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from unrollc.optimize.simplify import copy_once

aten = torch.ops.aten


def flattened(memory_format: torch.memory_format, kept: bool) -> tuple[fx.Graph, list[str]]:
    """``reshape(clone(x), [2, 48])``, x with this memory format; the clone may be read again."""
    graph = fx.Graph()
    with FakeTensorMode():
        x = graph.placeholder("x")
        x.meta["val"] = torch.empty(2, 3, 4, 4).to(memory_format=memory_format)
        row_major = {"memory_format": torch.contiguous_format}
        clone = graph.call_function(aten.clone.default, (x,), row_major)
        clone.meta["val"] = x.meta["val"].clone(**row_major)
        flat = graph.call_function(aten.reshape.default, (clone, [2, 48]))
        flat.meta["val"] = clone.meta["val"].reshape(2, 48)
    graph.output((flat, clone) if kept else (flat,))
    before = _computed(graph, memory_format)
    copy_once(graph)
    assert all(map(torch.equal, before, _computed(graph, memory_format)))
    return graph, [node.name for node in graph.nodes if node.op == "call_function"]


def _computed(graph: fx.Graph, memory_format: torch.memory_format) -> tuple[torch.Tensor, ...]:
    x = torch.arange(96.0).reshape(2, 3, 4, 4).to(memory_format=memory_format)
    return fx.GraphModule({}, graph)(x)  # type: ignore[no-any-return]


def test_a_copy_before_a_copy_goes() -> None:
    assert flattened(torch.channels_last, kept=False)[1] == ["reshape_default"]


@pytest.mark.parametrize(
    ("memory_format", "kept"), [(torch.contiguous_format, False), (torch.channels_last, True)]
)
def test_what_is_a_view_without_it_or_read_elsewhere_stays(
    memory_format: torch.memory_format, kept: bool
) -> None:
    assert len(flattened(memory_format, kept)[1]) == 2
