"""The comparison fails when it should."""

import pytest
import torch

from tests.oracles.compare import assert_close, flattened, relative_error


def test_what_differs_is_named() -> None:
    right = {"a": torch.ones(3), "b": torch.ones(2)}
    assert_close(right, right)
    with pytest.raises(AssertionError, match=r"b: relative error 1\.0"):
        assert_close(right | {"b": torch.ones(2, dtype=torch.float64) + 1e-9}, right)


@pytest.mark.parametrize(
    "wrong",
    [
        {"a": torch.tensor([1.0, float("nan")])},
        {"a": None},
        {"a": torch.ones(3)},
        {},
        {"a": torch.ones(2), "b": torch.ones(2)},
    ],
)
def test_nan_missing_and_misshapen_entries_fail(wrong: dict[str, torch.Tensor | None]) -> None:
    with pytest.raises(AssertionError):
        assert_close(wrong, {"a": torch.ones(2)})


def test_a_zero_is_not_none() -> None:
    with pytest.raises(AssertionError, match="expected None"):
        assert_close({"a": torch.zeros(2)}, {"a": None})


def test_the_error_is_relative_to_the_expected_norm() -> None:
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == 0.1
    assert relative_error(torch.tensor([1e-3]), torch.zeros(1)) == pytest.approx(1e-3)


def test_nested_state_is_flattened() -> None:
    flat = flattened({"w": {"step": 3, "buffer": torch.ones(2)}, "b": {"buffer": None}})
    assert set(flat) == {"w.step", "w.buffer"}
    assert flat["w.step"] == 3
