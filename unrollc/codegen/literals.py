"""Constants of a graph as Python source; only these forms can appear in generated code."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx


def literal(value: Any, names: dict[fx.Node, str]) -> str:
    """`value` as source text.

    Args:
        value: An argument of a node: a number, string, dtype, device, list or another node.
        names: How nodes are called in the code.
    """
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, tuple | list):
        items = ", ".join(literal(item, names) for item in value)
        return f"[{items}]" if isinstance(value, list) else f"({items}{',' * (len(value) == 1)})"
    if isinstance(value, float) and not math.isfinite(value):
        return "math.nan" if math.isnan(value) else f"{'-' * (value < 0)}math.inf"
    if value is None or isinstance(value, bool | int | float | complex):
        return repr(value)
    if isinstance(value, str):
        return repr(value)
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
        return str(value)
    raise AssertionError(f"no literal for {value!r} ({type(value).__name__})")


def tensor_literal(tensor: torch.Tensor) -> str:
    """A small constant tensor, on the device where the captured code made it."""
    place = "" if tensor.device.type == "cpu" else f', device="{tensor.device}"'
    return f"torch.tensor({literal(tensor.tolist(), {})}, dtype={tensor.dtype}{place})"
