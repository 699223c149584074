"""Random ops become inputs: one row a distribution.

Each row maps a random ATen op to a `Noise` whose parameters are plain numbers, and a function
that turns the drawn tensor into the op's result. What is drawn never depends on data: a
Bernoulli variable with a tensor of probabilities is a uniform one compared with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unrollc.step import Noise

aten = torch.ops.aten

_Finish = Callable[[Tensor], Any]


def as_noise(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: Any
) -> tuple[Noise, _Finish] | None:
    """The noise behind a random op, or None where no row covers it.

    Args:
        func: The ATen op.
        args, kwargs: What it was called with.
        like: Its (fake) result.
    """
    row = _ROWS.get(func)
    return row(args, kwargs, like) if row is not None else None


def _noise(distribution: str, like: Tensor, *parameters: float) -> Noise:
    return Noise(distribution, parameters, tuple(like.shape), like.dtype, like.device)


def _number(
    args: tuple[Any, ...], kwargs: dict[str, Any], index: int, name: str, default: Any
) -> Any:
    return args[index] if len(args) > index else kwargs.get(name, default)


def _plain(distribution: str, *parameters: float) -> Callable[..., tuple[Noise, _Finish]]:
    def row(args: Any, kwargs: Any, like: Tensor) -> tuple[Noise, _Finish]:
        return _noise(distribution, like, *parameters), lambda drawn: drawn

    return row


def _two_numbers(distribution: str, first: str, second: str, low: float, high: float) -> Any:
    def row(args: Any, kwargs: Any, like: Tensor) -> tuple[Noise, _Finish]:
        parameters = (_number(args, kwargs, 1, first, low), _number(args, kwargs, 2, second, high))
        return _noise(distribution, like, *parameters), lambda drawn: drawn

    return row


def _bernoulli(args: Any, kwargs: Any, like: Tensor) -> tuple[Noise, _Finish]:
    return _noise("bernoulli", like, float(_number(args, kwargs, 1, "p", 0.5))), lambda drawn: drawn


def _bernoulli_tensor(args: Any, kwargs: Any, like: Tensor) -> tuple[Noise, _Finish]:
    probability = args[0] if len(args) == 1 else args[1]
    return _noise("uniform", like, 0.0, 1.0), lambda drawn: (drawn < probability).to(like.dtype)


def _native_dropout(args: Any, kwargs: Any, like: Any) -> tuple[Noise, _Finish]:
    x, p = args[0], float(args[1])

    def finish(drawn: Tensor) -> tuple[Tensor, Tensor]:
        return x * drawn * (1.0 / (1.0 - p) if p < 1.0 else 0.0), drawn.to(torch.bool)

    return _noise("bernoulli", like[0], 1.0 - p), finish


def _normal_around(args: Any, kwargs: Any, like: Tensor) -> tuple[Noise, _Finish]:
    mean, deviation = args[0], _number(args, kwargs, 1, "std", 1.0)
    return _noise("normal", like, 0.0, 1.0), lambda drawn: drawn * deviation + mean


def _randint(args: Any, kwargs: Any, like: Tensor) -> tuple[Noise, _Finish]:
    return _noise("randint", like, 0, args[0]), lambda drawn: drawn


def _randint_low(args: Any, kwargs: Any, like: Tensor) -> tuple[Noise, _Finish]:
    return _noise("randint", like, args[0], args[1]), lambda drawn: drawn


def _randint_like(args: Any, kwargs: Any, like: Tensor) -> tuple[Noise, _Finish]:
    return _noise("randint", like, 0, args[1]), lambda drawn: drawn


def _randint_like_low(args: Any, kwargs: Any, like: Tensor) -> tuple[Noise, _Finish]:
    return _noise("randint", like, args[1], args[2]), lambda drawn: drawn


_ROWS: dict[Any, Callable[..., tuple[Noise, _Finish]]] = {
    aten.rand.default: _plain("uniform", 0.0, 1.0),
    aten.rand_like.default: _plain("uniform", 0.0, 1.0),
    aten.randn.default: _plain("normal", 0.0, 1.0),
    aten.randn_like.default: _plain("normal", 0.0, 1.0),
    aten.randperm.default: _plain("randperm"),
    aten.randint.default: _randint,
    aten.randint.low: _randint_low,
    aten.randint_like.default: _randint_like,
    aten.randint_like.low_dtype: _randint_like_low,
    aten.bernoulli.p: _bernoulli,
    aten.bernoulli.default: _bernoulli_tensor,
    aten.bernoulli.Tensor: _bernoulli_tensor,
    aten.uniform.default: _two_numbers("uniform", "from", "to", 0.0, 1.0),
    aten.normal_functional.default: _two_numbers("normal", "mean", "std", 0.0, 1.0),
    aten.normal.Tensor_float: _normal_around,
    aten.normal.Tensor_Tensor: _normal_around,
    aten.normal.float_Tensor: _normal_around,
    aten.exponential.default: lambda args, kwargs, like: (
        _noise("exponential", like, float(_number(args, kwargs, 1, "lambd", 1.0))),
        lambda drawn: drawn,
    ),
    aten.native_dropout.default: _native_dropout,
}
