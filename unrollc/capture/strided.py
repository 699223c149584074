"""In-place writes into views, by ops whose derivative is right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unrollc.errors import CaptureError


def scatter_strided(
    x: Tensor, source: Tensor, size: Any, stride: Any, offset: int | None = None
) -> Tensor:
    """``as_strided_scatter`` by a flat ``scatter``.

    In-place writes into views end in this op, and PyTorch's derivative of it is wrong in both
    modes (seen on 2.13: the cotangents of target and source are exchanged).
    """
    if not x.is_contiguous():
        raise CaptureError(
            "an in-place write into a view of a tensor that is not contiguous",
            why="its derivative is not known to be right",
            remedy="write into a contiguous tensor, or use torch.where, torch.cat or scatter",
        )
    positions = torch.arange(x.numel(), device=x.device)
    chosen = positions.as_strided(size, stride, offset or 0)
    return x.reshape(-1).scatter(0, chosen.reshape(-1), source.reshape(-1)).reshape(x.shape)
