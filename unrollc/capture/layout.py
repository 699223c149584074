"""Where an optimizer keeps its tensors and numbers: state, param groups and attributes."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils import _pytree as pytree

from unrollc.capture.trees import (
    MACHINERY,
    PLAIN,
    Leaf,
    Opaque,
    Owner,
    flatten,
    is_flag,
    is_number,
    owned,
    rebuild,
)
from unrollc.errors import CaptureError


@dataclass(frozen=True)
class Layout:
    """An optimizer with every tensor replaced by its label, as trees (see `trees`).

    Two steps whose layouts are equal run the same Python code, up to the values of tensors.

    Attributes:
        state: For each entry of the optimizer's state its owner's label and its tree.
        members: For each param group the labels of its parameters.
        groups: For each param group its entries but the parameters, sorted by key.
        attributes: The optimizer's other attributes.
        numbers: The plain numbers among all of these, by label.
        labels: Labels of the state tensors.
        traced: Labels of the numbers that are tensors.
    """

    state: tuple[tuple[Any, Any], ...]
    members: tuple[tuple[str | None, ...], ...]
    groups: tuple[tuple[tuple[str, Any], ...], ...]
    attributes: tuple[tuple[str, Any], ...]
    numbers: Mapping[str, int | float] = field(compare=False, repr=False)
    labels: tuple[str, ...] = field(compare=False, repr=False)
    traced: tuple[str, ...] = field(compare=False, repr=False)


@dataclass(frozen=True)
class Manner:
    """How an optimizer is captured.

    Attributes:
        moving: Labels of plain numbers that steps change: each becomes a 0-dim tensor.
        foreach: Whether the optimizer's own choice between loops and ``foreach`` ops is kept.
            The loop is the plainer program, and in `torch.optim` the same arithmetic; some
            optimizers branch on data in it and use ``torch.where`` in the other path.
    """

    moving: frozenset[str] = frozenset()
    foreach: bool = False

    @property
    def flags(self) -> dict[str, bool]:
        """Entries of param groups and attributes that are replaced."""
        return {key: flag for key, flag in PLAIN.items() if not (self.foreach and key == "foreach")}


def changed_numbers(before: Layout, after: Layout) -> frozenset[str]:
    """Labels of the plain numbers that a step changes."""
    return frozenset(
        label
        for label, number in before.numbers.items()
        if label in after.numbers and after.numbers[label] != number
    )


def hyper_label(group: int, path: Any) -> str:
    """``param_groups[0]["betas"][1]``"""
    return f"param_groups[{group}]" + pytree.keystr(path).replace("'", '"')


def read_layout(
    opt: torch.optim.Optimizer,
    owners: Mapping[int, str],
    manner: Manner,
    hyper: Mapping[str, Tensor] | None = None,
    is_traced_number: Callable[[Tensor], bool] | None = None,
) -> tuple[Layout, dict[str, Tensor]]:
    """The layout of an optimizer and its state tensors by label.

    Args:
        opt: The optimizer.
        owners: Labels of the parameters by id.
        manner: What is read as what.
        hyper: The traced hyperparameters of a running step by label; any other tensor in a
            param group is state. None where the param groups are the user's own: then every
            tensor in them is a hyperparameter.
        is_traced_number: Whether a tensor stands for a number.

    Raises:
        CaptureError: If the step has put another tensor in the place of a hyperparameter, or if
            the optimizer keeps an iterator.
    """
    reader = _Reader(owners, manner, hyper, is_traced_number)
    known: dict[int, Hashable] = {id(opt): "self", id(opt.state): "state"}
    known[id(opt.param_groups)] = "groups"
    known.update((id(group), f"group {i}") for i, group in enumerate(opt.param_groups))
    flags = manner.flags
    state: list[tuple[Any, Any]] = []
    for key, value in opt.state.items():
        owner = owners.get(id(key), "" if isinstance(key, Tensor) else key)
        tree = flatten(value, f'state["{owner}"]', reader.leaf, owners, known, flags)
        state.append((owner, tree))
    groups = []
    for index, group in enumerate(opt.param_groups):
        items = []
        for name in sorted(set(group) - {"params"}):
            label, value = f'param_groups[{index}]["{name}"]', group[name]
            if is_flag(name, value) and name in flags:
                items.append((name, flags[name]))
            else:
                tree = flatten(value, label, reader.hyperparameter, owners, known, flags)
                items.append((name, tree))
        groups.append(tuple(items))
    attributes = [
        (
            name,
            (value if isinstance(value, str) else Opaque(value))  # load_state_dict makes a new one
            if name in MACHINERY
            else flatten(value, f"optimizer.{name}", reader.attribute, owners, known, flags),
        )
        for name, value in (vars(opt) | {k: v for k, v in flags.items() if k in vars(opt)}).items()
        if name not in ("state", "param_groups", "step")
    ]
    members = tuple(tuple(owners.get(id(p)) for p in g["params"]) for g in opt.param_groups)
    trees = tuple(state), members, tuple(groups), tuple(attributes)
    layout = Layout(*trees, reader.numbers, tuple(reader.tensors), tuple(reader.traced))
    return layout, reader.tensors


@dataclass
class _Reader:
    """What stands for the leaves of an optimizer's trees, and what it has met of them.

    Attributes:
        owners, manner, hyper, is_traced_number: As for `read_layout`.
        tensors: The state tensors by label.
        numbers: The plain numbers by label.
        traced: Labels of the numbers that are tensors.
        places: Labels of tensors by id: one tensor in two places stays one.
    """

    owners: Mapping[int, str]
    manner: Manner
    hyper: Mapping[str, Tensor] | None
    is_traced_number: Callable[[Tensor], bool] | None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, int | float] = field(default_factory=dict)
    traced: list[str] = field(default_factory=list)
    places: dict[int, str] = field(default_factory=dict)

    def leaf(self, label: str, value: Any) -> Any:
        """A leaf of the state, or of what is no hyperparameter."""
        if (owner := owned(value, self.owners)) is not value:
            return owner
        if isinstance(value, Tensor):
            return self._tensor(label, value)
        if is_number(value):
            if label in self.manner.moving:
                self.tensors[label] = torch.tensor(float(value), dtype=torch.float64)
                self.traced.append(label)
                return Leaf(label, number=True)
            self.numbers[label] = value
        if hasattr(value, "per_step"):
            return Leaf(label)
        if isinstance(value, Iterator) and not isinstance(value, io.IOBase):
            raise CaptureError(
                f"{label} is an iterator ({type(value).__name__})",
                why="its position cannot be read or put back, so the steps of the loop cannot be "
                "told apart",
                remedy="keep a number and index with it",
            )
        return value if isinstance(value, _PLAIN_VALUES) else Opaque(value)

    def _tensor(self, label: str, value: Tensor) -> Leaf:
        label = self.places.setdefault(id(value), label)
        self.tensors[label] = value
        number = self.is_traced_number is not None and self.is_traced_number(value)
        if number and label not in self.traced:
            self.traced.append(label)
        return Leaf(label, number)

    def hyperparameter(self, label: str, value: Any) -> Any:
        """A leaf of a param group."""
        if not isinstance(value, Tensor) or id(value) in self.owners:
            return self.leaf(label, value)
        if self.hyper is not None and label not in self.hyper:
            return self.leaf(label, value)
        if self.hyper is not None and self.hyper[label] is not value:
            raise CaptureError(
                f"the optimizer writes a tensor into {label}",
                why="a hyperparameter that changes during the inner loop is state, and "
                "state belongs into optimizer.state",
                remedy="keep the value in self.state[parameter]",
            )
        return Leaf(label)

    def attribute(self, label: str, value: Any) -> Any:
        """A leaf of another attribute."""
        tensor = isinstance(value, Tensor) and id(value) not in self.owners
        traced = isinstance(value, FunctionalTensor)
        if tensor and not traced and (value.requires_grad or value.layout is not torch.strided):
            return Opaque(value)  # a learned optimizer's parameter, found where it is used
        return self.leaf(label, value)


_PLAIN_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def build_twin(
    opt: torch.optim.Optimizer,
    layout: Layout,
    owners: Mapping[int, str],
    tensors: Mapping[str, Tensor],
) -> torch.optim.Optimizer:
    """A copy of an optimizer that holds the given tensors.

    The copy is made from ``__dict__``: an optimizer's ``__getstate__`` may leave attributes out.

    Args:
        opt: The user's optimizer, left untouched.
        layout: What the copy is to hold.
        owners: Labels of the user's parameters by id.
        tensors: Parameters, state and hyperparameters by label.
    """
    twin = object.__new__(type(opt))
    groups: list[dict[str, Any]] = []
    state: defaultdict[Any, Any] = defaultdict(dict)
    made: dict[Hashable, Any] = {"self": twin, "state": state, "groups": groups}
    fill = filler(tensors)
    labels = {owners[id(p)] for group in opt.param_groups for p in group["params"]}
    for owner, tree in layout.state:
        state[tensors[owner] if owner in labels else owner] = rebuild(tree, fill, made)
    for index, group in enumerate(opt.param_groups):
        values: dict[str, Any] = {"params": [tensors[owners[id(p)]] for p in group["params"]]}
        made[f"group {index}"] = values
        groups.append(values)
        entries = dict(layout.groups[index])
        for key in (*group, *entries):  # the user's order
            if key in entries and key not in values:
                values[key] = rebuild(entries[key], fill, made)
    own = vars(opt)
    vars(twin).update({k: v for k, v in (("state", state), ("param_groups", groups)) if k in own})
    vars(twin).update({name: rebuild(tree, fill, made) for name, tree in layout.attributes})
    return twin


def write_back(
    opt: torch.optim.Optimizer,
    layout: Layout,
    tensors: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
) -> None:
    """Give an optimizer the state, numbers and attributes of a layout.

    Args:
        opt: The user's optimizer.
        layout: What it is to hold.
        tensors: State by label. Traced numbers become numbers; hyperparameters stay as they are.
        parameters: The user's parameters by label.
    """
    values: dict[str, Any] = {**_entries(opt), **parameters, **tensors}
    values |= {label: plain_number(tensors[label]) for label in layout.traced}
    fill = filler(values)
    made: dict[Hashable, Any] = {"self": opt, "state": opt.state, "groups": opt.param_groups}
    made |= {f"group {index}": group for index, group in enumerate(opt.param_groups)}
    for owner, tree in layout.state:
        key: Any = parameters.get(owner, owner)
        opt.state[key] = rebuild(tree, fill, made, opt.state.get(key))
    for group, entries in zip(opt.param_groups, layout.groups, strict=True):
        for name, tree in entries:
            if not is_flag(name, group.get(name)):
                group[name] = rebuild(tree, fill, made, group.get(name))
    own = vars(opt)
    for name, tree in layout.attributes:
        if not is_flag(name, own.get(name)):
            own[name] = rebuild(tree, fill, made, own.get(name))


def _entries(opt: torch.optim.Optimizer) -> dict[str, Any]:
    """The leaves of all param groups by label."""
    found: dict[str, Any] = {}
    for index, group in enumerate(opt.param_groups):
        for name, value in group.items():
            if name != "params":
                label = f'param_groups[{index}]["{name}"]'
                flatten(value, label, found.__setitem__, {}, {}, {})
    return found


def plain_number(tensor: Tensor) -> int | float:
    """The Python number that a traced one stands for; whole ones are integers."""
    number = float(tensor)
    return int(number) if number.is_integer() else number


def filler(tensors: Mapping[str, Any]) -> Callable[[Any], Any]:
    """What stands for a leaf of a layout, given the tensors by label."""

    def fill(leaf: Any) -> Any:
        if isinstance(leaf, Leaf):
            return tensors[leaf.label]
        if isinstance(leaf, Owner):
            return id(tensors[leaf.label]) if leaf.by_id else tensors[leaf.label]
        return leaf.value if isinstance(leaf, Opaque) else leaf

    return fill
