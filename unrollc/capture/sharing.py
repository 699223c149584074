"""Parameters and optimizer state that lie in one memory.

The inner loop carries each as a tensor of its own, so what writes to one through another is lost
from the second step on.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

Span = tuple[int, int, int]


def sharing(tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The labels of two tensors that overlap in memory, or None.

    Parts of one storage that lie apart do not; interleaved ones count as overlapping.
    """
    strided = {k: t for k, t in tensors.items() if t.layout is torch.strided and t.numel()}
    spans = sorted((*_span(tensor), label) for label, tensor in strided.items())
    for (memory, _, end, first), (other, begin, _, second) in itertools.pairwise(spans):
        if memory == other and begin < end:
            return first, second
    return None


def _span(tensor: Tensor) -> Span:
    """Storage, first byte and end of a tensor, traced or not."""
    inner = tensor.elem if isinstance(tensor, FunctionalTensor) else tensor
    reach = sum((n - 1) * step for n, step in zip(inner.shape, inner.stride(), strict=True))
    begin = int(inner.storage_offset())
    size = inner.element_size()
    return inner.untyped_storage()._cdata, begin * size, (begin + int(reach) + 1) * size
