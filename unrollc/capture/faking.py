"""What ops return on fake tensors.

An op of a graph is run for the shape, strides and dtype of its result, and most ops of a program
have been run on operands of the same kind before. PyTorch remembers results as well; its key covers
symbolic shapes, quantized and sparse tensors and more, and takes most of the time of a capture.
Here the key of a pure op on plain tensors is short, a view is made by its kernel alone, and
everything else is left to PyTorch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

from unrollc.capture.nests import tensors_in


@dataclass(frozen=True)
class _Form:
    """What is remembered of a result: a tensor in dense storage of its own."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _UnknownError(Exception):
    """An operand that no key describes."""


#: Results by op and operands, of one op or of several; None for what is left to PyTorch.
_FORMS: dict[Any, tuple[_Form | None, ...] | _Form | None] = {}

#: So many are remembered at most: numbers among the operands belong to the key.
_MOST = 100_000

_PLAIN = (
    *(int, float, bool, complex, str, type(None)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)

#: Ops whose last operand says which results there are; the fake ones have all of them.
_MASKED = (torch.ops.aten.native_batch_norm_backward.default,)

_EXCLUDED_TAGS = (
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
    torch.Tag.inplace_view,
)


def faked(mode: FakeTensorMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func(*args, **kwargs)`` on the fake tensors of a mode without symbolic shapes."""
    if _is_view(func):
        if type(args[0]) is FakeTensor and mode.shape_env is None:
            return _view(mode, func, args, kwargs)
    elif _is_remembered(func) and mode.shape_env is None:
        try:
            key = (func, torch.get_default_dtype(), *map(_described, args), _described(kwargs))
        except _UnknownError:
            return _asked(mode, func, args, kwargs)
        try:
            form = _FORMS[key]
        except KeyError:
            return _first(key, mode, func, args, kwargs)
        if isinstance(form, _Form):
            return _made(mode, form)
        if form is not None:
            return tuple(None if each is None else _made(mode, each) for each in form)
    return _asked(mode, func, args, kwargs)


def _first(
    key: Any, mode: FakeTensorMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """PyTorch's answer, whose form is remembered."""
    result = _asked(mode, func, args, kwargs)
    if len(_FORMS) >= _MOST:
        _FORMS.clear()
    given = _storages((args, kwargs))
    _FORMS[key] = _forms(result, given) if isinstance(result, tuple) else _form(result, given)
    return result


def _asked(mode: FakeTensorMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with mode:
        return asked(func, args, kwargs)


def asked(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func(*args, **kwargs)`` by PyTorch's own rules for fake tensors, in their mode."""
    result = func(*args, **kwargs)
    if func not in _MASKED:
        return result
    return tuple(each if wanted else None for each, wanted in zip(result, args[-1], strict=True))


def without_history(tensor: Tensor) -> Tensor:
    """A fake tensor in the same storage that no gradient flows to."""
    if not tensor.requires_grad:
        return tensor
    if type(tensor) is not FakeTensor:
        return tensor.detach()
    return _view(tensor.fake_mode, torch.ops.aten.detach.default, (tensor,), {})


def fake_like(mode: FakeTensorMode, example: Tensor) -> Tensor:
    """A fake tensor of the shape, strides, dtype and device of another, in storage of its own."""
    return _made(mode, _Form(example.shape, example.stride(), example.dtype, example.device))


def _view(mode: FakeTensorMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    with torch._C.DisableTorchFunction(), torch.no_grad(), in_kernel_invocation_manager(mode):
        result = func(*args, **kwargs)
    return FakeTensor(mode, result, args[0].fake_device)


def _made(mode: FakeTensorMode, form: _Form) -> Tensor:
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        empty = torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device="meta")
    return FakeTensor(mode, empty, form.device)


@functools.cache
def _is_view(func: Any) -> bool:
    """Whether an op of ATen returns one view, of its first operand."""
    if not isinstance(func, torch._ops.OpOverload) or func.namespace != "aten":
        return False
    schema = func._schema
    aliases = [argument.alias_info for argument in schema.arguments]
    single = [str(result.type) for result in schema.returns] == ["Tensor"]
    own = not func._can_decompose() and torch.Tag.inplace_view not in func.tags
    return (
        single
        and own
        and not schema.is_mutable
        and aliases[:1] != [None]
        and not any(aliases[1:])
        and schema.returns[0].alias_info is not None
    )


@functools.cache
def _is_remembered(func: Any) -> bool:
    """Whether the form of an op's results follows from those of its operands."""
    if not isinstance(func, torch._ops.OpOverload) or func.namespace != "aten":
        return False
    schema = func._schema
    aliases = any(a.alias_info for a in (*schema.arguments, *schema.returns))
    return not schema.is_mutable and not aliases and not set(_EXCLUDED_TAGS) & set(func.tags)


def _described(value: Any) -> Any:
    """What of an operand an op's result depends on."""
    kind = type(value)
    if kind is FakeTensor:
        if not _is_plain(value):
            raise _UnknownError
        # Some ops, such as the functional copy, keep what lies around a part of a storage.
        place = value.storage_offset(), value.untyped_storage().nbytes()
        return value.shape, value.stride(), value.dtype, value.fake_device, place
    if kind in _PLAIN:
        return kind, value
    if kind is tuple or kind is list or kind is torch.Size:
        return tuple(map(_described, value))
    if kind is dict:
        return tuple((key, _described(item)) for key, item in value.items())
    raise _UnknownError


def _forms(results: tuple[Any, ...], given: set[int]) -> tuple[_Form | None, ...] | None:
    """How to make several results again; None if that is not known."""
    forms: list[_Form | None] = []
    for each in results:
        form = None if each is None else _form(each, given)
        if each is not None and form is None:
            return None
        forms.append(form)
        given = given | _storages(each)
    return tuple(forms)


def _form(result: Any, given: set[int]) -> _Form | None:
    """How to make a result again that lies in none of the given storages; None if not known."""
    if type(result) is not FakeTensor or result.requires_grad or not _is_plain(result):
        return None
    storage = result.untyped_storage()
    own = storage._cdata not in given and result.storage_offset() == 0
    spans = sum((n - 1) * s for n, s in zip(result.shape, result.stride(), strict=True)) + 1
    dense = storage.nbytes() == (spans if result.numel() else 0) * result.itemsize
    if not own or not dense:
        return None
    return _Form(result.shape, result.stride(), result.dtype, result.fake_device)


def _is_plain(tensor: FakeTensor) -> bool:
    """Whether shape, strides, dtype and device are all that ops see of a tensor.

    They also see the zeros that autograd makes for what has no tangent: a product with such a
    tensor is another one.
    """
    marked = tensor.is_neg() or tensor._is_zerotensor() or tensor.constant is not None
    return tensor.layout is torch.strided and not tensor.dtype.is_complex and not marked


def _storages(value: Any) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors_in(value)}
