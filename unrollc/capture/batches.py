"""Training data in its three forms, and the validation batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from unrollc.errors import InputError

_FORMS = (
    "train is one of: a list of T batches, each (inputs, target); "
    "a tuple (inputs, target) of tensors stacked on a leading dimension T; "
    "unrollc.repeat((inputs, target), T)"
)


@dataclass(frozen=True)
class Repeated:
    """One batch for every step; made by `repeat`."""

    batch: Any
    steps: int


def repeat(batch: Any, steps: int) -> Repeated:
    """The same batch at each of `steps` inner steps.

    Args:
        batch: ``(inputs, target)``.
        steps: T, at least 1.

    Returns:
        A value to pass as ``train``.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise InputError(
            f"repeat(batch, T): T is {steps!r}", remedy="pass a positive number of inner steps"
        )
    return Repeated(batch, steps)


@dataclass(frozen=True)
class Batches:
    """Batches of T steps as flat lists of tensors.

    Attributes:
        form: "list", "stacked", "repeat" (a list of one batch T times as well) or "single" (the
            validation batch).
        spec: Tree structure of one batch.
        labels: One label a leaf of a batch, e.g. ``train.inputs``.
        leaves: One entry a leaf: the tensor ("stacked": with a leading T; "repeat" and "single":
            as it is), or for "list" a tuple of T tensors.
        steps: T; 1 for "single".
    """

    form: str
    spec: pytree.TreeSpec
    labels: tuple[str, ...]
    leaves: tuple[Any, ...]
    steps: int

    def at(self, step: int) -> list[Tensor]:
        """The leaves of one step's batch."""
        if self.form in ("repeat", "single"):
            return list(self.leaves)
        return [leaf[step] for leaf in self.leaves]

    def tensors(self) -> list[Tensor]:
        """Every tensor that the user passed, in a fixed order."""
        if self.form == "list":
            return [tensor for leaf in self.leaves for tensor in leaf]
        return list(self.leaves)

    def signature(self) -> tuple[Any, ...]:
        """What lowering depends on: form, structure, shapes, dtypes, devices, requires_grad."""
        described = [(tuple(t.shape), t.dtype, t.device, t.requires_grad) for t in self.tensors()]
        return (self.form, self.steps, self.spec, self.labels, tuple(described))


def read_train(train: Any, *, paired: bool) -> Batches:
    """`train` in one of its three forms.

    Args:
        train: What the user passed.
        paired: Whether a batch must be ``(inputs, target)``; objectives take any structure.

    Raises:
        InputError: For anything else, saying which form it looked most like.
    """
    if isinstance(train, Repeated):
        _check_batch(train.batch, "the batch of repeat(batch, T)", paired)
        leaves, spec, labels = _flatten(train.batch, "train")
        return Batches("repeat", spec, labels, tuple(leaves), train.steps)
    if isinstance(train, list):
        return _read_list(train, paired)
    if isinstance(train, tuple):
        return _read_stacked(train, paired)
    kind = type(train).__name__
    guess = (
        "it looks most like stacked inputs without their target"
        if isinstance(train, Tensor)
        else "it looks most like a list of batches: wrap it in list(...)"
        if hasattr(train, "__iter__")
        else "it looks like none of the three forms"
    )
    raise InputError(f"train has type {kind}", why=guess, remedy=_FORMS)


def read_val(val: Any, *, paired: bool) -> Batches:
    """The validation batch."""
    _check_batch(val, "val", paired)
    leaves, spec, labels = _flatten(val, "val")
    return Batches("single", spec, labels, tuple(leaves), 1)


def _read_list(train: list[Any], paired: bool) -> Batches:
    if not train:
        raise InputError("train is an empty list", why="there is no inner step", remedy=_FORMS)
    if paired and len(train) == 2 and all(isinstance(item, Tensor) for item in train):
        raise InputError(
            "train is a list of two tensors",
            why="it looks most like one batch [inputs, target]; a list is read as T batches",
            remedy="pass (inputs, target) with a leading T, or unrollc.repeat((inputs, target), T)",
        )
    specs, columns = [], []
    labels: tuple[str, ...] = ()
    for index, batch in enumerate(train):
        _check_batch(batch, f"train[{index}] (train looks like a list of T batches)", paired)
        leaves, spec, labels = _flatten(_as_tuple(batch, paired), "train")
        specs.append(spec)
        columns.append(leaves)
        if spec != specs[0]:
            raise InputError(
                f"train[{index}] has another structure than train[0]",
                why=f"{spec} against {specs[0]}",
                remedy="give every step a batch of the same structure",
            )
    by_leaf = tuple(zip(*columns, strict=True))
    if len(train) > 1 and all(t is leaf[0] for leaf in by_leaf for t in leaf):
        return Batches("repeat", specs[0], labels, tuple(columns[0]), len(train))
    return Batches("list", specs[0], labels, by_leaf, len(train))


