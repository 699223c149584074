"""Whatever runs a function, its results lie in memory as the next kernel takes them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from unrollc.backends.bind import arranged, bound
from unrollc.backends.kernel import Kernel, Spec

WANTED = Spec((2, 3), (3, 1), "torch.float32", "cpu")

KERNEL = Kernel(
    text="",
    inputs=(WANTED,),
    outputs=(WANTED, WANTED),
    takes=(0,),
    gives=(0, 2, 1),  # computed, handed on, computed
    arguments=1,
    lists=0,
    residuals=1,
    constants=(),
)


def computed(x: torch.Tensor) -> list[torch.Tensor]:
    """Two results in column-major order."""
    return [(x + n).t().contiguous().t() for n in (1, 2)]


def by_kernel() -> Callable[..., Any]:
    return bound(KERNEL, lambda tensors: computed(*tensors))


def by_ops() -> Callable[..., Any]:
    def function(x: torch.Tensor) -> Any:
        first, second = computed(x)
        return first, x, [second]

    return arranged(KERNEL, function)


@pytest.mark.parametrize("make", [by_kernel, by_ops])
def test_results_are_laid_out(make: Callable[[], Callable[..., Any]]) -> None:
    function, x = make(), torch.arange(6.0).reshape(2, 3)
    for _ in range(2):
        first, same, [second] = function(x)
        assert same is x
        assert torch.equal(first, x + 1) and torch.equal(second, x + 2)
        assert first.stride() == second.stride() == WANTED.stride
