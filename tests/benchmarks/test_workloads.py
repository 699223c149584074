"""The workloads' implementations compute the same: float64, a few steps."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from implementations import compiled, unrolled
from workloads import build

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("name", ["mlp-small", "learned-opt", "distill"])
def test_unrollc_and_the_unrolled_loop_agree(name: str) -> None:
    ours, peer = (build(name, 3, torch.float64) for _ in range(2))
    losses = compiled(ours)[1]()
    assert losses == pytest.approx(unrolled(peer)(), rel=1e-10)
    for label, leaf in ours.leaves.items():
        expected = peer.leaves[label].grad
        assert leaf.grad is not None and expected is not None
        assert (leaf.grad - expected).norm() <= 1e-10 * expected.norm(), label


def test_another_problem_is_told_apart() -> None:
    """The broken twin: one step less."""
    ours, shorter = build("mlp-small", 3, torch.float64), build("mlp-small", 2, torch.float64)
    assert compiled(ours)[1]() != pytest.approx(unrolled(shorter)(), rel=1e-10)