def _read_stacked(train: tuple[Any, ...], paired: bool) -> Batches:
    if paired and train and all(isinstance(item, tuple | list) for item in train):
        nested = [item for item in train if len(item) == 2]
        if len(nested) == len(train) and not (len(train) == 2 and isinstance(train[1], Tensor)):
            raise InputError(
                f"train is a tuple of {len(train)} pairs",
                why="it looks most like a list of T batches; a tuple is read as (inputs, target) "
                "stacked on a leading T",
                remedy="pass a list: train=[batch, batch, ...]",
            )
    _check_batch(train, "train (a tuple: read as stacked)", paired)
    leaves, spec, labels = _flatten(train, "train")
    for leaf, label in zip(leaves, labels, strict=True):
        if leaf.dim() == 0:
            raise InputError(
                f"{label} has no leading dimension T",
                why="train looks like a stacked tuple, whose tensors have one entry a step",
                remedy=_FORMS,
            )
    sizes = {label: leaf.shape[0] for leaf, label in zip(leaves, labels, strict=True)}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{label}: {size}" for label, size in sizes.items())
        raise InputError(
            "the number of steps T differs between the stacked tensors of train",
            why=listed,
            remedy="stack every tensor on the same leading dimension T (for one batch at every "
            "step, pass unrollc.repeat(batch, T))",
        )
    steps = next(iter(sizes.values()))
    if steps == 0:
        raise InputError("train has T = 0 steps", remedy="pass at least one inner step")
    return Batches("stacked", spec, labels, tuple(leaves), steps)


def _as_tuple(batch: Any, paired: bool) -> Any:
    return tuple(batch) if paired and isinstance(batch, list) else batch


def _check_batch(batch: Any, name: str, paired: bool) -> None:
    if not paired:
        return
    if not isinstance(batch, tuple | list):
        guess = "inputs without a target" if isinstance(batch, Tensor) else "no batch at all"
        raise InputError(
            f"{name} is {type(batch).__name__}, not a batch (inputs, target)",
            why=f"it looks like {guess}",
            remedy=_FORMS,
        )
    if len(batch) != 2:
        raise InputError(
            f"{name} has {len(batch)} entries, a batch has two: (inputs, target)",
            why="several model arguments go into a tuple: ((x1, x2), target)",
            remedy=_FORMS,
        )


def _flatten(batch: Any, name: str) -> tuple[list[Tensor], pytree.TreeSpec, tuple[str, ...]]:
    if isinstance(batch, list) and len(batch) == 2:
        batch = tuple(batch)
    paths, spec = pytree.tree_flatten_with_path(batch)
    leaves, labels = [], []
    pair = isinstance(batch, tuple) and len(batch) == 2
    for path, leaf in paths:
        label = name + pytree.keystr(path)
        if pair:
            first, *inner = path
            part = "inputs" if pytree.keystr((first,)) == "[0]" else "target"
            label = f"{name}.{part}{pytree.keystr(tuple(inner))}"
        if not isinstance(leaf, Tensor):
            raise InputError(
                f"{label} is {type(leaf).__name__}, not a tensor",
                remedy="convert the data with torch.as_tensor before the call",
            )
        if leaf.layout is not torch.strided:
            raise InputError(
                f"{label} has layout {leaf.layout}", remedy="pass a dense tensor (.to_dense())"
            )
        leaves.append(leaf)
        labels.append(label)
    return leaves, spec, tuple(labels)


def as_arguments(inputs: Any) -> Sequence[Any]:
    """The model's positional arguments: a tuple of tensors is several, anything else one."""
    return inputs if isinstance(inputs, tuple) else (inputs,)
