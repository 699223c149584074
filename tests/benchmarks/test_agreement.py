"""How far apart two meta-gradients are, and what counts as agreeing."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from agreement import TOLERANCE, _verdict, distance, in_float64
from driver import Job

EXPECTED = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0])}


def test_the_worst_leaf_counts() -> None:
    actual = {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([1.2])}
    assert distance(actual, EXPECTED) == ("b", pytest.approx(0.2))
    assert distance(EXPECTED, EXPECTED) == ("", 0.0)


@pytest.mark.parametrize(
    "actual",
    [
        {"a": EXPECTED["a"]},
        {"a": torch.tensor([math.nan, 4.0]), "b": EXPECTED["b"]},
        {"a": torch.tensor([math.inf, 4.0]), "b": EXPECTED["b"]},
    ],
    ids=["missing", "NaN", "infinite"],
)
def test_what_is_no_gradient_is_infinitely_far(actual: dict[str, torch.Tensor]) -> None:
    assert distance(actual, EXPECTED)[1] == math.inf


def test_rounding_of_a_zero_gradient_is_forgiven_and_a_real_error_beside_it_is_not() -> None:
    expected = EXPECTED | {"zero": torch.tensor([1e-17])}
    assert distance(expected | {"zero": torch.tensor([-1e-16])}, expected)[1] <= TOLERANCE
    assert distance(expected | {"zero": torch.tensor([1e-12])}, expected)[1] > TOLERANCE


def test_verdicts() -> None:
    peer, floor = (Job("mlp", name, None, 3) for name in ("higher", "plain training"))
    reference = ([1.0], EXPECTED)
    wrong = ([1.0], EXPECTED | {"b": torch.tensor([1.1])})
    nothing = ([1.0], {})
    assert _verdict(peer, reference, reference) == {"steps": 3, "worst": 0.0, "leaf": ""}
    assert _verdict(peer, wrong, reference)["failed"].startswith("its meta-gradient of b")
    assert "missing" in _verdict(peer, nothing, reference)["failed"]
    assert _verdict(peer, "why not", reference)["failed"] == "why not"
    # What trains without a meta-gradient is judged by its losses.
    assert "failed" not in _verdict(floor, nothing, reference)
    assert "failed" in _verdict(floor, ([1.1], {}), reference)


def test_jobs_are_compared_in_float64_with_room_for_it() -> None:
    lean = in_float64(Job("gpt-sgd", "unrollc aten", "140MiB"))
    assert (lean.budget, lean.steps, lean.dtype) == ("280MiB", 8, "float64")
    assert in_float64(Job("mlp-long", "jax")).steps == 100
    assert in_float64(Job("mlp-long", "torch.compile")).steps == 2
    assert in_float64(Job("mlp-long", "jax", steps=3)).steps == 3
