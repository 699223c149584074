"""Networks that an optimizer runs in its step: learned optimizers.

Their parameters are meta-parameters under names of their own, and their buffers are state. They
are looked for where optimizers keep them: in attributes, in param groups, and in the closures and
global variables that the methods of the optimizer's class read.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import types
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.functional_tensor import FunctionalTensor

from unrollc.capture.nests import tensors_in
from unrollc.capture.record import Recorder
from unrollc.errors import CaptureError

#: Attributes of every optimizer that are read elsewhere; `defaults` repeats the param groups.
_OWN = ("param_groups", "state", "defaults")

#: What a module keeps its tensors in; they are swapped as a whole and put back.
_PARTS = ("_parameters", "_buffers", "_modules")


def networks_of(opt: torch.optim.Optimizer, prefix: str) -> dict[str, nn.Module]:
    """The modules that an optimizer holds, by the prefix of their labels.

    Args:
        opt: The optimizer; its attributes, param groups and methods are looked at, one level of
            lists, tuples and dictionaries deep.
        prefix: What the labels of attributes and variables begin with: ``opt`` makes
            ``opt.net.lstm.weight_ih`` of ``self.net``.
    """
    found: dict[str, nn.Module] = {}
    named = {key: value for key, value in vars(opt).items() if key not in _OWN}
    for key, value in named.items():
        found |= _modules_in(value, f"{prefix}.{key}")
    for index, group in enumerate(opt.param_groups):
        for key, value in group.items():
            if key != "params":
                found |= _modules_in(value, f'param_groups[{index}]["{key}"]')
    for key, value in variables_of(type(opt)).items():
        if key not in named:
            found |= _modules_in(value, f"{prefix}.{key}")
    return {f"{label}.": module for label, module in found.items()}


#: Types of most of what an optimizer holds; telling them apart is quicker than asking for modules.
_PLAIN = frozenset({bool, float, int, str, type(None), Tensor})


def _modules_in(value: Any, label: str) -> dict[str, nn.Module]:
    if type(value) in _PLAIN:
        return {}
    if isinstance(value, nn.Module):
        return {label: value}
    if isinstance(value, list | tuple):
        items: Any = enumerate(value)
    elif isinstance(value, dict):
        items = ((key, item) for key, item in value.items() if isinstance(key, str | int))
    else:
        return {}
    return {f"{label}.{key}": item for key, item in items if isinstance(item, nn.Module)}


def variables_of(kind: type) -> dict[str, Any]:
    """The closure and global variables that the methods of an optimizer's class read."""
    found: dict[str, Any] = {}
    for base in kind.__mro__:
        if base.__module__.startswith("torch.") or base is object:
            continue
        for member in vars(base).values():
            function = inspect.unwrap(getattr(member, "__func__", member))
            if isinstance(function, types.FunctionType):
                cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
                for name, cell in cells:
                    with contextlib.suppress(ValueError):  # not bound yet
                        found.setdefault(name, cell.cell_contents)
                for name in _globals_read(function.__code__):
                    if name in function.__globals__:
                        found.setdefault(name, function.__globals__[name])
    return found


@functools.lru_cache(maxsize=256)
def _globals_read(code: types.CodeType) -> tuple[str, ...]:
    """Global names that a function's code looks up, the functions nested in it included."""
    names = [i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += _globals_read(constant)
    return tuple(dict.fromkeys(names))


@contextlib.contextmanager
def running(
    networks: Mapping[str, nn.Module], recorder: Recorder, tensors: Mapping[str, Tensor]
) -> Iterator[None]:
    """While this is open, the forwards of `networks` are recorded as the user's own.

    A step runs under ``no_grad`` by habit, and `detach` there means "do not track"; both are
    looked through. Inside the forward of a network they are what they are in a model: its
    author's stop-gradient. So gradients are on when a forward begins.

    Args:
        networks: By prefix of their labels.
        recorder: What the step is recorded by.
        tensors: The traced parameters and buffers.

    Raises:
        CaptureError: If a network keeps a tensor in an attribute, where no step hands it on.
    """
    modules = {id(m): m for network in networks.values() for m in network.modules()}
    before = [(vars(m), vars(m).get("forward")) for m in modules.values()]
    for module in modules.values():
        vars(module)["forward"] = _recorded(module.forward, recorder)
    try:
        yield
    finally:
        for attributes, forward in before:
            attributes["forward"] = forward
            if forward is None:
                del attributes["forward"]
    swapped = {id(tensor) for tensor in tensors.values()}  # an LSTM has a list of its weights
    for prefix, network in networks.items():
        for name, module in network.named_modules():
            _refuse_kept(f"{prefix}{name}".rstrip("."), module, swapped)


def _recorded(forward: Any, recorder: Recorder) -> Any:
    @functools.wraps(forward)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        within = recorder.networks_running > 0
        recorder.networks_running += 1
        try:
            with contextlib.nullcontext() if within else torch.enable_grad():
                return forward(*args, **kwargs)
        finally:
            recorder.networks_running -= 1

    return recorded


def _refuse_kept(label: str, module: nn.Module, swapped: Collection[int]) -> None:
    """Refuse a traced tensor that a step leaves behind in an attribute of a network's."""
    for key, value in vars(module).items():
        found = [] if key in _PARTS else tensors_in(value)
        if any(isinstance(t, FunctionalTensor) and id(t) not in swapped for t in found):
            raise CaptureError(
                f"{label} keeps a tensor of the step in its attribute {key!r}",
                why="state that one step hands to the next belongs into optimizer.state or into a "
                "buffer; every captured step would begin with the attribute as it is now",
                remedy=f'keep it in self.state[parameter] or self.state["{key}"] of the optimizer',
            )
