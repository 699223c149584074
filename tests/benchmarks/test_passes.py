"""Programs without one optimisation: another program, the same gradients."""

import functools
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from implementations import compiled, data_of
from passes import LEFT_OUT, anil, without


@functools.cache
def lowered(name: str | None) -> tuple[str, Tensor]:
    """A program's code, and its meta-gradients as one vector."""
    problem = anil(3, torch.float64)
    program, _ = compiled(problem, backend="aten")
    ((train, val),) = problem.tasks
    with without(name):
        program(data_of(problem, train), val).loss.backward()
        code = program.lower(data_of(problem, train), val).code
    return code, torch.cat([leaf.grad.flatten() for leaf in problem.leaves.values()])


@pytest.mark.parametrize("name", LEFT_OUT)
def test_gradients_without_a_pass(name: str) -> None:
    (code, expected), (other, found) = lowered(None), lowered(name)
    assert found.dtype == torch.float64
    assert (found - expected).norm() <= 1e-10 * expected.norm()
    if name in ("hoisting", "pooling before relu", "fused ops"):
        assert code != other, "nothing was left out"
