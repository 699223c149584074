"""A kernel's shared library as a function of tensors.

It imports torch alone: the worker process and the user's both load libraries.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: The library's name in a kernel's folder: as one C function, or with Inductor's own wrapper.
NATIVE, WRAPPED = "native.so", "kernel.so"

#: Most characters of what a C function says of an error.
SAID = 256


#: Machine code, called with a kernel's inputs.
Code = Callable[[Sequence[Tensor]], list[Tensor]]


class NativeCode:
    """One C function of addresses, called with tensors.

    Attributes:
        address: The function's.
        player: The library's function that plays a tape; every library has the same.
        scratch: Bytes of scratch memory that a call needs.
    """

    def __init__(self, path: Path, outputs: Sequence[Mapping[str, Any]]) -> None:
        """Load it.

        Args:
            path: The library.
            outputs: Shape, stride and dtype of what it returns.
        """
        code = ctypes.CDLL(str(path))
        self._entry = code.unrollc_run
        self.player = code.unrollc_play
        self.address = _address(code.unrollc_run)
        self.scratch = ctypes.c_int64.in_dll(code, "unrollc_scratch").value
        self._outputs = [
            (tuple(each["shape"]), tuple(each["stride"]), _dtype(each["dtype"])) for each in outputs
        ]

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """What the kernel returns.

        Raises:
            IndexError: If an index in the data is out of bounds.
        """
        results = [
            torch.empty_strided(shape, stride, dtype=dtype)
            for shape, stride, dtype in self._outputs
        ]
        scratch = torch.empty(self.scratch, dtype=torch.uint8)
        said = ctypes.create_string_buffer(SAID)
        failed = self._entry(
            _addresses(inputs), _addresses(results), ctypes.c_void_p(scratch.data_ptr()), said
        )
        if failed:
            raise error_of(said.value)
        return results


def error_of(said: bytes) -> Exception:
    """The error that a C function has ended with."""
    text = said.decode(errors="replace")
    _, bounds, where = text.partition("index out of bounds")
    if bounds:  # what stands before it is a place in a file that is gone
        return IndexError(
            f'an index in the data is out of bounds{where}; backend="aten" names the op'
        )
    return RuntimeError(text)


def _address(function: Any) -> int:
    found = ctypes.cast(function, ctypes.c_void_p).value
    assert found is not None
    return found


def _addresses(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."))
    assert isinstance(dtype, torch.dtype)
    return dtype


def runner_of(folder: Path, device: str, outputs: Sequence[Mapping[str, Any]]) -> Code:
    """The machine code in a folder.

    Args:
        folder: What the worker has made for a kernel.
        device: Where it runs.
        outputs: Shape, stride and dtype of what it returns.

    Raises:
        RuntimeError, OSError: If it cannot be loaded.
    """
    if (folder / NATIVE).exists():
        return NativeCode(folder / NATIVE, outputs)
    kind, _, index = device.partition(":")
    runner = getattr(torch._C._aoti, f"AOTIModelContainerRunner{kind.capitalize()}")
    path = str(folder / WRAPPED)
    loaded = runner(path, 1, device, str(folder)) if index else runner(path, 1)
    return loaded.run  # type: ignore[no-any-return]
