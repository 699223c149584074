"""Python values that hold an optimizer's tensors and numbers, taken apart and put together again.

A tree is a value with its containers spelled out and its leaves replaced. Two trees are equal
where Python code would find the same containers, numbers and objects, whatever tensors they hold.
Besides dictionaries, lists, tuples, sets and deques, plain Python objects are opened: a projector
or a schedule that an optimizer keeps is state like any other.
"""

from __future__ import annotations

import enum
import sys
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.functional_tensor import FunctionalTensor

from unrollc.errors import CaptureError

#: Containers longer than this are kept as they are: data, not state.
_LONGEST = 10_000

#: What `torch.optim.Optimizer` itself keeps (hooks and the like); no step changes it.
MACHINERY = set(vars(torch.optim.Optimizer([nn.Parameter(torch.empty(0))], {}))) - {
    "state",
    "param_groups",
}

#: Flags that choose between implementations of one update, and their values for the plain one.
PLAIN = {"foreach": False, "fused": False, "differentiable": False}


@dataclass(frozen=True)
class Leaf:
    """Stands for a tensor, or for a plain number that is a tensor while it is traced."""

    label: str
    number: bool = False


@dataclass(frozen=True)
class Owner:
    """Stands for a parameter that the optimizer updates, or for its ``id``."""

    label: str
    by_id: bool = False


