"""What is read from a file of tensors is what was written, to the bit; damage is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unrollc.runtime.tensor_files import DamagedFileError, digest_of, read_nest, write_nest


def stored(path: Path, nest: Any) -> Any:
    return read_nest(path / "file", write_nest(path / "file", nest))


def same(a: Tensor, b: Tensor) -> bool:
    layouts = [(t.dtype, t.shape, t.stride(), t.device, t.is_conj(), t.is_neg()) for t in (a, b)]
    equal = torch.equal(a.nan_to_num() if a.is_floating_point() else a, b.nan_to_num())
    return layouts[0] == layouts[1] and equal


TENSORS: dict[str, Callable[[], Tensor]] = {
    "scalar": lambda: torch.tensor(3.5),
    "integers": lambda: torch.arange(6, dtype=torch.int16).reshape(2, 3),
    "booleans": lambda: torch.tensor([True, False]),
    "empty": lambda: torch.empty(0, 3),
    "complex64": lambda: torch.randn(3, dtype=torch.complex64),
    "complex128": lambda: torch.randn(3, dtype=torch.complex128),
    "conjugate": lambda: torch.randn(3, dtype=torch.complex64).conj(),
    "negative": lambda: torch.randn(3, dtype=torch.complex64).conj().imag,
    "bfloat16": lambda: torch.randn(5).bfloat16(),
    "eight bits": lambda: torch.randn(5).to(torch.float8_e4m3fn).to(torch.float32),
    "transposed": lambda: torch.randn(3, 4).t(),
    "channels last": lambda: torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "expanded": lambda: torch.randn(3, 1).expand(3, 5),
    "every other": lambda: torch.randn(10)[1::2],
    "of a large one": lambda: torch.randn(100_000)[70_000:70_003],
    "parameter": lambda: torch.nn.Parameter(torch.randn(3)),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_every_kind_of_tensor(kind: str, tmp_path: Path) -> None:
    tensor = TENSORS[kind]()
    found = stored(tmp_path, [tensor])[0]
    assert same(found, tensor.detach()) and not found.requires_grad
    assert (tmp_path / "file").stat().st_size < 4096  # of a large storage, what is viewed


def test_nan_and_signed_zero_keep_their_bits(tmp_path: Path) -> None:
    bits = torch.tensor([0x7FC00001, -0x80000000, 0x7F800000], dtype=torch.int32)
    found = stored(tmp_path, bits.view(torch.float32))
    assert torch.equal(found.view(torch.int32), bits)


def test_nests(tmp_path: Path) -> None:
    nest = {"loss": torch.tensor(1.0), "totals": {"a/b": [None, torch.ones(2)]}, "last": 7}
    found = stored(tmp_path, nest)
    assert found["last"] == 7 and found["totals"]["a/b"][0] is None
    assert torch.equal(found["totals"]["a/b"][1], torch.ones(2)) and found["loss"] == 1


def test_aliases_stay_aliases(tmp_path: Path) -> None:
    whole = torch.zeros(4, 4)
    row, again, other = stored(tmp_path, [whole[1], whole, torch.zeros(4)])
    row += 1
    assert torch.equal(again[1], torch.ones(4)) and again.sum() == 4 and other.sum() == 0


def test_memory_is_aligned_as_it_was(tmp_path: Path) -> None:
    large = torch.randn(1000)
    for found in stored(tmp_path, [large[37:50], torch.tensor(1.0), large[16:20]]):
        assert found.untyped_storage().data_ptr() % 64 == 0
    found = read_nest(tmp_path / "b", write_nest(tmp_path / "b", [large[37:50]]))[0]
    assert found.data_ptr() % 64 == large[37:50].data_ptr() % 64


def test_damage_is_found(tmp_path: Path) -> None:
    file = tmp_path / "file"
    digest = write_nest(file, [torch.randn(100)])
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[-5] ^= 1
    for broken in (bytes(flipped), content[:-1], b"", b"\xff" * 100):
        file.write_bytes(broken)
        with pytest.raises(DamagedFileError, match="file has other bytes"):
            read_nest(file, digest)
    file.unlink()
    with pytest.raises(DamagedFileError, match="cannot be read"):
        read_nest(file, digest)


def test_digests_tell_runs_apart() -> None:
    inputs = {"a": torch.randn(600, 700), "b": [torch.zeros(2), torch.ones(2)]}
    digest = digest_of("text", inputs)
    assert digest == digest_of("text", {k: inputs[k] for k in ("b", "a")})
    assert digest == digest_of("text", {**inputs, "a": inputs["a"].clone().requires_grad_()})
    changed = inputs["a"].clone()
    changed[599, 699] = torch.nextafter(changed[599, 699], torch.tensor(10.0))
    others = [
        {**inputs, "a": changed},
        {**inputs, "a": inputs["a"].t().contiguous().t()},
        {**inputs, "a": inputs["a"].double()},
        {**inputs, "b": [torch.zeros(2), torch.zeros(2)]},
        {**inputs, "b": torch.stack(inputs["b"])},
        {"c": inputs["a"], "b": inputs["b"]},
    ]
    digests = {digest, digest_of("test", inputs), *(digest_of("text", each) for each in others)}
    assert len(digests) == 2 + len(others)
