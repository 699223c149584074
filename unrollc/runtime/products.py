"""Matrix products by whichever of PyTorch's two libraries is faster on this processor.

PyTorch multiplies matrices of float32 with MKL, which takes kernels for AVX2 on processors that are
not Intel's, whatever they could do. oneDNN, which PyTorch uses for convolutions, goes by the
instructions that there are. On a processor of AMD's with AVX-512 it takes 0.42 to 0.7 of the time,
from matrices of 64 x 784 x 128 to 1024 x 1024 x 1024. Both compute in float32, and differ by
rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

#: Multiplications from which the call is worth its price, some microseconds.
_FEWEST = 2_000_000

#: Columns of the result from which it pays to copy a left matrix that lies column by column.
_COLUMNS = 128


def faster_products() -> dict[str, Callable[..., Tensor]]:
    """What takes the place of products in generated programs, by the names that they have there.

    It is empty where MKL is the faster library.
    """
    return {"op_mm": _mm, "op_addmm": _addmm} if _is_onednn_faster() else {}


@functools.cache
def _is_onednn_faster() -> bool:
    if not torch.backends.mkl.is_available() or not torch.backends.mkldnn.is_available():
        return False
    return "AVX512" in torch.backends.cpu.get_cpu_capability() and _vendor() == "AuthenticAMD"


def _vendor() -> str:
    """Of the processor, where Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((s.partition(":")[2].strip() for s in lines if s.startswith("vendor_id")), "")


def _mm(left: Tensor, right: Tensor) -> Tensor:
    if not _suits(left, right):
        return aten.mm.default(left, right)  # type: ignore[no-any-return]
    return _linear()(left, right.t(), None, "none", [], "")  # type: ignore[no-any-return]


def _addmm(addend: Tensor, left: Tensor, right: Tensor, **scales: Any) -> Tensor:
    if scales or not _suits(left, right) or addend.dtype is not torch.float32:
        return aten.addmm.default(addend, left, right, **scales)  # type: ignore[no-any-return]
    columns = right.t()
    if addend.shape == columns.shape[:1] and addend.stride(0) == 1:  # oneDNN reads no strides
        return _linear()(left, columns, addend, "none", [], "")  # type: ignore[no-any-return]
    if addend.shape == (left.shape[0], columns.shape[0]):
        binary = torch.ops.mkldnn._linear_pointwise.binary
        return binary(left, addend, columns, None, "add")  # type: ignore[no-any-return]
    return aten.addmm.default(addend, left, right)  # type: ignore[no-any-return]


def _linear() -> Any:
    return torch.ops.mkldnn._linear_pointwise.default


def _suits(left: Tensor, right: Tensor) -> bool:
    """Whether oneDNN multiplies two matrices, and faster; errors are aten's to raise."""
    if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0]:
        return False
    rows, inner = left.shape
    columns = right.shape[1]
    return (
        rows * inner * columns >= _FEWEST
        and left.dtype is torch.float32
        and left.device.type == "cpu"
        and (left.stride(1) == 1 or columns >= _COLUMNS)
        and _is_stored_plainly(left)
        and _is_stored_plainly(right)
    )


def _is_stored_plainly(matrix: Tensor) -> bool:
    """Whether its rows, or its columns, lie in memory one behind the other."""
    (rows, columns), (down, right) = matrix.shape, matrix.stride()
    return (right == 1 and down >= columns) or (down == 1 and right >= rows)
