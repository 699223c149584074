"""Python numbers of an optimizer that are tensors while its step is captured.

A counter such as ``group["step"] += 1`` would make every step a program of its own, and a number
that ``.item()`` takes out of the gradients would make it hold for one run only. Both go on as
0-dim float64 tensors, which round as Python's floats do. What Python does with a number and
cannot do with a tensor is answered here, in the thread that captures and nowhere else: functions
of `math`, ``max`` and ``min``, hashes (``step in {1, 10}``), and ``+=``, which must not change
other names for the same number.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.overrides import TorchFunctionMode

from unrollc.capture.nests import map_tensors, tensors_in
from unrollc.capture.record import Recorder
from unrollc.capture.scalars import called_by_operator, stays_tensor

_LOCK = threading.Lock()

#: The captures that are running, by thread.
_CAPTURES: dict[int, _Numbers] = {}


class _Numbers(TorchFunctionMode):
    """Knows which tensors stand for numbers.

    Args:
        recorder: What records the step.
        numbers: Tensors that stand for numbers of the optimizer's from the start.
        hyper: Hyperparameters: numbers that the user made tensors, with a dtype of their own.
    """

    def __init__(
        self, recorder: Recorder, numbers: Sequence[Tensor], hyper: Sequence[Tensor]
    ) -> None:
        super().__init__()
        self.recorder = recorder
        self._numbers = {id(tensor): tensor for tensor in (*numbers, *hyper)}
        self._typed = {id(tensor) for tensor in hyper}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.startswith("__") and args and self._fixed(args[0]):
            func = getattr(Tensor, name.removesuffix("_"))
        if func is torch.tensor and isinstance(args[0], Tensor) and self.is_number(args[0]):
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            return args[0].to(kwargs.get("device"), dtype, copy=True)
        args, kwargs = self._as_narrow(name, args, kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and (name == "item" or self._computes(name, args, kwargs)):
            self.add(result, args)
        return result

    def _fixed(self, tensor: Any) -> bool:
        """Whether ``x += y`` must leave other names for `tensor` alone, as it does for a number.

        A hyperparameter is a tensor for the user as well, who may write to it by a method: that
        is refused elsewhere.
        """
        if not isinstance(tensor, Tensor) or not self.is_number(tensor):
            return False
        return id(tensor) not in self._typed or called_by_operator()

    def add(self, result: Tensor, operands: Any) -> None:
        """Take a result for a number."""
        self._numbers[id(result)] = result
        if any(id(tensor) in self._typed for tensor in tensors_in(operands)):
            self._typed.add(id(result))

    def is_number(self, tensor: Tensor) -> bool:
        """Whether a tensor stands for a Python number."""
        return id(tensor) in self._numbers

    def is_own(self, tensor: Tensor) -> bool:
        """Whether no tensor hyperparameter of the user's had a part in a number."""
        return id(tensor) not in self._typed

    def _as_narrow(self, name: str, args: Any, kwargs: Any) -> Any:
        """Numbers in the dtype of the 0-dim tensors that they meet, which a Python number takes.

        A tensor with dimensions keeps its dtype by itself.
        """
        if name.strip("_") not in _ARITHMETIC:
            return args, kwargs
        others = [t for t in tensors_in((args, kwargs)) if not self.is_number(t)]
        if not others or any(tensor.dim() for tensor in others):
            return args, kwargs
        dtype = functools.reduce(torch.promote_types, (torch.result_type(t, 1.0) for t in others))

        def narrow(tensor: Tensor) -> Tensor:
            own = self.is_number(tensor) and id(tensor) not in self._typed
            return tensor.to(dtype) if own else tensor

        return map_tensors(narrow, (args, kwargs))

    def _computes(self, name: str, args: Any, kwargs: Any) -> bool:
        """Whether a call is arithmetic on numbers, the result of which is a number."""
        if name.strip("_") not in _ARITHMETIC:
            return False
        tensors = tensors_in((args, kwargs))
        return bool(tensors) and all(self.is_number(tensor) for tensor in tensors)


@dataclass(frozen=True)
class _Patch:
    """Something of Python's that answers for traced numbers during a capture."""

    owner: Any
    name: str
    value: Any


@contextlib.contextmanager
def numbers_stay_tensors(
    recorder: Recorder, numbers: Sequence[Tensor], hyper: Sequence[Tensor]
) -> Iterator[Callable[[Tensor], bool]]:
    """Run an optimizer's step with numbers that are tensors; tells which tensors are numbers.

    Args:
        recorder: What records the step.
        numbers: The tensors that stand for numbers of the optimizer's.
        hyper: The hyperparameters that are tensors.
    """
    mode = _Numbers(recorder, numbers, hyper)
    with _LOCK:
        if not _CAPTURES:
            for patch in _PATCHES:
                setattr(patch.owner, patch.name, patch.value)
        _CAPTURES[threading.get_ident()] = mode
    try:
        with mode:
            yield mode.is_number
    finally:
        with _LOCK:
            del _CAPTURES[threading.get_ident()]
            if not _CAPTURES:
                for owner, name, value in _ORIGINALS:
                    setattr(owner, name, value)


