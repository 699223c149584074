"""Functionalization under the recorder: what user code changes in place arrives as pure ops.

PyTorch's `FunctionalTensorMode` does it. Most ops need none of its bookkeeping: a pure op is
handed on, and one that writes into its first operand is recorded in its pure form, whose result
then replaces the operand's value. Views are left to PyTorch.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

from unrollc.capture.nests import map_tensors, tensors_in
from unrollc.step import ATTACH

if TYPE_CHECKING:
    from unrollc.capture.record import Recorder

aten = torch.ops.aten

#: Ops on tensors from outside whose argument must stay what it is: its value is read.
_READS = (aten._local_scalar_dense.default, aten.lift_fresh.default, aten.lift_fresh_copy.default)


class RecordedFunctionalization(FunctionalTensorMode):
    """Functionalization whose pure ops go to the recorder."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder
        self._outside: dict[int, Tensor] = {}
        self._detached: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._linalg_check_errors.default:
            return None  # reads an error code; there is none at capture
        recorder = self._recorder
        if func not in _READS and func not in FunctionalTensor.metadata_fns:
            args, kwargs = self._functional(func, args, kwargs or {})
        source = self._sharing(func, args)
        if source is None:
            result = self._dispatched(func, types, args, kwargs)
        else:
            before = recorder.node_of(source)
            result = self._dispatched(func, types, args, kwargs)
            keep_source(recorder, source, before)
        if func is aten.detach.default and recorder.in_user_code():
            self._detached[id(result)] = (result, args[0])
        return result

    def _sharing(self, func: Any, args: Any) -> Tensor | None:
        """What shares its values with the target of a write by ``x.detach()`` in user code."""
        if not func._schema.is_mutable or not args or not self._recorder.in_user_code():
            return None
        return self._detached.get(id(args[0]), (None, None))[1]

    def _dispatched(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        recorder = self._recorder
        tensors = tensors_in((args, kwargs))
        functional = any(isinstance(tensor, FunctionalTensor) for tensor in tensors)
        if functional and is_pure(func):
            return map_tensors(self._wrapped, self._record(func, types, args, kwargs))
        if func._schema.is_mutable and args and recorder.stops_gradient():
            before = recorder.node_of(args[0])
            with recorder:
                result = super().__torch_dispatch__(func, types, args, kwargs)
                keep_history(recorder, args[0], before)
            return result
        if functional and (pure := _pure_write(func, args)) is not None:
            target: Any = args[0].elem
            result = self._record(pure, types, args, kwargs)
            with recorder:  # what the target is a view of is computed anew
                torch._functionalize_replace(target, result)
                torch._functionalize_commit_update(target)
                torch._functionalize_sync(target)
            return args[0]
        with recorder:
            return super().__torch_dispatch__(func, types, args, kwargs)

    def _functional(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of an op that meets tensors from outside alone, such as a mask.

        PyTorch functionalizes an op only where an argument takes part in it, and what is computed
        from these tensors may be changed in place later.
        """
        tensors = tensors_in((args, kwargs))
        if not tensors or any(isinstance(tensor, FunctionalTensor) for tensor in tensors):
            return args, kwargs
        if func._schema.is_mutable:
            return args, kwargs  # `assemble` refuses it where its value is used
        return map_tensors(self._as_functional, (args, kwargs))  # type: ignore[no-any-return]

    def _as_functional(self, tensor: Tensor) -> Tensor:
        known = self._recorder._known(tensor)
        if id(known) not in self._outside:
            with self:
                self._outside[id(known)] = FunctionalTensor.to_functional(known)
        return self._outside[id(known)]

    def _record(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        with self._recorder:  # views of what was written to are computed anew
            args, kwargs = map_tensors(_unwrapped, (args, kwargs or {}))
        return self._recorder.record(func, types, args, kwargs)

    def _wrapped(self, tensor: Tensor) -> FunctionalTensor:
        return FunctionalTensor(torch._to_functional_tensor(tensor), self)


@functools.cache
def is_pure(func: Any) -> bool:
    """Whether an op neither writes nor aliases nor falls apart into other ops."""
    if not isinstance(func, torch._ops.OpOverload) or func.namespace != "aten":
        return False
    schema = func._schema
    aliases = any(a.alias_info for a in (*schema.arguments, *schema.returns))
    tensors = all(str(a.type) == "Tensor" for a in schema.returns)
    return tensors and not schema.is_mutable and not aliases and not func._can_decompose()


@functools.cache
def pure_form(func: Any) -> Any:
    """``mul`` for ``mul_``; None for an op that writes elsewhere than into its first operand."""
    name = func._schema.name.split("::")[-1]
    packet = getattr(aten, name[:-1], None) if name.endswith("_") else None
    if packet is None:
        return None
    wanted = _signature(func)
    overloads = (getattr(packet, overload) for overload in packet.overloads())
    return next((pure for pure in overloads if _signature(pure) == wanted), None)


def _signature(func: Any) -> list[tuple[str, str]]:
    """Names and types of an op's operands (`pow_.Scalar` is the in-place `pow.Tensor_Scalar`)."""
    return [(argument.name, str(argument.type)) for argument in func._schema.arguments]


def _pure_write(func: Any, args: Any) -> Any:
    """The pure form of an op that writes into its first operand and no other, if it has one."""
    if not func._schema.is_mutable or torch.Tag.inplace_view in func.tags:
        return None
    if not args or not isinstance(args[0], FunctionalTensor):
        return None
    pure = pure_form(func)
    return pure if pure is not None and is_pure(pure) else None


def _unwrapped(tensor: Tensor) -> Tensor:
    return from_functional(tensor) if isinstance(tensor, FunctionalTensor) else tensor


def from_functional(tensor: FunctionalTensor) -> Tensor:
    """The fake tensor that a functional one stands for, all writes to it applied."""
    torch._sync(tensor)  # type: ignore[attr-defined, no-untyped-call]
    return torch._from_functional_tensor(tensor.elem)


def keep_history(recorder: Recorder, target: Tensor, before: fx.Node | None) -> None:
    """After an in-place op under ``no_grad``: the new value has the old one's derivative.

    Autograd does not see the op, so the tensor keeps its history.
    """
    after = recorder.node_of(target)
    if before is None or after is None or after is before or after not in recorder._stopped:
        return
    source = recorder._line()
    history = recorder.after_stop(before)
    kept = recorder.graph.call_function(ATTACH, (after, history))
    kept.meta.update(phase=recorder.phase, source=source, val=after.meta["val"])
    recorder._stopped[after] = kept


def keep_source(recorder: Recorder, source: Tensor, before: fx.Node | None) -> None:
    """After an in-place op on ``source.detach()``, whose values `source` shares.

    Here too autograd sees nothing: the tensor has the new value and its old history.
    """
    after = recorder.node_of(source)
    if before is None or after is None or after is before:
        return
    kept = recorder.graph.call_function(ATTACH, (after, recorder.after_stop(before)))
    kept.meta.update(phase=recorder.phase, source=recorder._line(), val=after.meta["val"])
    while torch._C._functorch.is_functorch_wrapped_tensor(source):
        source = torch._C._functorch.get_unwrapped(source)
    fake = from_functional(source) if isinstance(source, FunctionalTensor) else source
    recorder._nodes[id(fake)] = kept
