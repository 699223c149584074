"""Numeric checks of the premises on which mixed mode replaces Jᵀu by Ju.

J is the Jacobian of a gradient function G. Where G is the gradient of a scalar, J is a Hessian
and symmetric; for random u and v a J that is not symmetric fails ⟨u, Jv⟩ = ⟨v, Ju⟩ with
probability one. G may only look like a gradient: a masked row, a ``detach``, a hook.

:func:`asymmetry` asks whether the Jacobian itself is symmetric. :func:`mode_gap` asks what a
compiler needs: whether PyTorch's forward and reverse formulas give the same product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

GradientFunction = Callable[[Tensor], Tensor]
Product = Callable[[GradientFunction, Tensor, Tensor], Tensor]


def difference_product(gradient: GradientFunction, at: Tensor, v: Tensor) -> Tensor:
    """Jv by central differences with one extrapolation: the Jacobian as it is.

    The error is of order h⁴ + 1e-16 / h with h = 1e-3 of v's length: about 1e-12 relative.
    """

    def difference(h: float) -> Tensor:
        return (gradient(at + h * v) - gradient(at - h * v)) / (2 * h)

    h = 1e-3 / float(v.norm())
    return (4 * difference(h / 2) - difference(h)) / 3


def forward_product(gradient: GradientFunction, at: Tensor, v: Tensor) -> Tensor:
    """Jv as forward mode computes it."""
    return torch.func.jvp(gradient, (at,), (v,))[1]


def reverse_product(gradient: GradientFunction, at: Tensor, u: Tensor) -> Tensor:
    """Jᵀu as reverse mode computes it."""
    return torch.func.vjp(gradient, at)[1](u)[0]


def asymmetry(
    gradient: GradientFunction,
    at: Tensor,
    *,
    product: Product = difference_product,
    samples: int = 3,
    seed: int = 0,
) -> float:
    """The largest ``|⟨u, Jv⟩ - ⟨v, Ju⟩| / (|u| |Jv|)`` over random u and v, in float64.

    Zero up to the error of ``product`` if the Jacobian of ``gradient`` at ``at`` is symmetric.
    """
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for _ in range(samples):
        u = torch.randn(at.shape, generator=generator, dtype=at.dtype)
        v = torch.randn(at.shape, generator=generator, dtype=at.dtype)
        right, left = product(gradient, at, v), product(gradient, at, u)
        scale = (u.norm() * right.norm()).item()
        difference = ((u * right).sum() - (v * left).sum()).abs().item()
        worst = max(worst, difference / scale if scale else difference)
    return worst


def mode_gap(gradient: GradientFunction, at: Tensor, *, samples: int = 3, seed: int = 0) -> float:
    """The largest ``|Jw - Jᵀw| / |Jᵀw|`` over random w, Jw by forward, Jᵀw by reverse mode."""
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for _ in range(samples):
        w = torch.randn(at.shape, generator=generator, dtype=at.dtype)
        forward = forward_product(gradient, at, w)
        reverse = reverse_product(gradient, at, w)
        difference, scale = (forward - reverse).norm().item(), reverse.norm().item()
        worst = max(worst, difference / scale if scale else difference)
    return worst
