"""Tensors from outside the inner loop are read, never written to."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.overrides import TorchFunctionMode

from unrollc.capture.record import Recorder
from unrollc.errors import CaptureError

#: ``x += y`` and the like, by the name of the method.
_AUGMENTED = frozenset(
    f"__i{op}__" for op in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
)


class NoOutsideWrites(TorchFunctionMode):
    """Refuses in-place ops on tensors that user code brings in from outside.

    Written to while a step is captured, such a tensor would change once, and keep its value at
    every inner step.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _writes(getattr(func, "__name__", "")) and args:
            first = args[0] if isinstance(args[0], list | tuple) else args[:1]
            if any(_is_outside(item) for item in first):
                raise CaptureError(
                    "the code writes to a tensor from outside the inner loop",
                    where=self._recorder._line(),
                    why="the step is captured once: the tensor would not change at every inner "
                    "step",
                    remedy="keep what changes in a buffer of an nn.Module, or in optimizer.state",
                )
        return func(*args, **kwargs)


def _writes(name: str) -> bool:
    if name in _AUGMENTED or name == "__setitem__":
        return True
    return name.endswith("_") and not name.endswith("__") and name != "requires_grad_"


def _is_outside(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, FunctionalTensor | FakeTensor)
