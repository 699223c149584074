"""Numbers that an optimizer takes out of tensors, kept as tensors.

Optimizers read hyperparameters and state in places where PyTorch or Python wants a number, which
cuts their gradient. Where the value can go on as a 0-dim tensor without any change to the
arithmetic, it does.
"""

from __future__ import annotations

import dis
import pathlib
import sys
import types
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.overrides import TorchFunctionMode

from unrollc.capture.nests import tensors_in
from unrollc.capture.record import Recorder
from unrollc.errors import CaptureError

_GRADIENT: Any = vars(torch._C.TensorBase)["grad"].__get__
_SET_DATA: Any = vars(torch._C.TensorBase)["data"].__set__

#: Where the optimizers of PyTorch live.
_OPTIMIZERS = str(pathlib.Path(torch.optim.__file__).parent)
_OURS = str(pathlib.Path(__file__).parent)


class ScalarSlots(TorchFunctionMode):
    """Makes the places where arithmetic wants a number transparent to tensors.

    ``p.add_(g, alpha=lr)`` reads the number out of a tensor `lr` and cuts its gradient; here it
    becomes ``p.add_(g * lr)``, and ``full_like(g, lr)`` an expanded `lr`. Step counters and data
    read by ``.item()`` go on as 0-dim float64 tensors, which round as Python numbers do, so that
    one graph serves every step and every run. So does everything that `torch.optim` itself reads:
    its optimizers take numbers for speed alone (`_get_value` is the identity under
    ``torch.compile``). Where other code reads a hyperparameter, a number is what it gets, and the
    lost gradient is reported.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        name = name if name.startswith("__") else name.rstrip("_")
        if name == "__get__" and func == _GRADIENT:
            self._check_gradient(args[0])
        if name == "__set__" and func == _SET_DATA:
            self._put_data(*args)
            return None
        if name == "item" and self._goes_on(args[0]):
            return args[0].reshape(()).to(torch.float64, copy=True)
        if name == "__bool__":
            asked = args[0] if args[0].dtype is torch.bool else args[0] != 0
            return bool(torch.ops.aten._local_scalar_dense.default(asked))
        if func is torch.autograd.grad and not _is_tracked(args[0] if args else kwargs["outputs"]):
            raise CaptureError(
                "the optimizer differentiates the gradients it is given",
                where=self._recorder._line(),
                why="its step calls torch.autograd.grad on .grad (a Hessian product); captured "
                "gradients are values without a graph",
                remedy="use an optimizer whose step takes one gradient",
            )
        if name == "data_ptr":
            return _address(args[0])
        if name in ("__float__", "__int__", "__index__"):
            number = torch.ops.aten._local_scalar_dense.default(args[0])
            return float(number) if name == "__float__" else int(number)
        if name in _FILLS and isinstance(_fill_value(name, args, kwargs), Tensor):
            return _filled(func, name, args, kwargs)
        if name == "__setitem__" and _is_masked_fill(*args):
            target, mask, value = args
            return target.copy_(torch.where(mask, value, target))
        rewrite = _SLOTS.get(name)
        if rewrite is not None and any(isinstance(kwargs.get(s), Tensor) for s in _SLOT_NAMES):
            in_place = getattr(func, "__name__", "").endswith("_")
            result = rewrite(*args, **kwargs)
            if in_place:
                return args[0].copy_(result)
            if kwargs.get("out") is not None:
                return kwargs["out"].copy_(result)
            return result
        if name == "_foreach_lerp" and isinstance(_weight(args, kwargs), Tensor):
            args = (*args[:2], [_weight(args, kwargs).to(each.dtype) for each in args[0]])
            kwargs = {}
        if name == "lerp":
            args, kwargs = _same_dtype_weight(args, kwargs)
        if name in ("clamp", "clip"):
            args, kwargs = _same_kind_of_bounds(args, kwargs)
        return func(*args, **kwargs)

    def _check_gradient(self, parameter: Tensor) -> None:
        """Refuse ``.grad`` of the user's own parameter: what it holds is from outside the loop."""
        label = self._recorder.fast.get(id(parameter))
        if label is not None:
            raise CaptureError(
                f"the code reads the gradient of {label} behind the model's back",
                where=self._recorder._line(),
                why="a reference from outside would see a gradient of earlier training",
                remedy="reach the parameter through optimizer.param_groups",
            )

    def _put_data(self, target: Tensor, value: Tensor) -> None:
        """``p.data = value``: `target` has the memory of `value` from here on, and what shared
        its own memory before keeps that. PyTorch's setter does not reach inside traced tensors.
        """
        if not isinstance(target, FunctionalTensor):
            raise CaptureError(
                "the code gives new data to a tensor from outside",
                where=self._recorder._line(),
                why="a reference from outside is the tensor of earlier training",
                remedy="reach the parameter through optimizer.param_groups",
            )
        if (target.shape, target.dtype) != (value.shape, value.dtype):
            raise CaptureError(
                f"the optimizer gives a tensor of shape {list(target.shape)} and {target.dtype} "
                f"data of shape {list(value.shape)} and {value.dtype}",
                where=self._recorder._line(),
                why="what the inner loop carries from step to step has one shape and dtype",
                remedy="give it data of the same shape and dtype",
            )
        traced = isinstance(value, FunctionalTensor)
        own: Any = value.detach() if traced else value.clone()
        target.elem = own.elem

    def _goes_on(self, tensor: Tensor) -> bool:
        """Whether the value that ``.item()`` reads may stay a tensor."""
        if _caller().co_name in ("__bool__", "__float__", "__int__", "__index__"):
            return False  # asked by bool(tensor) and the like, which need a number
        return tensor.dtype is not torch.bool and stays_tensor(self._recorder, tensor)


