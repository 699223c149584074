"""Functionalization: in-place ops reach the recorder as pure ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

from unrollc.capture.nests import map_tensors, tensors_in
from unrollc.errors import CaptureError

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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._linalg_check_errors.default:
            return None  # reads an error code; there is none at capture
        recorder = self._recorder
        if func not in _READS and func not in FunctionalTensor.metadata_fns:
            args, kwargs = self._functional(func, args, kwargs or {})
        if func._schema.is_mutable and args and recorder.stops_gradient():
            before = recorder.node_of(args[0])
            with recorder:
                result = super().__torch_dispatch__(func, types, args, kwargs)
                recorder.keep_history(args[0], before)
            return result
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
        if func._schema.is_mutable and not isinstance(args[0], FakeTensor):
            raise CaptureError(
                "the code changes a tensor from outside in place",
                where=self._recorder._line(),
                why="it is neither a parameter nor a buffer of the model, so no step would hand "
                "its new value to the next",
                remedy="make it a buffer of the model (register_buffer)",
            )
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
