"""The derivative of batch normalisation's backward pass, in few passes over the activations.

With x̂ = (x - μ) r over the N elements of each channel, the backward pass takes the cotangent g of
the result to

    dx = γ r P(g),   dγ = Σ g x̂,   dβ = Σ g,     P(g) = g - mean(g) - x̂ mean(g x̂).

P is symmetric, so the cotangents u, v, w of dx, dγ, dβ go back through the same backward pass, now
of u. With s = Σ u P(g), which needs the product of u and g besides what backward passes return:

    g:  γ r P(u) + v x̂ + w
    γ:  r s
    x:  a γ r P(u) + b P(g) - (γ r² s / N) x̂,   a = -(r / N) dγ,   b = v r - (γ r² / N) Σ u x̂.

PyTorch's formula has the same value and makes over 40 passes, most of them into fresh memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

aten = torch.ops.aten

_backward = aten.native_batch_norm_backward.default


def backward(grad: Tensor, x: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    """``native_batch_norm_backward`` with the derivative above, in training mode.

    Args:
        grad: g.
        x: What is normalised, [n, channels, ...].
        weight: γ, [channels].
        rest: The op's other operands: running statistics, μ and r of the batch, whether it is
            in training mode, ε, which results are wanted.

    Returns:
        dx, dγ and dβ, None for what is not wanted.
    """
    mean, rstd, training, eps, mask = rest[2:]
    own = (weight, mean, rstd)
    if not training or not all(each is not None and each.dtype == x.dtype for each in own):
        return _backward(grad, x, weight, *rest)  # type: ignore[no-any-return]
    apply: Callable[..., Any] = _Backward.apply
    found = apply(grad, x, weight, mean, rstd, eps)
    return tuple(each if wanted else None for each, wanted in zip(found, mask, strict=True))


class _Backward(Function):
    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        every = [True, True, True]
        dx, along, total = _backward(grad, x, weight, None, None, mean, rstd, True, eps, every)
        ctx.save_for_backward(grad, x, weight, mean, rstd, along, total)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return dx, along, total

    @staticmethod
    def backward(
        ctx: Any, u: Tensor | None, v: Tensor | None, w: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        pulled = _Pulled(ctx.saved_tensors, ctx.eps, u)
        wanted = ctx.needs_input_grad
        return (
            pulled.to_grad(v, w) if wanted[0] else None,
            pulled.to_x(v) if wanted[1] else None,
            pulled.to_weight() if wanted[2] else None,
            *(None, None, None),
        )


class _Pulled:
    """The cotangents of g, x and γ; rows have a value a channel."""

    def __init__(self, saved: tuple[Tensor, ...], eps: float, u: Tensor | None) -> None:
        self.grad, self.x, self.weight, self.mean, self.rstd, self.along, self.total = saved
        self.count = math.prod(self.x.shape) // self.x.shape[1]
        self.u_pulled = self.u_along = self.product = None
        if u is None:
            return
        statistics = (None, None, self.mean, self.rstd, True, eps)
        every = [True, True, True]
        self.u_pulled, self.u_along, _ = _backward(u, self.x, self.weight, *statistics, every)
        # The gradient of a normalisation's weight is a sum of products: here Σ u (g - mean(g)).
        centre = (None, None, self.total / self.count, torch.ones_like(self.rstd), True, eps)
        self.product = _backward(u, self.grad, None, *centre, [False, True, False])[1]
        self.product = self.product - self.u_along * self.along / self.count

    def to_grad(self, v: Tensor | None, w: Tensor | None) -> Tensor | None:
        offset, found = w, self.u_pulled
        if v is not None:
            slope = v * self.rstd
            shift = -slope * self.mean if w is None else w - slope * self.mean
            scaled = torch.addcmul(self._row(shift), self.x, self._row(slope))
            return scaled if found is None else found + scaled
        if offset is None:
            return found
        row = self._row(offset)
        return row.expand_as(self.x) if found is None else found + row

    def to_x(self, v: Tensor | None) -> Tensor | None:
        if self.u_pulled is None and v is None:
            return None
        slope = None if v is None else v * self.rstd
        if self.u_pulled is None:
            assert slope is not None
            return self._combined(slope, -slope * self.along / self.count)
        assert self.u_along is not None and self.product is not None
        scale = self.weight * self.rstd.square() / self.count
        least = -scale * self.u_along
        slope = least if slope is None else slope + least
        bend = -slope * self.along / self.count - scale * self.product
        found = self._combined(slope, bend)
        return torch.addcmul(found, self.u_pulled, self._row(-self.rstd * self.along / self.count))

    def to_weight(self) -> Tensor | None:
        return None if self.product is None else self.rstd * self.product

    def _combined(self, slope: Tensor, bend: Tensor) -> Tensor:
        """``slope (g - mean(g)) + bend x̂``."""
        steep = bend * self.rstd
        shift = -slope * self.total / self.count - steep * self.mean
        found = torch.addcmul(self._row(shift), self.grad, self._row(slope))
        return torch.addcmul(found, self.x, self._row(steep))

    def _row(self, values: Tensor) -> Tensor:
        return values.reshape(-1, *[1] * (self.x.dim() - 2))
