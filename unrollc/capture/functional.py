"""Functionalization under the recorder: what user code changes in place arrives as pure ops.

PyTorch's `FunctionalTensorMode` does it. Most ops need none of its bookkeeping: a pure op is
handed on, and one that writes into its first operand is recorded in its pure form, whose result
then replaces the operand's value. Views are left to PyTorch.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

from unrollc.capture.nests import map_tensors

if TYPE_CHECKING:
    from unrollc.capture.record import Recorder

aten = torch.ops.aten


class RecordedFunctionalization(FunctionalTensorMode):
    """Functionalization whose pure ops go to the recorder."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._linalg_check_errors.default:
            return None  # reads an error code; there is none at capture
        recorder = self._recorder
        functional = any(issubclass(kind, FunctionalTensor) for kind in types)
        if functional and is_pure(func):
            return map_tensors(self._wrapped, self._record(func, types, args, kwargs))
        if func._schema.is_mutable and args and recorder.stops_gradient():
            before = recorder.node_of(args[0])
            with recorder:
                result = super().__torch_dispatch__(func, types, args, kwargs)
                recorder.keep_history(args[0], before)
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

    def _record(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        with self._recorder:  # views of what was written to are computed anew
            args, kwargs = map_tensors(_unwrapped, (args, kwargs or {}))
        return self._recorder.__torch_dispatch__(func, types, args, kwargs)

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
