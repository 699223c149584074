"""Tensors that say they are on a CUDA device, and compute on the CPU.

A program of such tensors is captured, planned, generated and run as one on a real device is. What
passes between device and host, and what would make the host wait, is written down on the way. The
process must have been prepared (`pretended_cuda`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from tests.oracles.device_traffic import faults_of_call

CUDA = torch.device("cuda", 0)


class OnCuda(Tensor):
    """A tensor that is on `CUDA` for whoever asks; `held` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnCuda:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=CUDA,
        )
        tensor.held = held
        return tensor

    def __repr__(self) -> str:
        return f"OnCuda({self.held!r})"

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class Traffic(TorchDispatchMode):
    """Runs ops, those that make tensors included, and notes what is wrong with them.

    Attributes:
        faults: See `device_traffic.faults_of_call`.
        ran: Number of ops.
    """

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []
        self.ran = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = _run(func, args, kwargs or {})
        self.faults += faults_of_call(func, tensors(args, kwargs), tensors(result))
        self.ran += 1
        return result


def register() -> torch.library.Library:
    """Let tensors be made on the stand-in device outside of `Traffic` as well.

    It lasts as long as what is returned.
    """
    library = torch.library.Library("aten", "IMPL")

    def empty(size: Any, *args: Any, device: Any = None, pin_memory: Any = None, **kw: Any) -> Any:
        return OnCuda(torch.empty(size, **kw))

    def strided(
        size: Any, stride: Any, device: Any = None, pin_memory: Any = None, **kw: Any
    ) -> Any:
        return OnCuda(torch.empty_strided(size, stride, **kw))

    library.impl("empty.memory_format", empty, "CUDA")
    library.impl("empty_strided", strided, "CUDA")
    return library


def tensors(*values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def on_cuda(tensor: Tensor) -> Tensor:
    """A copy of a CPU tensor on the stand-in device; it requires grad where the tensor does."""
    return OnCuda(tensor.detach().clone()).requires_grad_(tensor.requires_grad)


def on_host(value: Any) -> Any:
    """The numbers of tensors on the stand-in device."""
    return pytree.tree_map_only(OnCuda, lambda tensor: tensor.held, value)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    place = kwargs.get("device")
    given = any(isinstance(tensor, OnCuda) for tensor in tensors(args, kwargs))
    cuda = given if place is None else torch.device(place).type == "cuda"
    inner_args, inner_kwargs = on_host((args, kwargs))
    if place is not None:
        inner_kwargs = {**inner_kwargs, "device": torch.device("cpu")}
    result = func(*inner_args, **inner_kwargs)
    if cuda:
        result = pytree.tree_map_only(Tensor, OnCuda, result)
    return return_and_correct_aliasing(func, args, kwargs, result)
