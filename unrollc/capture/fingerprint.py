"""What captured code depends on besides tensors, as a key of the program cache."""

from __future__ import annotations

import argparse
import functools
import types
from collections import deque
from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.optim import optimizer
from torch.optim.lr_scheduler import LRScheduler

from unrollc.capture.problem import Objective, Problem
from unrollc.capture.trees import attributes_of, is_plain_object

_CONTAINERS = (tuple, list, set, frozenset, deque, dict)
_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_PLAIN = frozenset({bool, int, float, str, type(None)})

#: Containers and nested functions are followed to this depth, and up to this many items.
_DEPTH = 4
_ITEMS = 64

_LIBRARIES = ("torch", "unrollc", "builtins")

#: Attributes of a module that are keyed elsewhere or that PyTorch itself maintains.
MODULE_PARTS = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
_OPTIMIZER_PARTS = {"state", "param_groups", "step"}


def step_hooks_of(opt: torch.optim.Optimizer) -> list[Any]:
    """The hooks that run around an optimizer's step, those of all optimizers included."""
    own = [getattr(opt, f"_optimizer_step_{when}_hooks", {}) for when in ("pre", "post")]
    shared = (optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks)
    return [hook for hooks in (*own, *shared) for hook in hooks.values()]


def is_traced(tensor: Tensor) -> bool:
    """Whether a tensor stands for a value of the step that is being captured."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return wrapped or isinstance(tensor, FunctionalTensor | FakeTensor)


def has_attributes(value: Any) -> bool:
    """Whether an object is described by its attributes.

    Optimizers and schedulers are not: an outer loop steps them. Nor are compiled programs.
    """
    kind = type(value)
    if isinstance(value, torch.optim.Optimizer | LRScheduler) or _is_library(kind):
        return False
    if is_plain_object(value) or isinstance(value, argparse.Namespace | types.SimpleNamespace):
        return True
    other = Tensor | nn.Module | type | types.ModuleType | types.FunctionType
    return (
        callable(value)
        and isinstance(getattr(value, "__dict__", None), dict)
        and not isinstance(value, other)
    )


class Fingerprint:
    """A hashable description of Python values.

    Numbers, strings and containers of them count by value, long containers by identity and length;
    functions by their code, defaults, closures and the globals that they name; modules by the
    attributes and modes of all within them, and by identity unless the problem knows them by name;
    plain objects by identity and attributes; traced tensors by shape; anything else by identity,
    and is kept alive so that no other object can take its place.

    Args:
        known: Modules that count by being there, whatever their attributes.

    Attributes:
        pinned: The objects that count by identity.
    """

    def __init__(self, known: Iterable[nn.Module] = ()) -> None:
        self.pinned: list[Any] = []
        self._known = {id(module): f"module {index}" for index, module in enumerate(known)}
        self._objects: dict[tuple[int, int], Any] = {}

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
        moved = {label.removeprefix("optimizer.") for label in moving}
        own = {
            key: value
            for key, value in vars(problem.opt).items()
            if key not in _OPTIMIZER_PARTS | moved
        }
        parts.append((type(problem.opt), self.of(own)))
        parts += [self.of(value) for value in class_values(type(problem.opt))]
        for group in problem.opt.param_groups:
            functions = {k: v for k, v in group.items() if callable(v) and k != "params"}
            parts.append(self.of({k: v for k, v in functions.items() if not _is_tensor(v)}))
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
        kind = type(value)
        if kind in _PLAIN:  # most values are: no other check takes as long as this one
            return (kind.__name__, repr(value))
        if isinstance(value, Tensor) and is_traced(value):
            return ("traced", tuple(value.shape), value.dtype, value.device)
        if isinstance(value, _SIMPLE):
            return (type(value).__name__, repr(value))
        if isinstance(value, _CONTAINERS):
            if not depth or len(value) > _ITEMS:
                return (*self._identity(value), len(value))
            if isinstance(value, dict):
                return (type(value).__name__, *self._entries(value, depth - 1))
            return (type(value).__name__, *(self.of(item, depth - 1) for item in value))
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
        if depth and has_attributes(value):
            return self._object(value, depth)
        if isinstance(value, numpy.ndarray) and value.nbytes <= _ITEMS:
            return (self._identity(value), value.tobytes())
        return self._identity(value)

    def _object(self, value: Any, depth: int) -> Any:
        """An object, described once: every layer of a network may hold the same configuration."""
        key = (id(value), depth)
        if key not in self._objects:
            self._objects[key] = self._identity(value)  # in case that it leads back to itself
            rows = self._entries(attributes_of(value), depth - 1)
            self._objects[key] = (self._identity(value), *rows)
        return self._objects[key]

    def _entries(self, entries: Mapping[Any, Any], depth: int) -> list[Any]:
        return [(self.of(key, depth), self.of(item, depth)) for key, item in entries.items()]

    def _children(self, root: nn.Module, depth: int) -> tuple[Any, ...]:
        """Attributes and modes of a module and of all within it."""
        rows = []
        for name, child in root.named_modules():
            own = {k: v for k, v in vars(child).items() if k not in MODULE_PARTS}
            rows.append((name, type(child), self.of(own, max(depth - 1, 1))))
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
        given = (function.__defaults__, function.__kwdefaults__)
        defaults = tuple(self.of(part, depth - 1) for part in given)
        return ("function", self._identity(code), tuple(cells), tuple(named), defaults)

    def _identity(self, value: Any) -> Any:
        self.pinned.append(value)
        return ("object", id(value))


def class_values(kind: type) -> list[Any]:
    """What the classes of an optimizer, PyTorch's own left out, hold besides functions."""
    own = [base for base in kind.__mro__ if base.__module__.split(".")[0] not in _LIBRARIES]
    attributes = [item for base in own for item in vars(base).items()]
    return [value for name, value in attributes if name[:2] != "__" and not callable(value)]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor | nn.Module)


def _is_library(code: types.FunctionType | type) -> bool:
    return (code.__module__ or "").split(".")[0] in _LIBRARIES