def stays_tensor(recorder: Recorder, tensor: Tensor) -> bool:
    """Whether a number that is read from a tensor in an optimizer goes on as a tensor.

    It does where its value is not known, or where no hyperparameter had a part in it: a step
    counter. `torch.optim` keeps hyperparameters too.
    """
    node = recorder.node_of(tensor)
    if node is None or _caller().co_filename.startswith(_OPTIMIZERS):
        return node is not None
    return not recorder.is_known(tensor) or not _tuned(node)


def _is_tracked(outputs: Any) -> bool:
    """Whether autograd has a graph for all of these."""
    return all(tensor.requires_grad for tensor in tensors_in(outputs))


def _address(tensor: Tensor) -> int:
    """Stands for ``data_ptr()``: equal for two traced tensors where their storage begins alike."""
    traced = tensor.elem if isinstance(tensor, FunctionalTensor) else tensor
    offset = int(traced.storage_offset()) * traced.element_size()
    return traced.untyped_storage()._cdata + offset  # type: ignore[no-any-return]


def called_by_operator() -> bool:
    """Whether an operator (``x += y``), not a method, called into capture."""
    frame = _calling()
    return dis.opname[frame.f_code.co_code[frame.f_lasti]] == "BINARY_OP"


def _caller() -> types.CodeType:
    return _calling().f_code


