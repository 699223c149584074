"""Low and mixed precision, autocast, complex numbers.

In low precision eager PyTorch rounds elsewhere than the program, so two things are held: the values
agree to the precision of the numbers, and what is captured in low precision is, op for op, what is
captured in float64 (conversions aside), where the program is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unrollc
from tests.gradients.programs import gradients
from tests.modules.around import Build, adam, assert_exact, classes, held, mlp, momentum
from tests.oracles import eager, ordinary
from tests.oracles.compare import assert_close

#: bfloat16 has eight significant bits; a gradient goes through some dozen roundings to them.
COARSE = 0.05


class Mixed(nn.Module):
    """One layer in another precision."""

    def __init__(self, low: torch.dtype, high: torch.dtype) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, dtype=low)
        self.norm, self.head = nn.LayerNorm(4, dtype=high), nn.Linear(4, 3, dtype=high)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x.to(self.first.weight.dtype)))
        return self.head(self.norm(hidden.to(self.head.weight.dtype)))


class Autocast(nn.Module):
    """Computes in bfloat16 what autocast chooses, whatever its parameters are."""

    def __init__(self, low: torch.dtype, high: torch.dtype) -> None:
        super().__init__()
        self.net = mlp().to(high)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x.to(self.net[0].weight.dtype)).to(self.net[0].weight.dtype)


MODELS: dict[str, Callable[[torch.dtype, torch.dtype], nn.Module]] = {
    "low throughout": lambda low, high: mlp().to(low),
    "two precisions": Mixed,
    "autocast inside": Autocast,
}


def batches(dtype: torch.dtype) -> list[Any]:
    return [(x.to(dtype), y) for x, y in classes()]


#: What converts or rearranges, which depends on the precision.
_ASIDE = ("_to_copy", "t", "view", "clone", "detach", "expand", "getitem")


def computing(lowered: Any) -> list[str]:
    """The ops of the last step that compute something, in order."""
    calls = [node for node in lowered.step.graph.nodes if node.op == "call_function"]
    names = [node.target.__name__.split(".")[0] for node in calls]
    return [name for name in names if name not in _ASIDE]


@pytest.mark.parametrize("build", [momentum, adam], ids=["momentum", "adam"])
@pytest.mark.parametrize("name", MODELS)
def test_low_precision(name: str, build: Build) -> None:
    low, high = torch.bfloat16, torch.float32
    model = MODELS[name](low, high)
    dtype = low if name == "low throughout" else high
    *train, val = batches(dtype)
    opt, meta = held(model, build)
    trained = ordinary.train(model, opt, F.cross_entropy, train, val)
    expected = eager.unroll(model, opt, F.cross_entropy, train, val)
    program = unrollc.compile(model, opt, F.cross_entropy)
    result = program(train, val)
    assert {k: t.dtype for k, t in result.params.items()} == {
        k: t.dtype for k, t in model.named_parameters()
    }
    assert_close(result.params, trained.params, rtol=2**-7)
    assert_close({"loss": result.loss}, {"loss": trained.loss}, rtol=2**-7)
    found = dict(zip(meta, torch.autograd.grad(result.loss, list(meta.values())), strict=True))
    assert_close(found, gradients(expected.loss, meta), rtol=COARSE)


@pytest.mark.parametrize("name", MODELS)
def test_the_program_in_low_precision_is_that_in_float64(float64: None, name: str) -> None:
    """The low precision is replaced by float64, in which the program is exact."""
    lowered = []
    for low, high in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        model = MODELS[name](low, high)
        *train, val = batches(low if name == "low throughout" else high)
        opt, _ = held(model, momentum)
        opt.param_groups[0]["lr"] = opt.param_groups[0]["lr"].detach().to(high).requires_grad_()
        lowered.append(unrollc.compile(model, opt, F.cross_entropy).lower(train, val))
    low_ops, high_ops = (computing(each) for each in lowered)
    assert low_ops == high_ops and len(high_ops) > 20
    assert lowered[0].step.placeholders[0].meta["val"].dtype is not torch.float64
    assert_exact(MODELS[name](torch.float64, torch.float64), batches(torch.float64))


def test_autocast_around_the_call() -> None:
    """It decides what is captured: the same as autocast inside the model."""
    model = mlp()
    inner = nn.ModuleDict({"net": model})
    results = []
    for subject, outside in ((model, True), (Autocast(torch.bfloat16, torch.float32), False)):
        if not outside:
            subject.load_state_dict(inner.state_dict())
        opt, meta = held(subject, momentum)
        *train, val = batches(torch.float32)

        def loss(prediction: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(prediction.float(), target)

        program = unrollc.compile(subject, opt, loss)
        with torch.autocast("cpu", torch.bfloat16, enabled=outside):
            result = program(train, val)
        results.append((result.loss, *torch.autograd.grad(result.loss, list(meta.values()))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- complex numbers -----------------------------------------------------------------------------


class Complex(nn.Module):
    """Complex layers, holomorphic or not, with a real output."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, dtype=torch.complex128)
        # The imaginary part of a bias moves no real part: Adam would take the root of zero.
        self.head = nn.Linear(4, 3, bias=kind != "holomorphic", dtype=torch.complex128)
        self._kind = kind

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.to(torch.complex128))
        if self._kind == "holomorphic":
            return self.head(torch.tanh(hidden)).real
        if self._kind == "split":
            hidden = torch.complex(torch.tanh(hidden.real), torch.sin(hidden.imag))
            return self.head(hidden).abs()
        spectrum = torch.fft.fft(hidden * hidden.conj())
        return torch.view_as_real(self.head(spectrum)).sum(-1)


class HalfComplex(nn.Module):
    """Real parameters next to complex ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3, dtype=torch.complex128)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.fft.fft(torch.tanh(self.first(x)))).abs()


def as_pairs(rule: eager.Rule) -> eager.Rule:
    """`torch.optim` sees a complex parameter as pairs of real numbers."""

    def pairs(param: Tensor, grad: Tensor, state: Any, step: int, group: Any) -> Any:
        if not param.is_complex():
            return rule(param, grad, state, step, group)
        real, state = rule(
            torch.view_as_real(param), torch.view_as_real(grad.resolve_conj()), state, step, group
        )
        return torch.view_as_complex(real), state

    return pairs


RULES = {kind: as_pairs(rule) for kind, rule in eager.RULES.items()}


@pytest.mark.parametrize("build", [momentum, adam], ids=["momentum", "adam"])
@pytest.mark.parametrize("kind", ["holomorphic", "split", "conjugated"])
def test_complex_fast_weights(float64: None, kind: str, build: Build) -> None:
    """Gradients and cotangents are ∂/∂Re + i·∂/∂Im, as in PyTorch."""
    assert_exact(Complex(kind), classes(), build=build, rules=RULES)


def test_real_and_complex_fast_weights(float64: None) -> None:
    assert_exact(HalfComplex(), classes(), build=adam, rules=RULES)
