"""Packed sequences: PyTorch's kernels read lengths, which are read at capture here (`values`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import _VF, Tensor
from torch._C import DispatchKey
from torch.nn import functional as F

aten = torch.ops.aten

#: Reads the entries of a tensor of integers.
Read = Callable[[Tensor], list[int]]


def pack(read: Read, input: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """``torch._VF._pack_padded_sequence``: the steps of sorted sequences one behind the other."""
    sizes = read(lengths)
    steps = input.transpose(0, 1) if batch_first else input
    if len(sizes) != steps.shape[1] or max(sizes) > steps.shape[0]:
        raise ValueError(f"lengths {sizes} do not fit an input of shape {list(input.shape)}")
    if min(sizes) < 1 or sizes != sorted(sizes, reverse=True):
        raise ValueError(f"lengths {sizes} must be positive and fall (or enforce_sorted=False)")
    running = [sum(size > time for size in sizes) for time in range(sizes[0])]
    data = torch.cat([steps[time, :count] for time, count in enumerate(running)])
    return data, torch.tensor(running)


def pad(
    read: Read,
    data: Tensor,
    batch_sizes: Tensor,
    batch_first: bool,
    padding_value: float,
    total_length: int,
) -> tuple[Tensor, Tensor]:
    """``torch._VF._pad_packed_sequence``: the inverse of `pack`."""
    running = read(batch_sizes)
    blank = (0, 0) * (data.dim() - 1)
    steps = [
        F.pad(part, (*blank, 0, running[0] - count), value=padding_value)
        for part, count in zip(data.split(running), running, strict=True)
    ]
    missing = max(total_length, len(running)) - len(running)
    steps += [torch.full_like(steps[0], padding_value)] * missing
    lengths = [sum(count > place for count in running) for place in range(running[0])]
    return torch.stack(steps, int(batch_first)), torch.tensor(lengths)


def _recurrent(function: Any, op: Any) -> Callable[..., Any]:
    """A recurrent layer; on packed data PyTorch's own decomposition, which takes known sizes."""
    decomposed = op.py_kernels[DispatchKey.CompositeImplicitAutograd]

    def run(read: Read, *args: Any) -> Any:
        packed = isinstance(args[3], tuple | list)  # the weights, behind data, sizes and state
        return decomposed(args[0], read(args[1]), *args[2:]) if packed else function(*args)

    return run


#: Functions that read lengths, as functions of a `Read` and their own arguments.
READING: dict[Any, Callable[..., Any]] = {
    _VF._pack_padded_sequence: pack,
    _VF._pad_packed_sequence: pad,
    _VF.lstm: _recurrent(_VF.lstm, aten.lstm.data),
    _VF.gru: _recurrent(_VF.gru, aten.gru.data),
    _VF.rnn_tanh: _recurrent(_VF.rnn_tanh, aten.rnn_tanh.data),
    _VF.rnn_relu: _recurrent(_VF.rnn_relu, aten.rnn_relu.data),
}
