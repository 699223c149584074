"""Functionalization: in-place ops reach the recorder as pure ones."""

from __future__ import annotations

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
        if not func._schema.is_mutable or not args or not isinstance(args[0], Tensor):
            with recorder:
                result = super().__torch_dispatch__(func, types, args, kwargs)
            if func is aten.detach.default and recorder.in_user_code():
                self._detached[id(result)] = (result, args[0])
            return result
        target = args[0]
        source = (
            self._detached.get(id(target), (None, None))[1] if recorder.in_user_code() else None
        )
        stopped = recorder.stops_gradient()
        before = recorder.node_of(target) if stopped else None
        source_before = None if source is None else recorder.node_of(source)
        with recorder:
            result = super().__torch_dispatch__(func, types, args, kwargs)
            if stopped:
                keep_history(recorder, target, before)
            if source is not None:
                keep_source(recorder, source, source_before)
        return result

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


def from_functional(tensor: FunctionalTensor) -> Tensor:
    """The fake tensor that a functional one stands for at the moment."""
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
