"""The optimizer's own ``step``, run on traced tensors.

The user's optimizer is copied by its ``__dict__`` (its ``__getstate__`` may leave attributes
out), its parameters, gradients, state and tensor hyperparameters are replaced by traced ones,
and ``step()`` is called. What the step does in place, functionalization makes pure.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from unrollc.capture.record import Recorder
from unrollc.capture.scalars import ScalarSlots, extremes_of_tensors
from unrollc.errors import CaptureError

#: Flags that choose between implementations of one update; the plain one is captured.
_PLAIN = {"foreach": False, "fused": False, "differentiable": False}


@dataclass(frozen=True)
class Leaf:
    """Stands for a tensor in a `Layout`."""

    label: str


@dataclass(frozen=True)
class Layout:
    """The optimizer's state and groups with every tensor replaced by its label.

    Two steps whose layouts are equal run the same Python code, up to the values of tensors.

    Attributes:
        state: For each state entry its owner's label, tree structure and leaves.
        groups: For each param group its sorted items; values are numbers, strings or `Leaf`.
    """

    state: tuple[tuple[str, Any, tuple[Any, ...]], ...]
    groups: tuple[tuple[tuple[str, Any], ...], ...]

    @property
    def labels(self) -> list[str]:
        """Labels of the state tensors."""
        return [leaf.label for _, _, leaves in self.state for leaf in leaves if _is_leaf(leaf)]


def _is_leaf(value: Any) -> bool:
    return isinstance(value, Leaf)


def state_label(owner: str, path: Any) -> str:
    """``state["fc.weight"]["exp_avg"]``"""
    return f'state["{owner}"]' + pytree.keystr(path).replace("'", '"')


def hyper_label(group: int, path: Any) -> str:
    """``param_groups[0]["betas"][1]``"""
    return f"param_groups[{group}]" + pytree.keystr(path).replace("'", '"')


def read_layout(
    opt: torch.optim.Optimizer, owners: Mapping[int, str]
) -> tuple[Layout, dict[str, Tensor]]:
    """The layout of an optimizer and its state tensors by label.

    Args:
        opt: The optimizer.
        owners: Labels of the parameters by id.
    """
    tensors: dict[str, Tensor] = {}
    entries = []
    for key, value in opt.state.items():
        owner = owners.get(id(key), str(key) if not isinstance(key, Tensor) else "")
        paths, spec = pytree.tree_flatten_with_path(value)
        leaves: list[Any] = []
        for path, leaf in paths:
            label = state_label(owner, path)
            if isinstance(leaf, Tensor):
                tensors[label] = leaf
                leaves.append(Leaf(label))
            else:
                leaves.append(leaf)
        entries.append((owner, spec, tuple(leaves)))
    return Layout(tuple(entries), _group_layout(opt)), tensors


def _group_layout(opt: torch.optim.Optimizer) -> tuple[tuple[tuple[str, Any], ...], ...]:
    groups = []
    for index, group in enumerate(opt.param_groups):
        items = []
        for key in sorted(group):
            if key == "params" or key in _PLAIN:
                continue
            paths, _ = pytree.tree_flatten_with_path({key: group[key]}, is_leaf=_is_opaque)
            for path, leaf in paths:
                label = hyper_label(index, path)
                items.append((label, Leaf(label) if _is_tensor_like(leaf) else leaf))
        groups.append(tuple(items))
    return tuple(groups)


def _is_opaque(value: Any) -> bool:
    return _is_tensor_like(value)


def _is_tensor_like(value: Any) -> bool:
    return isinstance(value, Tensor) or hasattr(value, "per_step")


def run_user_update(
    opt: torch.optim.Optimizer,
    recorder: Recorder,
    layout: Layout,
    owners: Mapping[int, str],
    tensors: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
) -> tuple[Layout, dict[str, Tensor]]:
    """One step of a copy of `opt` on traced tensors.

    Args:
        opt: The user's optimizer, left untouched.
        recorder: Where the update is recorded.
        layout: State and groups before the step.
        owners: Labels of the user's parameters by id.
        tensors: Traced parameters, state and hyperparameters by label; the parameters are
            changed in place.
        gradients: Traced gradients by label of the parameter; a parameter without one is
            skipped, as optimizers do.

    Returns:
        Layout and state tensors after the step.
    """
    own_step = opt.__dict__.get("step")
    if own_step is not None and not getattr(own_step, "_wrapped_by_lr_sched", False):
        raise CaptureError(
            "the optimizer's step was replaced on the instance",
            why="capture runs the step of the optimizer's class on a copy",
            remedy="override step in a subclass of the optimizer",
        )
    closure = inspect.signature(type(opt).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise CaptureError(
            f"{type(opt).__name__}.step needs a closure",
            why="it evaluates the loss several times within one step",
            remedy="use an optimizer whose step takes one gradient",
        )
    twin = object.__new__(type(opt))
    twin.__dict__.update({k: v for k, v in opt.__dict__.items() if k != "step"})
    traced_owners: dict[int, str] = {}
    twin.param_groups = []
    for index, group in enumerate(opt.param_groups):
        labels = [owners[id(parameter)] for parameter in group["params"]]
        parameters = [tensors[label] for label in labels]
        traced_owners.update({id(t): label for t, label in zip(parameters, labels, strict=True)})
        values = {**group, **{key: flag for key, flag in _PLAIN.items() if key in group}}
        values["params"] = parameters
        values |= _group_values(index, group, layout, tensors)
        twin.param_groups.append(values)
    by_label: dict[Any, Any] = {label: tensors[label] for label in traced_owners.values()}
    twin.state = defaultdict(dict)
    for owner, spec, leaves in layout.state:
        filled = [tensors[leaf.label] if isinstance(leaf, Leaf) else leaf for leaf in leaves]
        twin.state[by_label.get(owner, owner)] = pytree.tree_unflatten(filled, spec)
    before = {label: tensor for label, tensor in tensors.items()}
    for label, parameter in by_label.items():
        parameter.grad = gradients.get(label)
    with ScalarSlots(recorder), extremes_of_tensors(type(opt), recorder), torch.no_grad():
        type(opt).step(twin)
    _check_groups(twin, before)
    return read_layout(twin, traced_owners)


def _group_values(
    index: int, group: dict[str, Any], layout: Layout, tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The group's entries with traced tensors in place of the user's."""
    current = dict(layout.groups[index])
    values = {}
    for key, value in group.items():
        if key == "params" or key in _PLAIN:
            continue
        paths, spec = pytree.tree_flatten_with_path({key: value}, is_leaf=_is_opaque)
        leaves = []
        for path, _ in paths:
            leaf = current[hyper_label(index, path)]
            leaves.append(tensors[leaf.label] if isinstance(leaf, Leaf) else leaf)
        values.update(pytree.tree_unflatten(leaves, spec))
    return values


def _check_groups(twin: torch.optim.Optimizer, before: Mapping[str, Tensor]) -> None:
    known = {id(tensor) for tensor in before.values()}
    for index, group in enumerate(twin.param_groups):
        for key, value in group.items():
            if key == "params":
                continue
            for leaf in pytree.tree_leaves(value):
                if isinstance(leaf, Tensor) and id(leaf) not in known:
                    raise CaptureError(
                        f'the optimizer writes a tensor into param_groups[{index}]["{key}"]',
                        why="a hyperparameter that changes during the inner loop is state, and "
                        "state belongs into optimizer.state",
                        remedy="keep the value in self.state[parameter]",
                    )
