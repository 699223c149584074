"""Functions of PyTorch that are captured as other ops, one row a function.

PyTorch has no second derivative for the kernels behind these functions, or they read values of
tensors, which one graph for all inputs cannot do. Where they are called, ops with the same value
and the same first derivative stand instead, which can be differentiated further.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unrollc.capture.alignments import ctc_loss
from unrollc.capture.packing import READING, Read
from unrollc.capture.source import SourceFinder
from unrollc.errors import CaptureError


def equivalent(func: Any, read: Read) -> Callable[..., Any] | None:
    """What stands for a function of PyTorch in a captured step; None for the function itself.

    Args:
        func: The function, as user code or a module calls it.
        read: Reads the entries of a tensor of integers that the data give.
    """
    reading = READING.get(func)
    return functools.partial(reading, read) if reading else _ROWS.get(func)


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """A class out of range is an error of ``scatter``."""
    if num_classes <= 0:
        return F.one_hot(tensor, num_classes)
    zeros = tensor.new_zeros((*tensor.shape, num_classes))
    return zeros.scatter(-1, tensor.unsqueeze(-1), 1)


def _embedding(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if kwargs.get("sparse", args[4] if len(args) > 4 else False):
        _refuse_sparse("embedding")
    return F.embedding(input, weight, *args, **kwargs)


def _refuse_sparse(name: str) -> None:
    raise CaptureError(
        f"{name}(sparse=True) asks for a sparse gradient",
        where=SourceFinder({}).here(),
        why="the inner gradient of a captured step is dense",
        remedy="pass sparse=False",
    )


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Rows of an embedding, summed, averaged or maximised within bags."""
    if sparse:
        _refuse_sparse("embedding_bag")
    if scale_grad_by_freq:
        raise CaptureError(
            "embedding_bag(scale_grad_by_freq=True) has no right gradient in PyTorch",
            where=SourceFinder({}).here(),
            why="on the CPU it divides a row's gradient by the frequency of another row (seen on "
            "torch 2.13)",
            remedy="use nn.Embedding(scale_grad_by_freq=True) and reduce its rows",
        )
    if mode not in ("sum", "mean", "max") or (per_sample_weights is not None and mode != "sum"):
        raise ValueError(f"embedding_bag: mode {mode!r} with these arguments is not defined")
    # Not F.embedding's own padding_idx: it only stops the gradient, here the row does not count.
    rows = F.embedding(input, weight, None, max_norm, norm_type)
    counted = torch.ones_like(input, dtype=torch.bool)
    if padding_idx is not None:
        counted = input != padding_idx % weight.shape[0]
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    if input.dim() == 1:
        assert offsets is not None
        bags = offsets.numel() - int(include_last_offset)
        places = torch.arange(input.numel(), device=input.device, dtype=offsets.dtype)
        bag = torch.searchsorted(offsets[:bags].contiguous(), places, right=True) - 1
        # One row of truth values a bag: which places are in it.
        inside = (bag == torch.arange(bags, device=bag.device)[:, None]) & counted
        rows = rows.expand(bags, *rows.shape)
    else:
        inside = counted
    return _reduced(rows, inside.unsqueeze(-1), mode)


def _reduced(rows: Tensor, inside: Tensor, mode: str) -> Tensor:
    """Rows ``[bags, places, columns]`` to ``[bags, columns]``; an empty bag is zero."""
    if mode == "max":
        empty = ~inside.any(1)
        lowest = torch.finfo(rows.dtype).min
        return rows.masked_fill(~inside, lowest).max(1).values.masked_fill(empty, 0)
    total = rows.masked_fill(~inside, 0).sum(1)
    return total / inside.sum(1).clamp(min=1) if mode == "mean" else total


def _rrelu(
    input: Tensor,
    lower: float = 1.0 / 8,
    upper: float = 1.0 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Tensor:
    slopes: Any = (lower + upper) / 2
    if training:
        slopes = torch.empty_like(input).uniform_(lower, upper)
    result = torch.where(input > 0, input, input * slopes)
    return input.copy_(result) if inplace else result


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    return _norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


def _pdist(input: Tensor, p: float = 2.0) -> Tensor:
    first, second = torch.triu_indices(input.shape[0], input.shape[0], 1, device=input.device)
    return _norm(input[first] - input[second], p)


def _norm(x: Tensor, p: float) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x, p, dim=-1)
    return norms


def _multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    scores, classes = torch.atleast_2d(input), torch.atleast_1d(target)
    chosen = classes.unsqueeze(-1)
    short = F.relu(margin - scores.gather(-1, chosen) + scores) ** p
    if weight is not None:
        short = short * weight[classes].unsqueeze(-1)
    loss = short.scatter(-1, chosen, 0.0).mean(-1)
    loss = loss if target.dim() else loss.squeeze(0)
    return _reduce(loss, size_average, reduce, reduction)


def _multilabel_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The labels of a row end at its first negative one."""
    scores, labels = torch.atleast_2d(input), torch.atleast_2d(target)
    valid = (labels >= 0).cumprod(-1).bool()
    labels = labels.where(valid, 0)
    places = torch.arange(scores.shape[-1], device=scores.device)
    is_label = ((labels.unsqueeze(-1) == places) & valid.unsqueeze(-1)).any(-2)
    gap = 1 - scores.gather(-1, labels).unsqueeze(-1) + scores.unsqueeze(-2)
    counts = valid.unsqueeze(-1) & ~is_label.unsqueeze(-2)
    loss = F.relu(gap).masked_fill(~counts, 0).sum((-1, -2)) / scores.shape[-1]
    loss = loss if input.dim() > 1 else loss.squeeze(0)
    return _reduce(loss, size_average, reduce, reduction)


def _gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """A negative variance, which PyTorch refuses after reading it, makes the loss NaN."""
    if not isinstance(var, Tensor):
        var = torch.full_like(input, var)
    shrunk = sum(x != y for x, y in zip(input.shape, var.shape, strict=False))
    if var.shape == input.shape[:-1]:
        var = var.unsqueeze(-1)
    elif var.dim() != input.dim() or (shrunk and (shrunk > 1 or 1 not in var.shape)):
        raise ValueError("var is of incorrect size")
    bounded = var.where(var >= 0, math.nan)
    with torch.no_grad():
        bounded.clamp_(min=eps)
    loss = 0.5 * (bounded.log() + (input - target) ** 2 / bounded)
    if full:
        loss = loss + 0.5 * math.log(2 * math.pi)
    return _reduce(loss, None, None, reduction)


def _reduce(loss: Tensor, size_average: bool | None, reduce: bool | None, reduction: str) -> Tensor:
    if size_average is not None or reduce is not None:
        averaged = "mean" if size_average is None or size_average else "sum"
        reduction = averaged if reduce is None or reduce else "none"
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


_ROWS: dict[Any, Callable[..., Any]] = {
    F.one_hot: _one_hot,  # looks for the largest class, also where the number of classes is given
    F.embedding: _embedding,  # a sparse gradient has no place in a graph
    F.embedding_bag: _embedding_bag,  # no second derivative
    F.rrelu: _rrelu,  # draws only where the input is negative
    torch.cdist: _cdist,  # no second derivative
    F.pdist: _pdist,  # no second derivative
    F.multi_margin_loss: _multi_margin_loss,  # no second derivative
    F.multilabel_margin_loss: _multilabel_margin_loss,  # no second derivative
    F.ctc_loss: ctc_loss,  # no second derivative; reads lengths
    F.gaussian_nll_loss: _gaussian_nll_loss,  # reads whether a variance is negative
}