@dataclass(frozen=True, eq=False)
class Opaque:
    """A value that is kept as it is; it counts by identity."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Opaque) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        return f"<{type(self.value).__name__} {id(self.value)}>"


@dataclass(frozen=True)
class Same:
    """A container that was met before."""

    name: Hashable


@dataclass(frozen=True)
class Branch:
    """A container or a plain object.

    Attributes:
        name: What `Same` calls it by.
        kind: Its class.
        keys: Keys of a dictionary or names of attributes; positions otherwise.
        items: What stands there.
        extra: A deque's length or a dictionary's factory.
    """

    name: Hashable
    kind: type
    keys: tuple[Any, ...]
    items: tuple[Any, ...]
    extra: Any = None


def flatten(
    value: Any,
    label: str,
    leaf: Callable[[str, Any], Any],
    owners: Mapping[int, str],
    known: dict[int, Hashable],
    flags: Mapping[str, bool],
) -> Any:
    """The tree of a value.

    Args:
        value: What is taken apart.
        label: How the user knows it; parts are called ``label["key"]``, ``label.attribute``.
        leaf: Given the label and value of what is no container, what stands for it.
        owners: Labels of parameters by id.
        known: Names of containers by id; those met here are added.
        flags: Values of keys and attributes that replace what stands there.
    """
    if id(value) in known:
        return Same(known[id(value)])
    parts = _parts(value)
    if parts is None:
        return leaf(label, value)
    name = len(known)
    if not isinstance(value, tuple | types.MethodType):  # these cannot change
        known[id(value)] = name
    keys, items, extra = parts
    made: list[Any] = []
    for key, item in zip(keys, items, strict=True):
        if is_flag(key, item) and key in flags:
            made.append(flags[key])
        elif isinstance(value, torch.optim.Optimizer) and key in MACHINERY:
            made.append(Opaque(item))
        else:
            place = label + _step(value, key, owners)
            made.append(flatten(item, place, leaf, owners, known, flags))
    named = tuple(owned(key, owners) for key in keys)
    if any(isinstance(key, FunctionalTensor) for key in named):
        raise CaptureError(
            f"{label} has a key that was computed from a number which changes from step to step",
            why="such a number is a tensor while the step is captured",
            remedy="make a plain number of it where it becomes a key: int(n)",
        )
    return Branch(name, type(value), named, tuple(made), extra)


def is_flag(key: Any, value: Any) -> bool:
    """Whether an entry chooses between implementations."""
    return isinstance(key, str) and key in PLAIN and (value is None or isinstance(value, bool))


def owned(value: Any, owners: Mapping[int, str]) -> Any:
    """`Owner` in place of a parameter or of its id, anything else as it is."""
    if isinstance(value, Tensor) and id(value) in owners:
        return Owner(owners[id(value)])
    if type(value) is int and value in owners:
        return Owner(owners[value], by_id=True)
    return value


def _step(value: Any, key: Any, owners: Mapping[int, str]) -> str:
    key = owned(key, owners)
    key = key.label if isinstance(key, Owner) else key
    if isinstance(value, dict):
        return f'["{key}"]' if isinstance(key, str) else f"[{key!r}]"
    return f".{key}" if isinstance(key, str) else f"[{key}]"


def _parts(value: Any) -> tuple[tuple[Any, ...], tuple[Any, ...], Any] | None:
    """Keys, items and extra of a container; None for a leaf."""
    kind = type(value)
    if kind in (dict, OrderedDict, defaultdict) and len(value) <= _LONGEST:
        return tuple(value), tuple(value.values()), getattr(value, "default_factory", None)
    if kind in (list, deque, set, frozenset) or isinstance(value, tuple):
        if len(value) > _LONGEST:
            return None
        return tuple(range(len(value))), tuple(value), getattr(value, "maxlen", None)
    if kind is types.MethodType and is_plain_object(value.__self__):
        return ("function", "self"), (value.__func__, value.__self__), None
    if is_plain_object(value):
        attributes = attributes_of(value)
        if isinstance(value, torch.optim.Optimizer):
            attributes.pop("step", None)  # a scheduler's wrapper, bound to the user's own
        return tuple(attributes), tuple(attributes.values()), None
    return None


def attributes_of(value: Any) -> dict[str, Any]:
    """The attributes of a plain object, those in slots included."""
    slots = {name: getattr(value, name) for name in _slots(type(value)) if hasattr(value, name)}
    return slots | getattr(value, "__dict__", {})


def set_attribute(value: Any, name: str, item: Any) -> None:
    """Set an attribute of a plain object, whatever its class makes of assignments."""
    if name in _slots(type(value)):
        object.__setattr__(value, name, item)
    else:
        vars(value)[name] = item


def _slots(kind: type) -> list[str]:
    """Names of the attributes that a class keeps outside ``__dict__``."""
    declared = [vars(base).get("__slots__", ()) for base in kind.__mro__]
    names = [name for d in declared for name in ((d,) if isinstance(d, str) else d)]
    return [name for name in names if name not in ("__dict__", "__weakref__")]


_NEW: Any = object.__new__


def is_plain_object(value: Any) -> bool:
    """Whether an object is nothing but its attributes."""
    kind = type(value)
    return (
        (hasattr(value, "__dict__") or hasattr(kind, "__slots__"))
        and kind.__new__ is _NEW
        and kind.__module__.split(".")[0] not in sys.stdlib_module_names  # loggers, locks, files
        and not hasattr(value, "per_step")
        and not isinstance(
            value, Tensor | nn.Module | type | enum.Enum | types.ModuleType | types.FunctionType
        )
    )


def rebuild(
    tree: Any, fill: Callable[[Any], Any], made: dict[Hashable, Any], onto: Any = None
) -> Any:
    """The value of a tree.

    Args:
        tree: What `flatten` returned.
        fill: What stands for a leaf.
        made: Containers by name; those made here are added.
        onto: A value to write to, in place where it is a container of the same kind. What
            chooses between implementations keeps its value there.
    """
    if isinstance(tree, Same):
        return made[tree.name]
    if not isinstance(tree, Branch):
        return fill(tree)
    present: dict[Any, Any] = {}
    if type(onto) is tree.kind and (parts := _parts(onto)) is not None:
        present = dict(zip(map(_hashable, parts[0]), parts[1], strict=True))

    def inside() -> list[Any]:
        items = []
        for key, item in zip(tree.keys, tree.items, strict=True):
            own = present.get(_hashable(fill(key)))
            kept = present and is_flag(key, own)
            items.append(own if kept else rebuild(item, fill, made, own))
        return items

    if tree.kind is types.MethodType:
        return types.MethodType(*inside())
    if issubclass(tree.kind, tuple):
        fixed = inside()
        if len(present) == len(fixed) > 0 and all(map(_alike, fixed, onto)):
            return onto
        return tree.kind(*fixed) if hasattr(tree.kind, "_fields") else tree.kind(fixed)
    if tree.kind is frozenset:
        return frozenset(inside())
    value = made[tree.name] = onto if present else _empty(tree)
    items = inside()
    if not isinstance(value, dict | list | deque | set):
        for key, item in zip(tree.keys, items, strict=True):
            set_attribute(value, key, item)
        return value
    value.clear()
    if isinstance(value, dict):
        value.update(zip((fill(key) for key in tree.keys), items, strict=True))
    elif isinstance(value, set):
        value.update(items)
    else:
        value.extend(items)
    return value


def opaque_in(tree: Any) -> list[Any]:
    """The values that a tree keeps as they are."""
    if isinstance(tree, Opaque):
        return [tree.value]
    items = tree.items if isinstance(tree, Branch) else tree if isinstance(tree, tuple) else ()
    return [value for item in items for value in opaque_in(item)]


def _alike(first: Any, second: Any) -> bool:
    return first is second or (is_number(first) and is_number(second) and first == second)


def _hashable(key: Any) -> Any:
    return id(key) if isinstance(key, Tensor) else key


def _empty(tree: Branch) -> Any:
    if tree.kind is defaultdict:
        return defaultdict(tree.extra)
    if tree.kind is deque:
        return deque(maxlen=tree.extra)
    if tree.kind in (dict, OrderedDict, list, set):
        return tree.kind()
    return object.__new__(tree.kind)


def is_number(value: Any) -> bool:
    """Whether a value is a plain number that can be a tensor instead."""
    return type(value) in (int, float)
