"""Nests of tensors as safetensors files, exact to the bit, and digests of tensors.

What is stored are the bytes of storages; how each tensor views its storage (dtype, shape, strides,
offset) stands in the header. So strides survive, which decide in which order a kernel sums, and so
does aliasing: two tensors on one storage share one again after reading.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

#: Kernels take other paths on addresses that are aligned otherwise, so offsets keep their
#: remainder by this many bytes (the alignment of PyTorch's CPU allocator).
_ALIGNMENT = 64

#: Bytes that are hashed at once; a digest needs no more memory than that.
_CHUNK = 1 << 20


class DamagedFileError(Exception):
    """A file is missing, shorter than it was, or has other bytes than were written."""


# --- files ------------------------------------------------------------------------------------


def write_nest(path: Path, nest: Any) -> str:
    """Write a nest of tensors; what is written is on the disk when this returns.

    Args:
        path: The file, which must not exist under this name yet.
        nest: Tensors, None, numbers and strings in lists and in dictionaries with string keys.

    Returns:
        The digest of the file, for `read_nest`.
    """
    tensors: list[Tensor] = []
    layout = _layout(nest, tensors)
    spans = _Spans(tensors)
    views = [spans.describe(tensor) for tensor in tensors]
    header = {"nest": json.dumps(layout), "views": json.dumps(views)}
    save_file(spans.contents(), path, metadata=header)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return _file_digest(path)


def read_nest(path: Path, digest: str) -> Any:
    """The nest of a file, in fresh memory on the devices that its tensors came from.

    Raises:
        DamagedFileError: If the file is not the one that `write_nest` wrote.
    """
    try:
        if _file_digest(path) != digest:
            raise DamagedFileError(f"{path.name} has other bytes than were written")
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata()
            views = json.loads(header["views"])
            storages = _storages(file, views)
            tensors = [_tensor(view, storages[view["storage"]]) for view in views]
            return _nest(json.loads(header["nest"]), tensors)
    except (OSError, SafetensorError) as error:
        raise DamagedFileError(f"{path.name} cannot be read: {error}") from error


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- digests ----------------------------------------------------------------------------------


def digest_of(text: str, inputs: Mapping[str, Any]) -> str:
    """What tells runs apart: a program's text, the version of torch, and every byte of its inputs.

    Args:
        text: The generated program.
        inputs: Tensors by label; lists of tensors for batches in list form.
    """
    found = hashlib.sha256()
    _feed(found, f"torch {torch.__version__}", text)
    for label, value in sorted(inputs.items()):
        tensors = value if isinstance(value, list) else [value]
        _feed(found, label, str(len(tensors)) if isinstance(value, list) else "")
        for tensor in tensors:
            flat = tensor.detach().resolve_conj().resolve_neg()
            # Strides count: kernels sum in another order where they differ.
            view = f"{flat.dtype} {tuple(flat.shape)} {flat.stride()} {flat.device}"
            _feed(found, view)
            _feed_bytes(found, flat)
    return found.hexdigest()


def _feed(found: Any, *texts: str) -> None:
    for text in texts:
        encoded = text.encode()
        found.update(len(encoded).to_bytes(8, "little"))  # "ab", "c" is not "a", "bc"
        found.update(encoded)


def _feed_bytes(found: Any, tensor: Tensor) -> None:
    """Feed a tensor's elements in row-major order, a part at a time."""
    if tensor.numel() * tensor.element_size() > _CHUNK:
        if tensor.shape[0] == 1:
            return _feed_bytes(found, tensor[0])
        for part in tensor.chunk(2):
            _feed_bytes(found, part)
        return None
    raw = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
    found.update(raw.numpy().tobytes())
    return None


# --- nests ------------------------------------------------------------------------------------


def _layout(nest: Any, tensors: list[Tensor]) -> Any:
    """A nest as JSON, with positions in place of its tensors, which are appended to `tensors`."""
    match nest:
        case Tensor():
            tensors.append(nest.detach())
            return {"tensor": len(tensors) - 1}
        case list() | tuple():
            return [_layout(each, tensors) for each in nest]
        case Mapping():
            return {"entries": {key: _layout(each, tensors) for key, each in nest.items()}}
        case None | int() | str():
            return nest
    raise AssertionError(f"{type(nest).__name__} cannot be stored")


def _nest(layout: Any, tensors: list[Tensor]) -> Any:
    match layout:
        case {"tensor": position}:
            return tensors[position]
        case {"entries": entries}:
            return {key: _nest(each, tensors) for key, each in entries.items()}
        case list():
            return [_nest(each, tensors) for each in layout]
    return layout


# --- storages and their views -----------------------------------------------------------------


class _Spans:
    """Of each storage, the bytes between the first and the last that some tensor views."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._numbers: dict[tuple[torch.device, int], int] = {}
        self._storages: list[torch.UntypedStorage] = []
        self._ends: list[tuple[int, int]] = []
        for tensor in tensors:
            storage = tensor.untyped_storage()
            number = self._numbers.setdefault(_identity(tensor), len(self._storages))
            first, last = _extent(tensor)
            first -= first % _ALIGNMENT
            if number == len(self._storages):
                self._storages.append(storage)
                self._ends.append((first, last))
            else:
                known = self._ends[number]
                self._ends[number] = (min(known[0], first), max(known[1], last))

    def describe(self, tensor: Tensor) -> dict[str, Any]:
        """How a tensor views the bytes that are stored of its storage."""
        number = self._numbers[_identity(tensor)]
        return {
            "storage": number,
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "stride": list(tensor.stride()),
            "offset": tensor.storage_offset() - self._ends[number][0] // tensor.element_size(),
            "device": str(tensor.device),
            "conjugate": tensor.is_conj(),
            "negative": tensor.is_neg(),
        }

    def contents(self) -> dict[str, Tensor]:
        """The bytes of each storage, without a copy where they are on the CPU."""
        return {
            str(number): torch.empty(0, dtype=torch.uint8, device=storage.device)
            .set_(storage, first, (last - first,), (1,))
            .cpu()
            for number, (storage, (first, last)) in enumerate(
                zip(self._storages, self._ends, strict=True)
            )
        }


def _identity(tensor: Tensor) -> tuple[torch.device, int]:
    # The address of the storage object, not of its data, which is 0 for every empty storage.
    return tensor.device, tensor.untyped_storage()._cdata


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first byte of its storage that a tensor reads, and the one behind the last."""
    size, first = tensor.element_size(), int(tensor.storage_offset())
    if tensor.numel() == 0:
        return first * size, first * size
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    last = first + sum((int(length) - 1) * int(stride) for length, stride in pairs)
    return first * size, (last + 1) * size


def _storages(file: Any, views: list[dict[str, Any]]) -> dict[int, Tensor]:
    """The stored bytes in memory of PyTorch's own, which the mapped file is not aligned for."""
    devices = {view["storage"]: view["device"] for view in views}
    found = {}
    for number, device in devices.items():
        mapped = file.get_tensor(str(number))
        found[number] = torch.empty(mapped.shape, dtype=torch.uint8, device=device).copy_(mapped)
    return found


def _tensor(view: dict[str, Any], storage: Tensor) -> Tensor:
    dtype = getattr(torch, view["dtype"])
    found = torch.empty(0, dtype=dtype, device=storage.device).set_(
        storage.untyped_storage(), view["offset"], view["shape"], view["stride"]
    )
    found = found.conj() if view["conjugate"] else found
    return torch._neg_view(found) if view["negative"] else found
