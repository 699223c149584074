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
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        problem = anil(steps=3)
        program, _ = compiled(problem, backend="aten")
        ((train, val),) = problem.tasks
        given = data_of(problem, (train[0].double(), train[1]))
        with without(name):
            program(given, (val[0].double(), val[1])).loss.backward()
            code = program.lower(given, (val[0].double(), val[1])).code
    finally:
        torch.set_default_dtype(before)
    return code, torch.cat([leaf.grad.flatten() for leaf in problem.leaves.values()])


@pytest.mark.parametrize("name", LEFT_OUT)
def test_gradients_without_a_pass(name: str) -> None:
    (code, expected), (other, found) = lowered(None), lowered(name)
    assert found.dtype == torch.float64
    assert (found - expected).norm() <= 1e-10 * expected.norm()
    if name in ("hoisting", "pooling before relu", "fused ops"):
        assert code != other, "nothing was left out"
