"""Products by the faster library: the same numbers but for rounding, and aten's where it is not."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import unrollc
from unrollc.runtime import products
from unrollc.runtime.products import _addmm, _is_onednn_faster, _mm, faster_products

aten = torch.ops.aten

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch is built without oneDNN"
)


@pytest.fixture
def asked_anew() -> Iterator[None]:
    """What is known of the processor is forgotten, before and after."""
    _is_onednn_faster.cache_clear()
    yield
    _is_onednn_faster.cache_clear()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls of oneDNN's product."""
    found: list[str] = []
    linear = products._linear()

    def counting() -> Any:
        found.append("linear")
        return linear

    monkeypatch.setattr(products, "_linear", counting)
    return found


def operand(rows: int, columns: int, order: str) -> Tensor:
    """A matrix of float32 by rows, by columns, or with gaps between its rows."""
    if order == "columns":
        return torch.randn(columns, rows).t()
    if order == "gaps":
        return torch.randn(rows, columns + 3)[:, :columns]
    return torch.randn(rows, columns)


def assert_product(found: Tensor, exact: Tensor, left: Tensor, right: Tensor) -> None:
    """Off by no more than float32's rounding of each term and each sum, and less by far."""
    assert found.dtype is torch.float32 and found.shape == exact.shape
    sizes = left.double().abs() @ right.double().abs() + exact.abs()
    unit = torch.finfo(torch.float32).eps
    assert ((found.double() - exact).abs() <= 2 * left.shape[1] ** 0.5 * unit * sizes).all()


ORDERS = ("rows", "columns", "gaps")
SIZES = ((128, 128, 128), (130, 200, 131), (2000, 1000, 1), (1, 2000, 1000))

#: Addends by the sizes of the result.
ADDENDS: dict[str, Callable[[int, int], Tensor]] = {
    "none": lambda m, n: torch.zeros(()),
    "bias": lambda m, n: torch.randn(n),
    "bias with gaps": lambda m, n: torch.randn(n, 2)[:, 1],
    "bias of one number": lambda m, n: torch.randn(()).expand(n),
    "matrix": lambda m, n: torch.randn(m, n),
    "matrix by columns": lambda m, n: torch.randn(n, m).t(),
    "row": lambda m, n: torch.randn(1, n),
    "column": lambda m, n: torch.randn(m, 1),
    "number": lambda m, n: torch.randn(()),
}


@needs_onednn
@pytest.mark.parametrize("addend", ADDENDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_products_are_exact_but_for_rounding(sizes: tuple[int, int, int], addend: str) -> None:
    m, k, n = sizes
    for orders in itertools.product(ORDERS, ORDERS):
        left, right = operand(m, k, orders[0]), operand(k, n, orders[1])
        exact = left.double() @ right.double()
        if addend == "none":
            found = _mm(left, right)
        else:
            added = ADDENDS[addend](m, n)
            before = added.clone()
            found, exact = _addmm(added, left, right), added.double() + exact
            assert torch.equal(added, before)
        assert_product(found, exact, left, right)
        assert found.data_ptr() not in (left.data_ptr(), right.data_ptr())


def test_a_wrong_product_would_be_seen() -> None:
    left, right = torch.randn(128, 128), torch.randn(128, 128)
    exact = left.double() @ right.double()
    with pytest.raises(AssertionError):
        assert_product((exact * (1 + 1e-4)).float(), exact, left, right)
    half = (left.bfloat16() @ right.bfloat16()).float()
    with pytest.raises(AssertionError):
        assert_product(half, exact, left, right)


@needs_onednn
def test_large_products_are_onednns(counted: list[str]) -> None:
    large = torch.randn(128, 128)
    _mm(large, large)
    _addmm(torch.randn(128), large, large)
    _mm(large.t(), large)
    assert len(counted) == 3


LEFT_TO_ATEN = {
    "small": (torch.randn(124, 128), torch.randn(128, 126)),
    "float64": (torch.randn(128, 128).double(), torch.randn(128, 128).double()),
    "transposed, few columns": (torch.randn(1000, 127).t(), torch.randn(1000, 127)),
}


@pytest.mark.parametrize("what", LEFT_TO_ATEN)
def test_what_would_not_be_faster_stays_with_aten(what: str, counted: list[str]) -> None:
    left, right = LEFT_TO_ATEN[what]
    bias = torch.randn(right.shape[1], dtype=left.dtype)
    assert torch.equal(_mm(left, right), aten.mm.default(left, right))
    assert torch.equal(_addmm(bias, left, right), aten.addmm.default(bias, left, right))
    assert counted == []


def test_scaled_sums_stay_with_aten(counted: list[str]) -> None:
    large, bias = torch.randn(128, 128), torch.randn(128)
    for scales in ({"beta": 0.5}, {"alpha": 2.0}, {"alpha": -0.1, "beta": 0.5}):
        found = _addmm(bias, large, large, **scales)
        assert torch.equal(found, aten.addmm.default(bias, large, large, **scales))
    assert counted == []


@pytest.mark.parametrize("vendor", ["GenuineIntel", "AuthenticAMD", ""])
@pytest.mark.parametrize("capability", ["AVX512", "AVX2", "DEFAULT"])
@pytest.mark.parametrize("library", [True, False])
def test_where_onednn_takes_the_place_of_mkl(
    vendor: str,
    capability: str,
    library: bool,
    asked_anew: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: library)
    taken = (vendor, capability, library) == ("AuthenticAMD", "AVX512", True)
    assert faster_products() == ({"op_mm": _mm, "op_addmm": _addmm} if taken else {})


@pytest.mark.parametrize(
    ("text", "vendor"),
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t: fpu\n", "AuthenticAMD"),
        ("vendor_id\t: GenuineIntel\nvendor_id\t: AuthenticAMD\n", "GenuineIntel"),
        ("CPU implementer\t: 0x41\n", ""),
        (None, ""),
    ],
)
def test_who_has_made_the_processor(
    text: str | None, vendor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path, encoding: str) -> str:
        assert str(path) == "/proc/cpuinfo"
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(Path, "read_text", read)
    assert products._vendor() == vendor


@needs_onednn
def test_a_program_runs_on_them(counted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are those of the program on aten's products, but for rounding."""

    def run() -> list[Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.Linear(128, 2))
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        batch = torch.randn(128, 128), torch.randint(2, (128,))
        program = unrollc.compile(model, opt, torch.nn.functional.cross_entropy, backend="aten")
        loss = program(unrollc.repeat(batch, 2), batch).loss
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    monkeypatch.setattr("unrollc.runtime.executor.faster_products", dict)
    expected = run()
    assert counted == []
    both = {"op_mm": _mm, "op_addmm": _addmm}
    monkeypatch.setattr("unrollc.runtime.executor.faster_products", lambda: both)
    torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-6)
    assert counted
