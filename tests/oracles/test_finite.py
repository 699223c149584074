"""Finite differences on functions whose derivatives are known."""

import pytest
import torch

from tests.oracles import finite


def test_smooth_functions_to_ten_digits() -> None:
    x = torch.linspace(-1, 2, 7, dtype=torch.float64)
    direction = torch.cos(3 * x)
    for function, derivative in [
        (torch.sin, torch.cos),
        (torch.exp, torch.exp),
        (torch.tanh, lambda x: 1 - torch.tanh(x) ** 2),
        (lambda x: x**3, lambda x: 3 * x**2),
    ]:
        expected = float((derivative(x) * direction).sum())
        found = finite.directional_derivative(lambda f=function: f(x).sum(), x, direction)
        assert abs(found.value - expected) < 1e-10 * abs(expected)
        assert found.error < 1e-9


def test_the_tensor_keeps_its_bits_even_if_the_function_raises() -> None:
    x = torch.randn(5, dtype=torch.float64)
    before = x.clone()
    finite.directional_derivative(lambda: x.square().sum(), x, torch.ones_like(x))
    assert torch.equal(x, before)

    def fails() -> float:
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        finite.directional_derivative(fails, x, torch.ones_like(x))
    assert torch.equal(x, before)


def test_the_error_is_large_at_a_kink() -> None:
    x = torch.tensor([1e-5], dtype=torch.float64)  # the kink lies within every step
    estimate = finite.directional_derivative(lambda: x.abs().sum(), x, torch.ones_like(x))
    smooth = finite.directional_derivative(lambda: x.square().sum(), x, torch.ones_like(x))
    assert smooth.error < 1e-12
    assert estimate.error > 1e-3


def test_a_gradient_that_is_a_little_wrong_is_caught() -> None:
    x = torch.randn(6, dtype=torch.float64)
    finite.assert_gradient(lambda: x.sin().sum(), x, x.cos(), rtol=1e-9)
    with pytest.raises(AssertionError, match="finite differences"):
        finite.assert_gradient(lambda: x.sin().sum(), x, x.cos() * (1 + 1e-6))
    with pytest.raises(AssertionError, match="finite differences"):
        finite.assert_gradient(lambda: x.sin().sum(), x, torch.full_like(x, float("nan")))


def test_float32_is_refused() -> None:
    x = torch.randn(3)
    with pytest.raises(ValueError, match="float64"):
        finite.directional_derivative(lambda: x.sum(), x, torch.ones(3))
