"""Each optimizer of `pytorch-optimizer` against its own eager step, and against its row."""

import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from pytorch_optimizer import get_supported_optimizers

from tests.optimizers.pytorch_optimizer import CHECKED, row_of

NAMES = sorted(get_supported_optimizers())
_GENERATOR = Path(__file__).resolve().parents[2] / "docs" / "generate_third_party_optimizers.py"


@functools.cache
def _generator() -> Any:
    spec = importlib.util.spec_from_file_location("generate_third_party_optimizers", _GENERATOR)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def _rows() -> dict[str, str]:
    """The rows of the page by the optimizer's name."""
    lines = _generator().PAGE.read_text(encoding="utf-8").splitlines()
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}


@pytest.mark.parametrize("name", NAMES)
def test_row(name: str) -> None:
    row = row_of(name)
    assert str(row) == _rows()[name]
    if row.captured:
        assert row.equal == "≤ 1e-10"
        assert row.theta == CHECKED or (name == "a2grad" and row.theta.startswith("NaN: `"))
        assert row.lr == CHECKED or row.lr.startswith(("no meta-gradient", "`lr` is"))
    else:
        assert "AssertionError" not in row.reason and "FakeTensor" not in row.reason


def test_the_page_is_about_these() -> None:
    """Every optimizer has its row, the counts in the text are those of the rows."""
    text = _generator().PAGE.read_text(encoding="utf-8")
    assert set(NAMES) <= set(_rows())
    captured = sum(_rows()[name].count("|") > 3 for name in NAMES)
    assert captured >= 100
    assert f"{captured} of {len(NAMES)}" in text
