"""What captured code depends on besides tensors, as a key of the program cache."""

from __future__ import annotations

import functools
import types
from collections.abc import Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer

from unrollc.capture.problem import Objective, Problem

_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)

#: Containers and nested functions are followed to this depth, and up to this many items.
_DEPTH = 4
_ITEMS = 64

#: Attributes of a module that are keyed elsewhere or that PyTorch itself maintains.
MODULE_PARTS = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
_OPTIMIZER_PARTS = {"state", "param_groups", "step"}


def step_hooks_of(opt: torch.optim.Optimizer) -> list[Any]:
    """The hooks that run around an optimizer's step, those of all optimizers included."""
    own = [getattr(opt, f"_optimizer_step_{when}_hooks", {}) for when in ("pre", "post")]
    shared = (optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks)
    return [hook for hooks in (*own, *shared) for hook in hooks.values()]


class Fingerprint:
    """A hashable description of Python values.

    Numbers, strings and containers of them count by value; functions by their code, defaults,
    closures and the globals that they name; modules by the attributes and modes of all within
    them, and by identity unless the problem knows them by name; anything else by identity, and is
    kept alive so that no other object can take its place.

    Attributes:
        pinned: The objects that count by identity.
    """

    def __init__(self) -> None:
        self.pinned: list[Any] = []
        self._known: dict[int, str] = {}

    def of_problem(self, problem: Problem, moving: Set[str] = frozenset()) -> tuple[Any, ...]:
        """Module attributes, modes and hooks, optimizer attributes, and what losses refer to.

        Args:
            problem: The user's objects.
            moving: Labels of numbers of the optimizer that are inputs of programs.
        """
        parts: list[Any] = []
        self._known = {id(module): prefix for prefix, module in problem.modules.items()}
        for prefix, module in problem.modules.items():
            parts.append((prefix, self._children(module, _DEPTH + 1)))
            for name, parameter in module.named_parameters():
                if parameter._backward_hooks:
                    parts.append((prefix + name, self.of(dict(parameter._backward_hooks))))
        keyed = vars(problem.opt).keys() - _OPTIMIZER_PARTS
        own = {
            k: v
            for k, v in vars(problem.opt).items()
            if k in keyed and f"optimizer.{k}" not in moving
        }
        parts.append((type(problem.opt), self.of(own)))
        for loss in (problem.loss, problem.val_loss):
            parts.append(self.of(loss.fn if isinstance(loss, Objective) else loss))
        parts.append(self.of(problem.grad_transform))
        if problem.average is not None:
            parts.append(self.of({k: v for k, v in vars(problem.average).items() if k[0] != "_"}))
            parts.append(type(problem.average))
        parts += [self.of(hook) for hook in step_hooks_of(problem.opt)]
        return tuple(parts)

    def of_code(self, code: Any) -> Any:
        """A function, or a module with the attributes of all its parts."""
        if not isinstance(code, nn.Module):
            return self.of(code)
        return self._children(code, _DEPTH + 1)

    def of(self, value: Any, depth: int = _DEPTH) -> Any:
        """The description of one value."""
        if isinstance(value, _SIMPLE):
            return (type(value).__name__, repr(value))
        if depth and isinstance(value, tuple | list | set | frozenset) and len(value) <= _ITEMS:
            return (type(value).__name__, *(self.of(item, depth - 1) for item in value))
        if depth and isinstance(value, dict) and len(value) <= _ITEMS:
            items = (self.of(pair, depth - 1) for pair in value.items())
            return (type(value).__name__, *items)
        if isinstance(value, functools.partial) and depth:
            given = (value.func, value.args, value.keywords)
            return ("partial", *(self.of(part, depth) for part in given))
        if id(value) in self._known:
            return ("module", self._known[id(value)])
        if depth and isinstance(value, nn.Module):
            return (self._identity(value), self._children(value, depth))
        if isinstance(value, types.MethodType):
            return ("method", self.of(value.__func__, depth), self._owner(value, depth))
        if isinstance(value, types.FunctionType):
            return self._function(value, depth)
        if depth and not isinstance(value, Tensor | nn.Module | type | types.ModuleType):
            plain = getattr(value, "__dict__", None)
            if isinstance(plain, dict) and callable(value):
                return (self._identity(value), self.of(plain, depth - 1))
        return self._identity(value)

    def _children(self, root: nn.Module, depth: int) -> tuple[Any, ...]:
        """Attributes and modes of a module and of all within it."""
        rows = []
        for name, child in root.named_modules():
            own = {k: v for k, v in vars(child).items() if k not in MODULE_PARTS}
            rows.append((name, type(child), self.of(own, depth - 1)))
        return tuple(rows)

    def _owner(self, method: types.MethodType, depth: int) -> Any:
        owner = method.__self__
        if isinstance(owner, nn.Module | torch.optim.Optimizer) or not depth:
            return self._identity(owner)
        return (self._identity(owner), self.of(getattr(owner, "__dict__", {}), depth - 1))

    def _function(self, function: types.FunctionType, depth: int) -> Any:
        code = function.__code__
        if not depth or _is_library(function):
            return self._identity(function)
        cells = []
        for cell in function.__closure__ or ():
            try:
                cells.append(self.of(cell.cell_contents, depth - 1))
            except ValueError:  # not bound yet
                cells.append(None)
        named = [
            (name, self.of(function.__globals__[name], depth - 1))
            for name in code.co_names
            if name in function.__globals__
        ]
        defaults = self.of((function.__defaults__, function.__kwdefaults__), depth - 1)
        return ("function", self._identity(code), tuple(cells), tuple(named), defaults)

    def _identity(self, value: Any) -> Any:
        self.pinned.append(value)
        return ("object", id(value))


def _is_library(function: types.FunctionType) -> bool:
    return (function.__module__ or "").split(".")[0] in ("torch", "unrollc")
