"""Custom ``autograd.Function``s in a captured step keep the derivative that they declare.

The inner gradient uses the function's ``backward``, as in eager PyTorch. Differentiating the
captured graph once more must again use it and not the derivative of the ops inside ``forward``
(a straight-through ``round`` would lose its gradient). So each output is recorded as
``attach(value, carrier)``, where the carrier is the transposed backward applied to ``x - stop(x)``:
zero in value, and with exactly the declared derivative.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import CheckpointFunction

from unrollc.capture.nests import is_continuous
from unrollc.capture.record import Recorder
from unrollc.capture.wrappers import run_checkpointed
from unrollc.errors import CaptureError
from unrollc.step import ATTACH

#: Where `Function.apply` looks up its helpers.
_autograd_function: Any = importlib.import_module("torch.autograd.function")


class _Context:
    """What a function's forward leaves for its backward, with the attributes of autograd's ctx."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def save_for_forward(self, *tensors: Any) -> None:
        pass

    def mark_dirty(self, *tensors: Any) -> None:
        raise CaptureError(
            "a custom autograd.Function changes its input in place (mark_dirty)",
            why="the declared derivative of an in-place function cannot be captured",
            remedy="return a new tensor from forward",
        )

    def mark_non_differentiable(self, *tensors: Any) -> None:
        self.non_differentiable = tuple(id(tensor) for tensor in tensors)

    def set_materialize_grads(self, value: bool) -> None:
        pass


@contextlib.contextmanager
def declared_functions(recorder: Recorder) -> Iterator[None]:
    """While this is open, functions are recorded with their declared derivative.

    Under `torch.func` every ``apply`` (also one that was looked up earlier, as in
    ``ste = STE.apply``) ends in ``custom_function_call``, which is replaced here; functions of the
    older style, without ``setup_context``, are let through to it. A network that an optimizer runs
    stands under no `torch.func`; there ``apply`` is told that it does.
    """
    original = _autograd_function.custom_function_call
    has_setup = _autograd_function._is_setup_context_defined
    transforming = torch._C._are_functorch_transforms_active
    thread = threading.get_ident()

    def call(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls.__module__ == "torch.nn.modules._functions":
            raise CaptureError(
                f"{cls.__name__} is computed and differentiated by hand in PyTorch",
                where=recorder.sources.here(),
                why="it writes into tensors that it makes, and its backward has no derivative",
                remedy="use a module that is made of differentiable ops",
            )
        if cls is CheckpointFunction:  # run_function, preserve_rng_state, *args
            return run_checkpointed(recorder.sources, args[0], *args[2:])
        if _is_torchs(cls):
            return original(cls, *args, **kwargs)
        if not transforming():
            return _recorded_with_derivative(cls, recorder, args)
        return _apply_declared(cls, recorder, args)

    def asked() -> bool:
        if transforming() or not recorder.networks_running or thread != threading.get_ident():
            return transforming()
        caller = sys._getframe(1)
        applied = caller.f_code is Function.apply.__func__.__code__  # type: ignore[attr-defined]
        return applied and not _is_torchs(caller.f_locals["cls"])

    _autograd_function.custom_function_call = call
    _autograd_function._is_setup_context_defined = lambda setup: has_setup(setup) or _OldStyle()
    torch._C._are_functorch_transforms_active = asked
    try:
        yield
    finally:
        _autograd_function.custom_function_call = original
        _autograd_function._is_setup_context_defined = has_setup
        torch._C._are_functorch_transforms_active = transforming


def _is_torchs(cls: Any) -> bool:
    return bool(cls.__module__.startswith("torch.") or issubclass(cls, _Declared))


class _OldStyle:
    """Answers ``Function.apply`` about a function without ``setup_context``.

    ``apply`` asks twice: first whether to bind the arguments to ``forward`` (no: it takes ctx),
    then whether to refuse the function under `torch.func` (no, it is captured here).
    """

    def __init__(self) -> None:
        self._asked = False

    def __bool__(self) -> bool:
        before, self._asked = self._asked, True
        return before


class _Declared(Function):
    """Base of the functions made by `_apply_declared`, so that they are not made again."""


def _recorded_with_derivative(cls: Any, recorder: Recorder, args: tuple[Any, ...]) -> Any:
    """The outputs of a function whose ops are recorded and differentiated later."""
    _refuse_once_differentiable(cls, recorder)
    slots = [index for index, value in enumerate(args) if isinstance(value, Tensor)]
    context = _Context(_needs(args))
    outputs, single = _run_forward(cls, context, list(args))
    if not recorder.stops_gradient():
        with recorder.declared():
            outputs = _attach(cls, context, args, slots, tuple(args[i] for i in slots), outputs)
    return outputs[0] if single else tuple(outputs)


def _refuse_once_differentiable(cls: Any, recorder: Recorder) -> None:
    if hasattr(cls.backward, "__wrapped__"):
        raise CaptureError(
            f"{cls.__name__}.backward is marked once_differentiable",
            where=recorder.sources.here(),
            why="a meta-gradient differentiates the inner gradient, and with it this backward",
            remedy="remove once_differentiable if backward is made of differentiable ops",
        )


def _apply_declared(cls: Any, recorder: Recorder, args: tuple[Any, ...]) -> Any:
    _refuse_once_differentiable(cls, recorder)
    slots = [index for index, value in enumerate(args) if isinstance(value, Tensor)]
    shape: dict[str, Any] = {}

    def declared_forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        context = _Context(_needs(args))
        outputs, single = _run_forward(cls, context, _fill(args, slots, tensors))
        with recorder.declared():
            attached = _attach(cls, context, args, slots, tensors, outputs)
        known = {id(t): ("input", i) for i, t in enumerate(tensors)}
        known |= {id(t): ("output", i) for i, t in enumerate(outputs) if isinstance(t, Tensor)}
        extra: list[Tensor] = []
        context_values = dict(context.__dict__)
        for name, value in context_values.items():
            context_values[name] = _describe(value, known, extra)
        shape.update(context=context_values, outputs=len(attached), single=single)
        return (*attached, *extra)

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs, *output)

    def backward(ctx: Any, *grads: Any) -> Any:
        saved = ctx.saved_tensors
        tensors, outputs = saved[: len(slots)], saved[len(slots) :]
        context = _restore(shape, args, tensors, outputs)
        given = cls.backward(context, *grads[: shape["outputs"]])
        given = given if isinstance(given, tuple) else (given,)
        return tuple(given[index] for index in slots)

    members = {
        "forward": staticmethod(declared_forward),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
    }
    declared = types.new_class(cls.__name__, (_Declared,), exec_body=lambda ns: ns.update(members))
    results = declared.apply(*(args[index] for index in slots))  # type: ignore[attr-defined]
    results = results[: shape["outputs"]]
    return results[0] if shape["single"] else tuple(results)


