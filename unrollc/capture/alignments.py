"""Connectionist temporal classification by ops that can be differentiated (Graves et al. 2006).

The forward variables α of Graves' equations (6) to (8) run over the labels with blanks between
them. Lengths stay tensors: positions behind a sequence's end are computed and not read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """``F.ctc_loss``, its first derivative entry for entry that of PyTorch.

    PyTorch's gradient in `log_probs` presumes that they come out of ``log_softmax``: it has the
    term exp(log_probs) in addition, which ``log_softmax`` takes out again. So has this one.
    """
    batched = log_probs.dim() == 3
    scores = log_probs if batched else log_probs.unsqueeze(1)
    steps, count, _ = scores.shape
    times = _lengths(input_lengths, count, scores)
    sizes = _lengths(target_lengths, count, scores)
    labels = _padded(targets, sizes, target_lengths, count, blank)
    loss = _negative_log_likelihood(scores, labels, times, sizes, blank)
    running = torch.arange(steps, device=scores.device)[:, None] < times
    presumed = scores.exp().sum(-1).masked_fill(~running, 0).sum(0)
    loss = (
        loss
        + presumed.masked_fill(loss.isinf(), 0)
        - presumed.detach().masked_fill(loss.isinf(), 0)
    )
    if zero_infinity:
        loss = loss.masked_fill(loss.isinf(), 0)
    if reduction == "mean":
        return (loss / sizes.clamp(min=1)).mean()
    if reduction == "sum":
        return loss.sum()
    if reduction != "none":
        raise ValueError(f"{reduction} is not a valid value for reduction")
    return loss if batched else loss.squeeze(0)


def _lengths(given: Any, count: int, like: Tensor) -> Tensor:
    lengths = torch.as_tensor(given, device=like.device)
    return lengths.reshape(-1).expand(count)


def _padded(targets: Tensor, sizes: Tensor, given: Any, count: int, blank: int) -> Tensor:
    """Labels ``[N, S]``, blank behind a target's end."""
    if targets.dim() == 1 and count > 1:  # concatenated
        longest = targets.numel() if isinstance(given, Tensor) else max(given, default=0)
        places = torch.arange(longest, device=targets.device)
        index = (sizes.cumsum(0) - sizes).unsqueeze(-1) + places
        targets = targets[index.clamp(max=max(targets.numel() - 1, 0))]
    else:
        targets = torch.atleast_2d(targets)
        places = torch.arange(targets.shape[-1], device=targets.device)
    return targets.long().where(places < sizes.unsqueeze(-1), blank)


def _negative_log_likelihood(
    scores: Tensor, labels: Tensor, times: Tensor, sizes: Tensor, blank: int
) -> Tensor:
    """-log p(labels), one a sequence; infinite where no alignment exists."""
    # Not -inf, whose differences are NaN in derivatives: a number that no likelihood comes near.
    never = torch.finfo(scores.dtype).min / 4
    count, longest = labels.shape
    extended = torch.full((count, 2 * longest + 1), blank, dtype=torch.long, device=labels.device)
    extended = extended.slice_scatter(labels, 1, 1, 2 * longest, 2) if longest else extended
    emitted = scores.gather(-1, extended.expand(scores.shape[0], -1, -1))
    before = F.pad(extended, (2, 0), value=blank)[:, :-2]
    leaping = (extended != blank) & (extended != before)
    alpha = emitted[0].masked_fill(torch.arange(2 * longest + 1, device=labels.device) > 1, never)
    for time in range(1, scores.shape[0]):
        entering = F.pad(alpha, (1, 0), value=never)[:, :-1]
        skipping = F.pad(alpha, (2, 0), value=never)[:, :-2].masked_fill(~leaping, never)
        moved = torch.stack([alpha, entering, skipping]).logsumexp(0).clamp(min=never)
        alpha = torch.where((time < times).unsqueeze(-1), moved + emitted[time], alpha)
    last = (2 * sizes).unsqueeze(-1)
    on_blank = alpha.gather(-1, last)
    on_label = alpha.gather(-1, (last - 1).clamp(min=0)).masked_fill(last == 0, never)
    # Not logaddexp, whose second derivative at such a distance is infinite over infinite.
    found = torch.cat([on_blank, on_label], -1).logsumexp(-1)
    return (-found).masked_fill(found < never / 2, torch.inf)