def _calling() -> types.FrameType:
    """The frame that called into capture."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    return frame


def _tuned(node: torch.fx.Node) -> bool:
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.meta.get("hyper"):
            return True
        stack.extend(current.all_input_nodes)
    return False


def _fill_value(name: str, args: Any, kwargs: Any) -> Any:
    return args[_FILLS[name]] if len(args) > _FILLS[name] else kwargs.get("fill_value")


def _filled(func: Any, name: str, args: Any, kwargs: Any) -> Tensor:
    """``full(…, tensor)``: the tensor in the place of the number, in storage of its own."""
    value: Tensor = _fill_value(name, args, kwargs)
    rest = {key: item for key, item in kwargs.items() if key != "fill_value"}
    if name == "full" and rest.get("dtype") is None:
        rest["dtype"] = value.dtype
    shaped: Tensor = func(*args[: _FILLS[name]], fill_value=0, **rest)
    return value.to(shaped.device, shaped.dtype).expand(shaped.shape).clone()


def _is_masked_fill(target: Any, index: Any, value: Any) -> bool:
    """Whether ``target[index] = value`` sets every marked element to one and the same value.

    Its derivative in the value gathers the marked elements, whose number is not known.
    """
    masked = isinstance(index, Tensor) and index.dtype is torch.bool and index.shape == target.shape
    return masked and (not isinstance(value, Tensor) or value.dim() == 0)


def _weight(args: Any, kwargs: Any) -> Any:
    return args[2] if len(args) > 2 else kwargs.get("weight")


def _same_dtype_weight(args: Any, kwargs: Any) -> Any:
    """``lerp`` wants a tensor weight of the operands' dtype."""
    if len(args) > 2 and isinstance(args[2], Tensor):
        return (*args[:2], args[2].to(args[0].dtype)), kwargs
    if isinstance(kwargs.get("weight"), Tensor):
        return args, {**kwargs, "weight": kwargs["weight"].to(args[0].dtype)}
    return args, kwargs


def _same_kind_of_bounds(args: Any, kwargs: Any) -> Any:
    """``clamp`` reads the number out of one bound if the other one is a number."""
    bounds = {**dict(zip(("min", "max"), args[1:], strict=False)), **kwargs}
    numbers = {k: v for k, v in bounds.items() if isinstance(v, int | float)}
    tensors = [v for k, v in bounds.items() if isinstance(v, Tensor) and k != "out"]
    if not tensors or not numbers:
        return args, kwargs
    filled = {k: torch.full_like(tensors[0], v) for k, v in numbers.items()}
    return args[:1], {**bounds, **filled}


def _scaled(factor: Any, x: Any) -> Any:
    if isinstance(factor, Tensor) and x.dim() == 0:
        factor = factor.to(x.dtype)  # a number would not change the result's dtype either
    return x if isinstance(factor, int | float) and factor == 1 else x * factor


def _as_wide(y: Any, *others: Any) -> Any:
    """`y` in the dtype of the whole op, in which it also scales."""
    dtype = y.dtype
    for other in others:
        dtype = torch.promote_types(dtype, torch.result_type(y, other))
    return y.to(dtype)


def _add(x: Any, y: Any, *, alpha: Any = 1, out: Any = None) -> Any:
    return x + _scaled(alpha, _as_wide(y, x))


def _sub(x: Any, y: Any, *, alpha: Any = 1, out: Any = None) -> Any:
    return x - _scaled(alpha, _as_wide(y, x))


def _addcmul(x: Any, y: Any, z: Any, *, value: Any = 1, out: Any = None) -> Any:
    return x + _scaled(value, _as_wide(y, x, z)) * z


def _addcdiv(x: Any, y: Any, z: Any, *, value: Any = 1, out: Any = None) -> Any:
    return x + _scaled(value, _as_wide(y, x, z)) / z


def _product(multiply: Any) -> Any:
    def rewritten(x: Any, y: Any, z: Any, *, beta: Any = 1, alpha: Any = 1, out: Any = None) -> Any:
        return _scaled(beta, x) + _scaled(alpha, multiply(y, z))

    return rewritten


#: ``op(…, slot=tensor)`` by plain arithmetic: one row an op.
_SLOTS = {
    "add": _add,
    "sub": _sub,
    "subtract": _sub,
    "addcmul": _addcmul,
    "addcdiv": _addcdiv,
    "addmm": _product(torch.matmul),
    "addmv": _product(torch.matmul),
    "baddbmm": _product(torch.matmul),
    "addr": _product(torch.outer),
}

#: Ops that fill a tensor with a number, and where it stands among their arguments.
_FILLS = {"full": 1, "full_like": 1, "new_full": 2}
_SLOT_NAMES = ("alpha", "beta", "value")
