"""Numbers that an optimizer takes out of tensors, kept as tensors.

Optimizers read hyperparameters and state in places where PyTorch or Python wants a number, which
cuts their gradient. Where the value can go on as a 0-dim tensor without any change to the
arithmetic, it does.
"""

from __future__ import annotations

import builtins
import contextlib
import inspect
import pathlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from unrollc.capture.record import Recorder
from unrollc.errors import CaptureError

_GRADIENT: Any = vars(torch._C.TensorBase)["grad"].__get__

#: Where the optimizers of PyTorch live.
_OPTIMIZERS = str(pathlib.Path(torch.optim.__file__).parent)


class ScalarSlots(TorchFunctionMode):
    """Makes the places where arithmetic wants a number transparent to tensors.

    ``p.add_(g, alpha=lr)`` reads the number out of a tensor `lr` and cuts its gradient; here it
    becomes ``p.add_(g * lr)``, and ``full_like(g, lr)`` an expanded `lr`. Step counters read by
    ``.item()`` go on as 0-dim float64 tensors, which round as Python numbers do, so that one
    graph serves every step. So does everything that `torch.optim` itself reads: its optimizers
    take numbers for speed alone (`_get_value` is the identity under ``torch.compile``). Where
    other code reads a tensor, a number is what it gets, and the lost gradient is reported.
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
        if name == "item" and self._goes_on(args[0]):
            return args[0].to(torch.float64)
        if name == "__bool__":
            asked = args[0] if args[0].dtype is torch.bool else args[0] != 0
            return bool(torch.ops.aten._local_scalar_dense.default(asked))
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

    def _goes_on(self, tensor: Tensor) -> bool:
        """Whether the value that ``.item()`` reads may stay a tensor."""
        caller = sys._getframe(2).f_code
        if caller.co_name in ("__bool__", "__float__", "__int__", "__index__"):
            return False  # asked by bool(tensor) and the like, which need a number
        return caller.co_filename.startswith(_OPTIMIZERS) or self._is_counter(tensor)

    def _is_counter(self, tensor: Tensor) -> bool:
        """Whether the value is known and no hyperparameter had a part in it."""
        node = self._recorder.node_of(tensor)
        return node is not None and _is_known(self._recorder, tensor) and not self._tuned(node)

    def _tuned(self, node: torch.fx.Node) -> bool:
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


def _is_known(recorder: Recorder, tensor: Tensor) -> bool:
    return recorder.node_of(tensor) in recorder.concrete


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


_EXTREMES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "max": torch.maximum,
    "min": torch.minimum,
}
_CAPTURES_LOCK = threading.Lock()

#: The captures that are running, by thread: what they record and the namespaces they changed.
_CAPTURES: dict[int, tuple[Recorder, list[dict[str, Any]]]] = {}


@contextlib.contextmanager
def extremes_of_tensors(kind: type, recorder: Recorder) -> Iterator[None]:
    """Let ``max(number, tensor)`` in an optimizer of `torch.optim` be ``torch.maximum``.

    Python's ``max`` compares and picks, which needs the tensor's value. The names are put into
    the globals of the optimizer's module, where they come before the builtins, and taken out
    when the last capture that uses them ends. In a thread that captures nothing they are the
    builtins.

    Args:
        kind: The optimizer's class.
        recorder: What its step is recorded by.
    """
    spaces = _namespaces(kind)
    with _CAPTURES_LOCK:
        _CAPTURES[threading.get_ident()] = recorder, spaces
        for space in spaces:
            for key, extreme in _TRACED_EXTREMES.items():
                space.setdefault(key, extreme)
    try:
        yield
    finally:
        with _CAPTURES_LOCK:
            del _CAPTURES[threading.get_ident()]
            in_use = {id(space) for _, used in _CAPTURES.values() for space in used}
            for space in spaces:
                for key, extreme in _TRACED_EXTREMES.items():
                    if id(space) not in in_use and space[key] is extreme:
                        del space[key]


def _namespaces(kind: type) -> list[dict[str, Any]]:
    """Globals of the ``step`` functions that an optimizer has from `torch.optim`."""
    steps = [inspect.unwrap(vars(base)["step"]) for base in kind.__mro__ if "step" in vars(base)]
    spaces = {id(space): space for step in steps if (space := getattr(step, "__globals__", {}))}
    return [s for s in spaces.values() if s.get("__file__", "").startswith(_OPTIMIZERS)]


def _traced_extreme(key: str) -> Callable[..., Any]:
    """The builtin, or the tensor op where a traced operand's value is unknown."""
    plain: Callable[..., Any] = getattr(builtins, key)

    def extreme(*args: Any, **kwargs: Any) -> Any:
        recorder, _ = _CAPTURES.get(threading.get_ident(), (None, None))
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if recorder is None or len(args) != 2 or all(_is_known(recorder, t) for t in tensors):
            return plain(*args, **kwargs)
        pair = [x if isinstance(x, Tensor) else torch.full_like(tensors[0], x) for x in args]
        return _EXTREMES[key](*pair)

    return extreme


_TRACED_EXTREMES = {key: _traced_extreme(key) for key in _EXTREMES}


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


def _add(x: Any, y: Any, *, alpha: Any = 1, out: Any = None) -> Any:
    return x + _scaled(alpha, _promoted(x, y))


def _sub(x: Any, y: Any, *, alpha: Any = 1, out: Any = None) -> Any:
    return x - _scaled(alpha, _promoted(x, y))


def _promoted(x: Any, y: Any) -> Any:
    """`y` in the dtype in which the op computes: a bfloat16 update is scaled in float32."""
    return y.to(torch.result_type(x, y)) if isinstance(y, Tensor) else y


def _addcmul(x: Any, y: Any, z: Any, *, value: Any = 1, out: Any = None) -> Any:
    return x + _scaled(value, y) * z


def _addcdiv(x: Any, y: Any, z: Any, *, value: Any = 1, out: Any = None) -> Any:
    return x + _scaled(value, y) / z


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