def _needs(args: tuple[Any, ...]) -> tuple[bool, ...]:
    return tuple(is_continuous(value) for value in args)


def _fill(args: tuple[Any, ...], slots: list[int], tensors: tuple[Tensor, ...]) -> list[Any]:
    filled = list(args)
    for index, tensor in zip(slots, tensors, strict=True):
        filled[index] = tensor
    return filled


def _run_forward(cls: Any, context: _Context, args: list[Any]) -> tuple[tuple[Any, ...], bool]:
    if cls.setup_context is not Function.setup_context:
        output = cls.forward(*args)
        cls.setup_context(context, tuple(args), output)
    else:
        output = cls.forward(context, *args)
    single = not isinstance(output, tuple)
    return ((output,) if single else output), single


def _attach(
    cls: Any,
    context: _Context,
    args: tuple[Any, ...],
    slots: list[int],
    tensors: tuple[Tensor, ...],
    outputs: tuple[Any, ...],
) -> tuple[Any, ...]:
    """The outputs with the declared derivative attached to them."""
    fixed = getattr(context, "non_differentiable", ())
    smooth = [
        index
        for index, value in enumerate(outputs)
        if is_continuous(value) and id(value) not in fixed
    ]
    if not smooth:
        return outputs

    def pull_back(*cotangents: Tensor) -> tuple[Tensor, ...]:
        grads = [torch.zeros_like(v) if isinstance(v, Tensor) else None for v in outputs]
        for index, cotangent in zip(smooth, cotangents, strict=True):
            grads[index] = cotangent
        given = cls.backward(context, *grads)
        given = given if isinstance(given, tuple) else (given,)
        return tuple(given[index] for index in slots if given[index] is not None)

    zeros = [torch.zeros_like(outputs[index]) for index in smooth]
    reached = cls.backward(context, *[torch.zeros_like(v) for v in outputs])
    reached = reached if isinstance(reached, tuple) else (reached,)
    moved = [
        tensor - tensor.detach()
        for index, tensor in zip(slots, tensors, strict=True)
        if reached[index] is not None
    ]
    if not moved:
        return outputs
    push_forward: Any = torch.func.vjp(pull_back, *zeros)[1]
    carriers = push_forward(tuple(moved))
    attached = list(outputs)
    for index, carrier in zip(smooth, carriers, strict=True):
        attached[index] = ATTACH(outputs[index], carrier)
    return tuple(attached)


def _describe(value: Any, known: dict[int, tuple[str, int]], extra: list[Tensor]) -> Any:
    """`value` with its tensors replaced by where to find them again."""
    if isinstance(value, Tensor):
        if id(value) not in known:
            known[id(value)] = ("extra", len(extra))
            extra.append(value)
        return known[id(value)]
    if isinstance(value, tuple | list):
        return ("sequence", [_describe(item, known, extra) for item in value])
    return ("value", value)


def _restore(shape: dict[str, Any], args: Any, inputs: Any, outputs: Any) -> _Context:
    context = _Context(_needs(args))

    def find(described: Any) -> Any:
        kind, content = described
        if kind == "input":
            return inputs[content]
        if kind == "output":
            return outputs[content]
        if kind == "extra":
            return outputs[shape["outputs"] + content]
        if kind == "sequence":
            return tuple(find(item) for item in content)
        return content

    for name, described in shape["context"].items():
        setattr(context, name, find(described))
    return context