def _capture() -> _Numbers | None:
    return _CAPTURES.get(threading.get_ident()) if _CAPTURES else None


def _function_of_numbers(plain: Callable[..., Any], traced: Callable[..., Any]) -> Any:
    """A function of `math` that takes traced numbers where their values are not to be read."""

    def function(*args: Any, **kwargs: Any) -> Any:
        capture = _capture()
        if capture is None or not any(isinstance(arg, Tensor) for arg in args):
            return plain(*args, **kwargs)
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        single = all(tensor.numel() == 1 for tensor in tensors)
        if not single or not all(stays_tensor(capture.recorder, tensor) for tensor in tensors):
            return plain(*args, **kwargs)
        result = traced(*(_as_number(arg) for arg in args), **kwargs)
        capture.add(result, args)
        return result

    return function


def _as_number(value: Any) -> Any:
    return value.reshape(()).to(torch.float64) if isinstance(value, Tensor) else value


def _extreme(plain: Callable[..., Any], traced: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """``max`` or ``min`` that picks by a tensor op where a value is not known.

    Where all values are known, Python compares, and the captured step holds under that outcome.
    """

    def extreme(*args: Any, **kwargs: Any) -> Any:
        capture = _capture()
        if capture is None or len(args) != 2:
            return plain(*args, **kwargs)
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        known = (capture.recorder.is_known(tensor) for tensor in tensors)
        if all(known) or not all(tensor.numel() == 1 for tensor in tensors):
            return plain(*args, **kwargs)
        pair = [x if isinstance(x, Tensor) else torch.full_like(tensors[0], x) for x in args]
        result = traced(*pair)
        if all(capture.is_number(tensor) for tensor in tensors):
            capture.add(result, args)
        return result

    return extreme


def _hash(tensor: Tensor) -> int:
    """A traced number hashes as the number that it stands for, which becomes a guard."""
    capture = _capture()
    if capture is not None and capture.is_number(tensor):
        return hash(float(tensor))
    return id(tensor)


def _text(tensor: Tensor) -> str:
    """A traced number reads as the number that it stands for, which becomes a guard."""
    return str(_shown(tensor)) if _is_shown(tensor) else _PLAIN_TEXT(tensor)


def _formatted(tensor: Tensor, form: str) -> str:
    return format(_shown(tensor), form) if _is_shown(tensor) else _PLAIN_FORMAT(tensor, form)


def _is_shown(tensor: Tensor) -> bool:
    """Whether the text of a number is to be its value: a counter's, which may name an entry."""
    capture = _capture()
    counts = capture is not None and capture.is_number(tensor) and capture.is_own(tensor)
    return counts and capture is not None and capture.recorder.is_known(tensor)


def _shown(tensor: Tensor) -> int | float:
    number = float(tensor)
    return int(number) if number.is_integer() else number


def _power(base: Any, exponent: Any) -> Any:
    return base**exponent


def _logarithm(x: Any, base: Any = None) -> Any:
    of_x = x.log() if isinstance(x, Tensor) else math.log(x)
    if base is None:
        return of_x
    return of_x / (base.log() if isinstance(base, Tensor) else math.log(base))


def _with_tensors(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` of two arguments, of which one may be a number."""

    def of_two(x: Any, y: Any) -> Tensor:
        like = x if isinstance(x, Tensor) else y
        both = (z if isinstance(z, Tensor) else torch.full_like(like, z) for z in (x, y))
        return function(*both)

    return of_two


_PLAIN_TEXT: Any = FunctionalTensor.__repr__
_PLAIN_FORMAT: Any = FunctionalTensor.__format__

#: Functions of `math` and what computes them on tensors.
_MATH: dict[str, Callable[..., Any]] = {
    "sqrt": torch.sqrt,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": _logarithm,
    "log1p": torch.log1p,
    "log2": torch.log2,
    "log10": torch.log10,
    "pow": _power,
    "sin": torch.sin,
    "cos": torch.cos,
    "tan": torch.tan,
    "atan": torch.atan,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "tanh": torch.tanh,
    "fabs": torch.abs,
    "copysign": _with_tensors(torch.copysign),
    "atan2": _with_tensors(torch.atan2),
    "hypot": _with_tensors(torch.hypot),
}

#: Names of the functions that Python's arithmetic on tensors arrives as.
_BASIC = ("add", "sub", "mul", "div", "true_divide", "floor_divide", "remainder", "pow", "neg")
_REFLECTED = ("rsub", "rdiv", "rfloordiv", "rmod", "rpow")
_ARITHMETIC = frozenset((*_BASIC, *_REFLECTED, "abs", "sqrt", "exp", "log"))

_PATCHES = (
    *(_Patch(math, n, _function_of_numbers(getattr(math, n), f)) for n, f in _MATH.items()),
    _Patch(builtins, "max", _extreme(max, torch.maximum)),
    _Patch(builtins, "min", _extreme(min, torch.minimum)),
    _Patch(FunctionalTensor, "__hash__", _hash),
    _Patch(FunctionalTensor, "__repr__", _text),
    _Patch(FunctionalTensor, "__format__", _formatted),
)
_ORIGINALS = tuple((p.owner, p.name, getattr(p.owner, p.name)) for p in _PATCHES)
