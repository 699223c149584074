"""Scratch memory: what an op's kernel holds beside its results while it runs.

Most kernels write their results and nothing else. Those of this table do not: each row says how
many bytes the CPU kernels of PyTorch 2.13 hold at once beyond the op's results, from its fake
inputs. The rows are measurements with their explanation, and a test repeats the measurement.
Amounts that depend on no size (scalars that become tensors, a few kilobytes of oneDNN's own) are
left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

Rule = Callable[..., int]


@dataclass(frozen=True)
class Row:
    """What an op's kernel takes.

    Attributes:
        count: Scratch bytes from the op's arguments, with fake tensors for tensors.
        reason: What the bytes are.
    """

    count: Rule
    reason: str


def scratch_of(node: fx.Node) -> int:
    """Scratch bytes of one call; 0 for an op without a row, and on devices but the CPU."""
    target: Any = node.target
    row = ROWS.get(target)
    if row is None:
        return 0
    values: Any = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    args, kwargs = values
    if args[0].device.type != "cpu":
        return 0
    return max(row.count(*args, **kwargs), 0)


def _block() -> int:
    """Channels of a block: the width of a vector register in float32."""
    return 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8


def _padded(channels: int) -> int:
    return math.ceil(channels / _block()) * _block()


def _blocked(images: Tensor, *, plain: bool = False) -> int:
    """Bytes of images [n, c, …] in oneDNN's blocks of channels; 0 if they are read as they are.

    Args:
        images: The tensor in the default layout.
        plain: Whether the kernel takes fewer channels than a block in the default layout.
    """
    channels = images.shape[1]
    if _last(images) or (plain and channels < _block()):
        return 0
    return images.numel() // channels * _padded(channels) * images.element_size()


def _blocked_weight(weight: Tensor, *, plain: bool) -> int:
    inner = weight.shape[1] if plain else _padded(weight.shape[1])
    kernel = math.prod(weight.shape[2:])
    return _padded(weight.shape[0]) * inner * kernel * weight.element_size()


def _last(images: Tensor) -> bool:
    """Whether the channels are the innermost dimension in memory; of one, its stride says so."""
    if images.dim() != 4:
        return False
    if images.is_contiguous():
        return images.shape[1] == 1 and images.stride(1) == 1 and images[0].numel() > 1
    return images.is_contiguous(memory_format=torch.channels_last)


def _dense(*tensors: Tensor) -> int:
    """Bytes of the copies of those that lie in neither layout, which the call holds throughout."""
    return sum(_bytes(t) for t in tensors if not (t.is_contiguous() or _last(t)))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _output(images: Tensor, weight: Tensor, geometry: tuple[Any, ...]) -> Tensor:
    """A convolution's result, on fake tensors."""
    stride, padding, dilation, transposed, extra, groups = geometry
    rest = stride, padding, dilation, transposed, extra, groups
    out: Tensor = aten.convolution.default(images, weight, None, *rest)
    return out


def _convolution(images: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> int:
    out = _output(images, weight, geometry)
    if images.dtype != torch.float32:
        return _columns(weight, out, geometry)
    plain = images.shape[1] < _block() and not geometry[3]  # a transposed one is a backward pass
    copied = _blocked_weight(weight, plain=plain)
    if _last(images):
        return copied
    inner = _blocked(images, plain=plain) + copied + _blocked(out)
    return max(inner - _bytes(out), _blocked(out)) + _dense(images, weight)


def _convolution_backward(
    cotangent: Tensor,
    images: Tensor,
    weight: Tensor,
    bias_sizes: Any,
    *rest: Any,
) -> int:
    *geometry, wanted = rest
    if images.dtype != torch.float32:
        return _columns(weight, cotangent, tuple(geometry)) if wanted[1] else 0
    if _last(images):
        return _blocked_weight(weight, plain=False)
    results = [_bytes(images) * bool(wanted[0]), _bytes(weight) * bool(wanted[1])]
    peaks = [0]
    source, copied = _blocked(images), _blocked(cotangent)
    if wanted[0]:  # the images' cotangent is made first
        inner = copied + _blocked_weight(weight, plain=False) + source
        peaks.append(max(inner, source + results[0]))
    if wanted[1]:
        read = copied + _blocked(images, plain=True)
        made = _blocked_weight(weight, plain=images.shape[1] < _block())
        peaks.append(results[0] + max(read + made, made + results[1]))
    return max(peaks) - sum(results) + _dense(cotangent, images, weight)


def _columns(weight: Tensor, out: Tensor, geometry: tuple[Any, ...]) -> int:
    """Without oneDNN the patches of all images are written out, for a product with the weight."""
    patches = out.shape[0] * math.prod(out.shape[2:])
    pointwise = all(k == 1 for k in weight.shape[2:])
    if pointwise and all(s == 1 for s in geometry[0]) and not any(geometry[1]):
        return 0
    return patches * math.prod(weight.shape[1:]) * weight.element_size()


def _batch_norm_backward(cotangent: Tensor, images: Tensor, *rest: Any) -> int:
    return 0 if _last(images) else _bytes(images)


def _safe_softmax(scores: Tensor, *rest: Any, **kwargs: Any) -> int:
    return scores.numel() + scores.numel() // max(scores.shape[-1], 1)


ROWS: dict[Any, Row] = {
    aten.convolution.default: Row(
        _convolution,
        "oneDNN copies images, weight and result into blocks of channels and the result back; "
        "in other dtypes the patches are written out",
    ),
    aten.convolution_backward.default: Row(
        _convolution_backward, "the same copies, for the images' cotangent and then the weight's"
    ),
    aten.native_batch_norm_backward.default: Row(
        _batch_norm_backward, "the centred images, where channels are not innermost"
    ),
    aten._safe_softmax.default: Row(
        _safe_softmax, "one flag an element and one a row: which scores are -inf"
    ),
}
