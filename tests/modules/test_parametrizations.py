"""Parametrizations of weights, those of `torch.nn.utils` and users' own, are exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from tests.modules.around import assert_exact, classes, mlp, twin

pytestmark = pytest.mark.usefixtures("float64")


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).mT


class Bounded(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, weight: Tensor) -> Tensor:
        return self.scale * torch.tanh(weight)


def symmetric(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Symmetric())


def stacked(layer: nn.Module) -> nn.Module:
    symmetric(layer)
    return parametrize.register_parametrization(layer, "weight", Bounded())


def pruned(layer: nn.Module) -> nn.Module:
    prune.l1_unstructured(layer, "weight", amount=0.4)
    return prune.random_unstructured(layer, "bias", amount=1)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm of the whole": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "spectral norm": parametrizations.spectral_norm,
    "spectral norm, two iterations": lambda layer: parametrizations.spectral_norm(
        layer, n_power_iterations=2
    ),
    "spectral norm, evaluated": lambda layer: parametrizations.spectral_norm(layer).eval(),
    "spectral norm by hooks": nn.utils.spectral_norm,
    "spectral norm by hooks, evaluated": lambda layer: nn.utils.spectral_norm(layer).eval(),
    "orthogonal by the matrix exponential": lambda layer: parametrizations.orthogonal(
        layer, orthogonal_map="matrix_exp"
    ),
    "orthogonal by Cayley": lambda layer: parametrizations.orthogonal(
        layer, orthogonal_map="cayley"
    ),
    "orthogonal by Householder": lambda layer: parametrizations.orthogonal(
        layer, orthogonal_map="householder"
    ),
    "orthogonal without a base": lambda layer: parametrizations.orthogonal(
        layer, orthogonal_map="cayley", use_trivialization=False
    ),
    "symmetric": symmetric,
    "symmetric, then bounded": stacked,
    "pruned": pruned,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_parametrized_layer_is_exact(name: str) -> None:
    assert_exact(mlp(WRAPPERS[name](nn.Linear(4, 4))), classes())


@pytest.mark.parametrize(("shape", "kind"), [((4, 6), "cayley"), ((4, 3), "householder")])
def test_rectangular_orthogonal_weights(shape: tuple[int, int], kind: str) -> None:
    layer = parametrizations.orthogonal(nn.Linear(*shape), orthogonal_map=kind)
    assert_exact(nn.Sequential(layer, nn.Tanh(), nn.Linear(shape[1], 3)), classes())


class ExplicitNorm(nn.Module):
    """Weight normalisation by plain ops, since PyTorch's fused op has a wrong second derivative."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self._others = [axis for axis in range(2) if axis != dim]

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        return v * (g / v.square().sum(self._others, keepdim=True).sqrt())

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.square().sum(self._others, keepdim=True).sqrt(), weight


@pytest.mark.parametrize("dim", [0, 1])
def test_weight_norm(dim: int) -> None:
    """Eager double backward of the fused op is off by 9 %; the same by plain ops is the oracle."""

    def explicit() -> nn.Module:
        layer = nn.Linear(4, 4)
        return mlp(parametrize.register_parametrization(layer, "weight", ExplicitNorm(dim)))

    model = mlp(parametrizations.weight_norm(nn.Linear(4, 4), dim=dim))
    assert_exact(model, classes(), plain=twin(model, explicit))


class OldNorm(nn.Module):
    """A linear layer with the parameters of ``nn.utils.weight_norm``, by plain ops."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(4))
        self.weight_g = nn.Parameter(torch.empty(4, 1))
        self.weight_v = nn.Parameter(torch.empty(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        weight = ExplicitNorm(0)(self.weight_g, self.weight_v)
        return F.linear(x, weight, self.bias)


def test_weight_norm_by_hooks() -> None:
    model = mlp(nn.utils.weight_norm(nn.Linear(4, 4)))
    assert_exact(model, classes(), plain=twin(model, lambda: mlp(OldNorm())))


class Twice(nn.Module):
    def __init__(self, cached: bool) -> None:
        super().__init__()
        self.net = mlp(parametrizations.spectral_norm(nn.Linear(4, 4)))
        self._cached = cached

    def forward(self, x: Tensor) -> Tensor:
        if not self._cached:
            return self.net(x) + self.net(2 * x)
        with parametrize.cached():
            return self.net(x) + self.net(2 * x)


def test_a_cached_parametrization_is_computed_once_a_step() -> None:
    """Cached, the power iteration runs once a forward and not twice, which the buffers show."""
    model = Twice(cached=True)
    other = twin(model, lambda: Twice(cached=False))
    cached = assert_exact(model, classes())
    plain = assert_exact(other, classes())
    name = "net.0.parametrizations.weight.0._u"
    assert not torch.allclose(cached.buffers[name], plain.buffers[name])


def test_a_parametrized_weight_that_is_shared() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    assert_exact(nn.Sequential(first, nn.Tanh(), symmetric(second), nn.Linear(4, 3)), classes())
