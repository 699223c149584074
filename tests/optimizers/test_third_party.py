"""Each optimizer of `pytorch-optimizer` against its own eager step, and against its row."""

import functools

import pytest
from pytorch_optimizer import get_supported_optimizers

from docs import generate_third_party_optimizers as generator
from tests.optimizers.pytorch_optimizer import CHECKED, row_of

NAMES = sorted(get_supported_optimizers())


@functools.cache
def _rows() -> dict[str, str]:
    """The rows of the page by the optimizer's name."""
    lines = generator.PAGE.read_text(encoding="utf-8").splitlines()
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
    text = generator.PAGE.read_text(encoding="utf-8")
    assert set(NAMES) <= set(_rows())
    captured = sum(_rows()[name].count("|") > 3 for name in NAMES)
    assert captured >= 100
    assert f"{captured} of {len(NAMES)}" in text
