"""The short derivative of batch normalisation's backward pass against PyTorch's own."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracles.compare import relative_error
from unrollc.differentiate import batch_norm

aten = torch.ops.aten

SHAPES = {"images": (3, 4, 2, 5), "rows": (6, 4), "series": (3, 4, 7), "volumes": (2, 4, 2, 3, 2)}


def operands(shape: tuple[int, ...], layout: torch.memory_format) -> list[Tensor]:
    """g, x, γ, μ, r, and the cotangents u, v, w."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    g, x, u = (draw(*shape).contiguous(memory_format=layout) for _ in range(3))
    x = x + 3
    _, mean, rstd = aten._native_batch_norm_legit.no_stats(x, None, None, True, 0.1, 1e-2)
    return [g, x, draw(4), mean, rstd, u, draw(4), draw(4)]


def pulled(
    function: Any, given: list[Tensor], rest: tuple[Any, ...], reached: tuple[bool, ...]
) -> tuple[Any, ...]:
    g, x, weight, mean, rstd, *cotangents = given
    leaves = [each.clone().requires_grad_() for each in (g, x, weight)]
    results = function(*leaves, None, None, mean, rstd, *rest)
    outputs, seeds = (list(itertools.compress(each, reached)) for each in (results, cotangents))
    found = torch.autograd.grad(outputs, leaves, seeds, allow_unused=True)
    values = [each.detach() for each in results if each is not None]
    return (*values, *(0 * a if b is None else b for a, b in zip(given, found, strict=False)))


REACHED = [each for each in itertools.product([True, False], repeat=3) if any(each)]


@pytest.mark.parametrize("reached", REACHED)
@pytest.mark.parametrize("name", SHAPES)
def test_the_derivative_is_that_of_pytorch(name: str, reached: tuple[bool, ...]) -> None:
    given = operands(SHAPES[name], torch.contiguous_format)
    rest = (True, 1e-2, [True, True, True])
    ours = pulled(batch_norm.backward, given, rest, reached)
    theirs = pulled(aten.native_batch_norm_backward.default, given, rest, reached)
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= 1e-13 * max(float(other.norm()), 1.0)


def test_a_weight_of_zero_is_no_exception() -> None:
    given = operands(SHAPES["images"], torch.channels_last)
    given[2][0] = 0
    rest = (True, 1e-2, [True, True, True])
    ours = pulled(batch_norm.backward, given, rest, (True, True, True))
    theirs = pulled(aten.native_batch_norm_backward.default, given, rest, (True, True, True))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.isfinite(one).all()
        assert relative_error(one, other) < 1e-13


def test_differences_of_the_backward_pass_agree() -> None:
    g, x, weight, *_, u, v, w = operands(SHAPES["images"], torch.contiguous_format)

    def value(g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        _, mean, rstd = aten._native_batch_norm_legit.no_stats(x, None, None, True, 0.1, 1e-2)
        found = batch_norm.backward(
            g, x, weight, None, None, mean.detach(), rstd.detach(), True, 1e-2, [True] * 3
        )
        return sum((a * b).sum() for a, b in zip(found, (u, v, w), strict=True))  # type: ignore[return-value]

    leaves = tuple(each.clone().requires_grad_() for each in (g, x, weight))
    assert torch.autograd.gradcheck(value, leaves, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_other_cases_are_left_to_pytorch(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch without a weight, and running statistics, which are constants."""
    monkeypatch.delattr(batch_norm, "_Backward")
    given = operands(SHAPES["images"], torch.contiguous_format)
    g, x, weight, mean, rstd, *_ = given
    rest = (mean, rstd**-2, mean, rstd, training, 1e-2, [True, not training, True])
    found = batch_norm.backward(g, x, None if training else weight, *rest)
    assert found[0].shape == x.shape


def test_what_is_not_wanted_is_none() -> None:
    g, x, weight, mean, rstd, *_ = operands(SHAPES["images"], torch.contiguous_format)
    rest = (None, None, mean, rstd, True, 1e-2, [True, False, True])
    dx, dweight, dbias = batch_norm.backward(g, x, weight, *rest)
    assert dweight is None and dx.shape == x.shape and dbias.shape == weight.shape
