"""Learning-rate schedulers: T steps of a copy, whose rates become one value a step.

A copy of the scheduler is stepped over a copy of the optimizer's param groups with autograd on.
What it writes there (learning rates, and the momenta that some schedulers cycle) goes into the
inner loop as `PerStep` values, so that one captured step serves all T, and the gradient of a
tensor behind the schedule flows back to it outside the program.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.utils import _pytree as pytree

from unrollc.capture.base_rates import move_bases
from unrollc.capture.copies import copied, is_per_step, twin_of
from unrollc.capture.layout import hyper_label
from unrollc.capture.problem import PerStep
from unrollc.errors import InputError


@dataclass(frozen=True)
class Schedule:
    """What a scheduler does in T inner steps.

    Attributes:
        opt: The optimizer with a `PerStep` in every entry that the scheduler changes; it shares
            parameters and state with the user's.
        behind: The user's tensors that the rates of an entry depend on, by its label.
        groups: For each param group the entries that are different after T steps.
        state: The scheduler's ``state_dict()`` after T steps.
    """

    opt: torch.optim.Optimizer
    behind: dict[str, tuple[Tensor, ...]]
    groups: tuple[dict[str, Any], ...]
    state: dict[str, Any]


def run_schedule(opt: torch.optim.Optimizer, scheduler: LRScheduler, steps: int) -> Schedule:
    """Step a copy of `scheduler` T times from the state it has now.

    Args:
        opt: The user's optimizer, left untouched like the scheduler.
        scheduler: A scheduler over `opt`.
        steps: T.

    Raises:
        InputError: If the scheduler writes to a `PerStep`, cannot take T steps, or changes what
            is no number.
    """
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_kept, _same):
        twin, copier = twin_of(opt, scheduler)
        stepped = copier.of(scheduler)
        moved = move_bases(opt, scheduler, twin, copier.schedulers)
        before = _entries(twin)
        rows = []
        for _ in range(steps):
            rows.append(_snapshot(_entries(twin)))
            try:
                stepped.step()
            except ValueError as error:
                raise InputError(
                    f"the scheduler cannot go through {steps} inner steps",
                    why=str(error),
                    remedy="build it for at least as many steps as train has",
                ) from error
        values = {
            label: found
            for label in before
            if (found := _scheduled(label, [row.get(label) for row in rows])) is not None
        }
        after = _entries(twin)
    _check_entries(opt, rows, after, values)
    groups = tuple(
        _changed(old, new) for old, new in zip(opt.param_groups, twin.param_groups, strict=True)
    )
    leaves = _user_tensors(opt)
    behind = {
        label: (*_reached(value, leaves), *moved.get(label, ())) for label, value in values.items()
    }
    return Schedule(_with_values(opt, values), behind, groups, copied(stepped.state_dict()))


def _kept(tensor: Tensor) -> Tensor:
    """What autograd saves: schedulers write to the rates that they have computed with."""
    return tensor.detach().clone()


def _same(tensor: Tensor) -> Tensor:
    return tensor


def check_scheduler(scheduler: Any, opt: torch.optim.Optimizer) -> None:
    """Refuse what is no scheduler over `opt` that steps by itself.

    Raises:
        InputError: With what to pass.
    """
    if not isinstance(scheduler, LRScheduler):
        raise InputError(
            f"scheduler is {type(scheduler).__name__}, not a torch.optim.lr_scheduler scheduler",
            remedy="pass a scheduler that was built over the optimizer, or put "
            "unrollc.PerStep(rates) into its param groups",
        )
    if scheduler.optimizer is not opt:
        raise InputError(
            "the scheduler was built over another optimizer",
            remedy="build it over the optimizer that is given to compile",
        )
    step = list(inspect.signature(type(scheduler).step).parameters.values())
    if any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in step[1:]):
        raise InputError(
            f"{type(scheduler).__name__}.step needs a metric",
            why="its rates depend on losses that are known only while training runs, and jump "
            "with them",
            remedy="use a scheduler of the step number alone",
        )


def _entries(opt: torch.optim.Optimizer) -> dict[str, Any]:
    """The leaves of all param groups by label."""
    found = {}
    for index, group in enumerate(opt.param_groups):
        for key, value in group.items():
            if key != "params":
                paths, _ = pytree.tree_flatten_with_path({key: value}, is_leaf=is_per_step)
                found.update({hyper_label(index, path): leaf for path, leaf in paths})
    return found


@dataclass(frozen=True)
class _Seen:
    """A tensor entry at one step."""

    tensor: Tensor
    version: int
    value: Tensor


def _snapshot(entries: dict[str, Any]) -> dict[str, Any]:
    return {
        label: _Seen(value, value._version, value.clone()) if isinstance(value, Tensor) else value
        for label, value in entries.items()
    }


def _scheduled(label: str, values: list[Any]) -> Tensor | None:
    """The values of an entry that changes as one tensor ``[T]``; None for one that stays."""
    first = values[0]
    if isinstance(first, _Seen):
        marks = {(id(v.tensor), v.version) for v in values if isinstance(v, _Seen)}
        if len(marks) == 1 and all(isinstance(v, _Seen) for v in values):
            return None
    elif all(not isinstance(v, _Seen) and v == first for v in values):
        return None
    like = next((v.value for v in values if isinstance(v, _Seen)), None)
    numbers = []
    for value in values:
        if isinstance(value, _Seen):
            numbers.append(value.value.reshape(()))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers.append(torch.tensor(float(value), dtype=torch.float64))
        else:
            raise InputError(
                f"the scheduler sets {label} to {value!r}",
                why="what changes from step to step must be a number",
                remedy="schedule numbers alone",
            )
    if like is not None:
        numbers = [number.to(like.device, like.dtype) for number in numbers]
    return torch.stack(numbers)


def _check_entries(
    opt: torch.optim.Optimizer,
    rows: list[dict[str, Any]],
    after: dict[str, Any],
    values: dict[str, Tensor],
) -> None:
    for label, value in _entries(opt).items():
        if isinstance(value, PerStep) and after.get(label) != rows[0][label]:
            raise InputError(
                f"both the scheduler and a PerStep set {label}",
                remedy="give one of them",
            )
    for row in (*rows, after):
        if added := sorted(set(row) ^ set(rows[0])):
            raise InputError(
                f"the scheduler adds or removes {added[0]}",
                why="the entries of a param group must be the same at every inner step",
                remedy="set it before the loop",
            )


def _with_values(opt: torch.optim.Optimizer, values: dict[str, Tensor]) -> torch.optim.Optimizer:
    """The user's optimizer with other values in its param groups."""
    made = object.__new__(type(opt))
    made.__dict__.update(opt.__dict__)
    made.__dict__.setdefault("_opt_called", True)
    made.param_groups = []
    for index, group in enumerate(opt.param_groups):
        entries = {}
        for key, value in group.items():
            paths, spec = pytree.tree_flatten_with_path({key: value}, is_leaf=is_per_step)
            labels = [hyper_label(index, path) for path, _ in paths]
            leaves = [
                PerStep(values[label]) if key != "params" and label in values else leaf
                for label, (_, leaf) in zip(labels, paths, strict=True)
            ]
            entries.update(pytree.tree_unflatten(leaves, spec))
        made.param_groups.append(entries)
    return made


