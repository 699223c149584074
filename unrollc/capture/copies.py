"""Copies of schedulers, and of the param groups that they write to, on the autograd graph."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils import _pytree as pytree

from unrollc.capture.problem import PerStep


class Copier:
    """Copies of schedulers and of what they hold; their optimizer is replaced by its twin.

    ``copy.deepcopy`` would copy tensors that require grad, which cuts their gradient, and refuse
    those that are computed.

    Attributes:
        schedulers: The copies of schedulers, in the order in which they were met.
    """

    def __init__(self, memo: dict[int, Any], tensor: Callable[[Tensor], Tensor]) -> None:
        self._memo = memo
        self._tensor = tensor
        self._kept: list[Any] = []
        self.schedulers: list[LRScheduler] = []

    def of(self, value: Any) -> Any:
        """The copy of one value; functions, modules and constants stand for themselves."""
        if id(value) not in self._memo:
            self._kept.append(value)
            self._memo[id(value)] = value
            self._memo[id(value)] = self._made(value)
        return self._memo[id(value)]

    def _made(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self.of(value.__self__))
        if isinstance(value, functools.partial):
            given = [self.of(item) for item in value.args]
            return functools.partial(self.of(value.func), *given, **self.of(value.keywords))
        if isinstance(value, tuple):
            items = [self.of(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, list | dict | set):
            return self._container(value)
        shared = (nn.Module, types.FunctionType, types.ModuleType, type)
        if isinstance(value, shared) or not isinstance(getattr(value, "__dict__", None), dict):
            return value
        made = self._memo[id(value)] = object.__new__(type(value))
        if isinstance(made, LRScheduler):
            self.schedulers.append(made)
        made.__dict__.update({key: self.of(item) for key, item in vars(value).items()})
        return made

    def _container(self, value: Any) -> Any:
        made = self._memo[id(value)] = value.copy()
        if isinstance(value, set):
            return made
        for key, item in enumerate(value) if isinstance(value, list) else value.items():
            made[key] = self.of(item)
        return made


def copied(state: Any) -> Any:
    """A scheduler's state in containers and tensors of its own, detached."""
    return Copier({}, lambda tensor: tensor.detach().clone()).of(state)


def twin_of(
    opt: torch.optim.Optimizer, scheduler: LRScheduler
) -> tuple[torch.optim.Optimizer, Copier]:
    """A twin of the optimizer with entries of its own, and a copier for its schedulers."""
    twin = object.__new__(type(opt))
    twin.__dict__.update(opt.__dict__)
    twin.__dict__["_opt_called"] = True  # schedulers warn where no optimizer step came before
    twin.param_groups = [
        {
            key: value if key == "params" else pytree.tree_map(_own, value, is_leaf=is_per_step)
            for key, value in group.items()
        }
        for group in opt.param_groups
    ]
    copier = Copier({id(opt): twin}, lambda t: t if t.requires_grad else t.clone())
    copier.of(scheduler)
    return twin, copier


def is_per_step(value: Any) -> bool:
    return isinstance(value, PerStep)


def _own(value: Any) -> Any:
    """An entry's tensor on the graph of the user's, so that schedulers may write to it."""
    if isinstance(value, PerStep):
        return float(value.per_step[0])
    return value.clone() if isinstance(value, Tensor) else value
