"""``torch._foreach_*`` ops of an optimizer, captured as loops over their tensors.

They compute what the loop computes; in a graph of single ops every later stage sees the plain
arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_PREFIX = "_foreach_"


class ForeachAsLoops(TorchFunctionMode):
    """Runs each ``foreach`` op tensor by tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if not name.startswith(_PREFIX):
            return func(*args, **kwargs)
        base = name.removeprefix(_PREFIX).removesuffix("_")
        op = _OPS.get(base) or getattr(torch, base, None)
        if op is None:
            return func(*args, **kwargs)
        length = next(len(arg) for arg in args if isinstance(arg, list | tuple))
        results = []
        for index in range(length):
            own = [_at(arg, index, base) for arg in args]
            rest = {key: _at(value, index, base) for key, value in kwargs.items()}
            results.append(op(*own, **rest))
        if not name.endswith("_"):
            return results
        for target, result in zip(args[0], results, strict=True):
            target.copy_(result)
        return None


def _at(value: Any, index: int, base: str) -> Any:
    """What a ``foreach`` op gives to its tensor number `index`."""
    if isinstance(value, list | tuple):
        return value[index]
    if base in ("addcmul", "addcdiv") and isinstance(value, Tensor) and value.dim() == 1:
        return value[index]  # one factor for each tensor
    return value


def _norm(x: Tensor, ord: Any = 2, dtype: torch.dtype | None = None) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, ord, dtype=dtype)
    return norm


def _scaled(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``addcmul`` and ``addcdiv`` take their factor by position here."""

    def scaled(x: Tensor, y: Tensor, z: Tensor, value: Any = 1) -> Tensor:
        return op(x, y, z, value=value)

    return scaled


def _bound(key: str) -> Callable[[Tensor, Any], Tensor]:
    def bounded(x: Tensor, bound: Any) -> Tensor:
        clamped: Tensor = torch.clamp(x, **{key: bound})
        return clamped

    return bounded


#: Ops whose arguments stand elsewhere than in `torch`.
_OPS: dict[str, Callable[..., Any]] = {
    "norm": _norm,
    "addcmul": _scaled(torch.addcmul),
    "addcdiv": _scaled(torch.addcdiv),
    "clamp_min": _bound("min"),
    "clamp_max": _bound("max"),
    "maximum": lambda x, y: torch.maximum(x, y) if isinstance(y, Tensor) else _bound("min")(x, y),
    "minimum": lambda x, y: torch.minimum(x, y) if isinstance(y, Tensor) else _bound("max")(x, y),
    "copy": lambda x, y, non_blocking=False: y,
    "zero": torch.zeros_like,
}
