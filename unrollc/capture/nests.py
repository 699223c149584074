"""Tensors in nests of tuples, lists and dictionaries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

#: Types of plain values, which hold no tensor.
_ATOMS = frozenset((int, float, bool, str, type(None)))


def map_tensors(change: Callable[[Tensor], Any], value: Any) -> Any:
    """`value`, a nest of tuples, lists and dictionaries, with its tensors replaced."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in _ATOMS:  # most of what is asked for
        return value
    if isinstance(value, tuple):
        return tuple([map_tensors(change, item) for item in value])
    if isinstance(value, list):
        return [map_tensors(change, item) for item in value]
    if isinstance(value, dict):
        return {key: map_tensors(change, item) for key, item in value.items()} if value else {}
    return value


def is_continuous(value: Any) -> bool:
    """Whether a value is a tensor of real or complex numbers, which can have a derivative."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a nest, in order."""
    found: list[Tensor] = []
    _gather(value, found)
    return found


def _gather(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif type(value) in _ATOMS:
        return
    elif isinstance(value, tuple | list):
        for item in value:
            _gather(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            _gather(item, found)
