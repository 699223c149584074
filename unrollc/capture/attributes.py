"""Python attributes that a module's forward sets: carried from step to step, then put back.

A forward may count its calls, fill a cache or decide something once, in attributes of modules or
in lists, dictionaries, sets, deques and plain objects that stand there. Each step is therefore
captured with the attributes that the step before left, as in ordinary training, and stands for
another only where these are the same. What is not carried are tensors: one that was computed in an
earlier step is a constant to no step graph, so code that reads it from an attribute is refused.
"""

from __future__ import annotations

import contextlib
import io
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unrollc.capture.fingerprint import MODULE_PARTS, Fingerprint, has_attributes, is_traced
from unrollc.capture.nests import map_tensors, tensors_in
from unrollc.capture.problem import Problem
from unrollc.capture.source import SourceFinder
from unrollc.capture.trees import attributes_of, set_attribute
from unrollc.errors import CaptureError

#: What a forward may not add to or take away from, and what its entries are called.
_REGISTERED = {"_parameters": "parameter", "_buffers": "buffer", "_modules": "submodule"}

#: Containers longer than this are data: only their length is looked at.
_LONGEST = 10_000


@dataclass(frozen=True, eq=False)
class Attributes:
    """The attributes of all modules of a problem at one moment.

    Attributes:
        held: For each module its label, itself, and a copy of its ``__dict__``.
        containers: The containers and plain objects in them, with copies of their contents.
        description: Equal for attributes under which a forward runs the same code.
        stale: Tensors of the step before, by id, and the attributes that hold them.
        pinned: What the description counts by identity.
    """

    held: tuple[tuple[str, nn.Module, dict[str, Any]], ...]
    containers: tuple[tuple[Any, Any], ...]
    description: Any
    stale: dict[int, str]
    pinned: list[Any]

    def install(self) -> None:
        """Give the modules these attributes."""
        for _, module, attributes in self.held:
            vars(module).clear()
            vars(module).update(attributes)
        for container, content in self.containers:
            _refill(container, content)

    def registered(self) -> dict[str, dict[str, set[str]]]:
        """Names of parameters, buffers and submodules by module and kind."""
        content = {id(container): copy for container, copy in self.containers}
        return {
            label: {part: set(content[id(attributes[part])]) for part in _REGISTERED}
            for label, _, attributes in self.held
        }


def read_attributes(problem: Problem) -> Attributes:
    """The attributes of all modules as they are now."""
    held: list[tuple[str, nn.Module, dict[str, Any]]] = []
    rows: list[Any] = []
    containers: dict[int, tuple[Any, Any, str]] = {}
    stale: dict[int, str] = {}
    fingerprint = Fingerprint()
    for prefix, root in problem.modules.items():
        for name, module in root.named_modules():
            label = f"{prefix}{name}"
            if isinstance(module, torch.jit.ScriptModule):
                continue  # its attributes live in its compiled code
            own = dict(vars(module))
            held.append((label, module, own))
            for key, value in own.items():
                place = f"{label}.{key}".removeprefix(".")
                _copy_containers(value, containers, place)
                if key not in MODULE_PARTS:
                    _note_traced(value, place, stale)
                    rows.append((place, fingerprint.of(value)))
    parts = {id(own.get(part)) for _, _, own in held for part in MODULE_PARTS}
    for inside, content, place in containers.values():
        if id(inside) not in parts and len(content) <= _LONGEST:
            _note_traced(content, place, stale)
            items = content.items() if isinstance(content, dict) else content
            rows.append((place, tuple(fingerprint.of(item) for item in items)))
    return Attributes(
        held=tuple(held),
        containers=tuple((inside, content) for inside, content, _ in containers.values()),
        description=tuple(rows),
        stale=stale,
        pinned=fingerprint.pinned,
    )


def _copy_containers(value: Any, found: dict[int, tuple[Any, Any, str]], place: str) -> None:
    """Add the containers and plain objects of a value, with copies of their contents.

    Raises:
        CaptureError: For an iterator, whose position cannot be read or put back.
    """
    if id(value) in found:
        return
    if isinstance(value, Iterator) and not isinstance(value, io.IOBase):
        raise CaptureError(
            f"the attribute {place} is an iterator ({type(value).__name__})",
            why="its position cannot be read or put back, so the steps of the loop cannot be told "
            "apart",
            remedy="keep a list and a position in it",
        )
    if isinstance(value, tuple):
        content: Any = value
    elif isinstance(value, dict | list | set | deque):
        content = value.copy()
    elif has_attributes(value):
        content = attributes_of(value)
    else:
        return
    if not isinstance(value, tuple):
        found[id(value)] = (value, content, place)
    for item in content.values() if isinstance(content, dict) else content:
        _copy_containers(item, found, place)


def _note_traced(value: Any, place: str, stale: dict[int, str]) -> None:
    for tensor in tensors_in(value):
        if is_traced(tensor):
            stale[id(tensor)] = place


@dataclass
class Carried:
    """The attributes at both ends of a capture.

    Attributes:
        before: What it started from.
        after: What it left, once it has ended.
    """

    before: Attributes
    after: Attributes = field(init=False)


@contextlib.contextmanager
def attributes_carried(problem: Problem, start: Attributes) -> Iterator[Carried]:
    """Run with the attributes `start`, note what is left, and put the user's own back.

    Raises:
        CaptureError: If a parameter, buffer or submodule was registered or removed.
    """
    own = read_attributes(problem)
    carried = Carried(start)
    carried.before.install()
    try:
        yield carried
        carried.after = read_attributes(problem)
        _check_registered(own, carried.after)
    finally:
        own.install()


def _check_registered(before: Attributes, after: Attributes) -> None:
    known = before.registered()
    for label, parts in after.registered().items():
        for part, names in parts.items():
            changed = names ^ known.get(label, parts)[part]
            if changed:
                raise CaptureError(
                    f"{label or 'the model'} registers or removes the {_REGISTERED[part]} "
                    f"{min(changed)!r} while it runs",
                    why="what the inner loop carries from step to step is fixed before it starts",
                    remedy="register it in __init__, or run the model once before compile",
                )


class Fresh(TorchFunctionMode):
    """Refuses tensors that an earlier step left in attributes.

    Args:
        stale: These tensors by id, with the names of the attributes.
        sources: Finds the user's line.
    """

    def __init__(self, stale: Mapping[int, str], sources: SourceFinder) -> None:
        super().__init__()
        self._stale, self._sources = stale, sources

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._stale:
            map_tensors(self._check, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _check(self, tensor: Tensor) -> None:
        if id(tensor) in self._stale:
            raise CaptureError(
                f"the attribute {self._stale[id(tensor)]} carries a tensor from one inner step to "
                "the next",
                where=self._sources.here(),
                why="only parameters, optimizer state and buffers are carried; a plain attribute "
                "would be frozen at its value of the first step",
                remedy="register it with register_buffer, or set it to None before each forward",
            )


def _refill(inside: Any, content: Any) -> None:
    if not isinstance(inside, dict | list | set | deque):
        for name in set(attributes_of(inside)) - set(content):
            object.__delattr__(inside, name)
        for name, item in content.items():
            set_attribute(inside, name, item)
        return
    inside.clear()
    if isinstance(inside, list | deque):
        inside.extend(content)
    else:
        inside.update(content)
