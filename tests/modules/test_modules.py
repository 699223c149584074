"""Every module of `torch.nn` in the inner loop, and docs/modules.md, which says so.

A case computes the words of its own row of the page, so the page holds what was seen.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from docs.generate_modules import PAGE, rows_of
from tests.modules.case import NO_SECOND, Calling, Case, layer
from tests.modules.cases import CASES, WITHOUT, public_modules
from tests.modules.verdict import verdict

pytestmark = pytest.mark.usefixtures("float64")

ROWS = rows_of(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_the_gradient_is_that_of_its_oracle(case: Case) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ROWS[case.key] == verdict(case)


def test_every_module_of_torch_nn_has_a_case() -> None:
    named = {case.name for case in CASES if hasattr(nn, case.name)}
    assert not named & set(WITHOUT)
    assert named | set(WITHOUT) == public_modules()


def test_the_page_has_the_rows_of_the_table() -> None:
    keys = [case.key for case in CASES]
    assert len(set(keys)) == len(keys)
    assert list(ROWS) == keys


# --- broken twins -----------------------------------------------------------------------------


class Halved(torch.autograd.Function):
    """Twice the argument in value, once in the derivative of the inner gradient alone."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None:
        pass

    @staticmethod
    def backward(ctx: object, cotangent: Tensor) -> Tensor:
        return cotangent


BROKEN = layer("Sequential", "", lambda: nn.Sequential(Calling(Halved.apply), nn.Tanh()))


def test_a_wrong_derivative_is_caught_by_finite_differences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr("tests.modules.verdict._eagerly", refused)
    with pytest.raises(AssertionError, match="finite differences"):
        verdict(replace(BROKEN, finite=NO_SECOND))


def test_a_finite_case_that_eager_can_judge_is_caught() -> None:
    with pytest.raises(AssertionError, match="better oracle"):
        verdict(replace(layer("ReLU", "", nn.ReLU), finite=NO_SECOND))


def test_a_refusal_that_is_none_is_caught() -> None:
    with pytest.raises(AssertionError, match="is not refused"):
        verdict(replace(layer("ReLU", "", nn.ReLU), refused="a reason", error="words"))


def test_other_noise_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.modules.verdict.seed_of_next_run", lambda: 1)
    with pytest.raises(AssertionError, match="relative error"):
        verdict(layer("Dropout", "", nn.Dropout, noisy=True))