def _changed(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Entries after the schedule that are not as before, with tensors detached."""

    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return torch.equal(a, b)
        return type(a) is type(b) and bool(a == b)

    found = {}
    for key, value in new.items():
        if key == "params" or any(
            map(is_per_step, pytree.tree_leaves(old.get(key), is_leaf=is_per_step))
        ):
            continue
        was = pytree.tree_leaves(old.get(key))
        leaves, spec = pytree.tree_flatten(value)
        if len(was) == len(leaves):
            leaves = [_like(a, b) for a, b in zip(was, leaves, strict=True)]
        if len(was) != len(leaves) or not all(map(equal, was, leaves)):
            found[key] = copied(pytree.tree_unflatten(leaves, spec))
    return found


def _like(before: Any, after: Any) -> Any:
    """A number where one was: base rates that follow a tensor are numbers elsewhere."""
    return after.item() if isinstance(before, float) and isinstance(after, Tensor) else after


def _user_tensors(opt: torch.optim.Optimizer) -> list[Tensor]:
    return [
        value
        for value in _entries(opt).values()
        if isinstance(value, Tensor) and value.requires_grad
    ]


def _reached(rates: Tensor, entries: list[Tensor]) -> tuple[Tensor, ...]:
    """The user's tensors that the rates are a function of: entries of groups, and leaves."""
    if not rates.requires_grad:
        return ()
    with torch.enable_grad():
        total = rates.sum()
    found: dict[int, Tensor] = {}
    if entries:
        grads = torch.autograd.grad(total, entries, allow_unused=True, retain_graph=True)
        found = {id(t): t for t, grad in zip(entries, grads, strict=True) if grad is not None}
    stack, seen = [total.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found[id(leaf)] = leaf
        stack.extend(function for function, _ in node.next_functions)
    return tuple(found.values())


def put_back(schedule: Schedule, opt: torch.optim.Optimizer, scheduler: LRScheduler) -> None:
    """Leave optimizer and scheduler as ordinary training would after T steps.

    A tensor in a param group is replaced, not written to: it may be the meta-parameter.
    """
    for group, entries in zip(opt.param_groups, schedule.groups, strict=True):
        group.update(copied(entries))
    scheduler.load_state_dict(copied(schedule.state))
