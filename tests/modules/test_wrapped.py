"""Models as users build them: shared weights, hooks, memories, functional calls, compiled parts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unrollc
from tests.modules.around import assert_exact, classes, held, mlp, momentum, twin
from tests.oracles.objectives import Objective

pytestmark = pytest.mark.usefixtures("float64")


# --- weights in several places, in-place layers, buffers -----------------------------------------


class Tied(nn.Module):
    """An embedding whose weight is also that of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.middle = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.embed(tokens).mean(1))))


def test_tied_weights() -> None:
    tokens = [(torch.randint(7, (5, 3)), torch.randint(7, (5,))) for _ in range(3)]
    assert_exact(Tied(), tokens)


def test_a_module_that_is_used_twice() -> None:
    """``functional_call``, of which the oracle is made, leaves such a model changed."""

    def build() -> nn.Module:
        shared = nn.Linear(4, 4)
        return nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(4, 3))

    model = build()
    before = list(model.parameters())
    assert_exact(model, classes(), plain=twin(model, build))
    assert all(p is q for p, q in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "layer",
    [nn.ReLU(inplace=True), nn.ELU(inplace=True), nn.SiLU(inplace=True), nn.Dropout(0, True)],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_work_in_place(layer: nn.Module) -> None:
    assert_exact(mlp(second=layer), classes())


class Bank(nn.Module):
    """A memory that is mixed with what comes, in place or anew, and a counter."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.register_buffer("bank", torch.zeros(4))
        self.register_buffer("count", torch.tensor(0))
        self._in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.layer(x))
        self.count += 1
        if self._in_place:
            self.bank.mul_(0.9).add_(0.1 * hidden.mean(0))
        else:
            self.bank = 0.9 * self.bank + 0.1 * hidden.mean(0).detach()
        return self.head(hidden + self.bank)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_memory_bank(in_place: bool) -> None:
    """In place, the memory carries a derivative from step to step."""
    assert_exact(Bank(in_place), classes(steps=3))


# --- hooks ---------------------------------------------------------------------------------------


def hooked() -> nn.Module:
    model = mlp()
    model[0].register_forward_hook(lambda module, given, out: 2 * out)
    model[1].register_forward_hook(lambda module, given, keywords, out: out + 1, with_kwargs=True)
    model[2].register_forward_pre_hook(lambda module, given: (torch.sin(given[0]),))
    return model


def test_forward_hooks() -> None:
    assert_exact(hooked(), classes())


@pytest.mark.parametrize(
    "register", [nn.Module.register_full_backward_hook, nn.Module.register_full_backward_pre_hook]
)
def test_module_backward_hooks_are_refused(register: Callable[..., Any]) -> None:
    model = mlp()
    register(model[0], lambda *details: None)
    opt, _ = held(model, momentum)
    *train, val = classes()
    with pytest.raises(unrollc.CaptureError, match="module '0' has a backward hook") as caught:
        unrollc.compile(model, opt, F.cross_entropy).lower(train, val)
    assert "register_hook" in caught.value.remedy


# --- functional calls and derivatives inside -----------------------------------------------------


class Halved(nn.Module):
    """Calls its own network with other weights."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.net = mlp()
        self._call = call

    def forward(self, x: Tensor) -> Tensor:
        return self._call(self.net, {k: 0.5 * v for k, v in self.net.named_parameters()}, (x,))


@pytest.mark.parametrize(
    "call", [torch.func.functional_call, nn.utils.stateless.functional_call], ids=["func", "utils"]
)
@pytest.mark.filterwarnings("ignore:This API is deprecated")
def test_functional_call_in_a_forward(call: Callable[..., Any]) -> None:
    assert_exact(Halved(call), classes())


def mapped(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(torch.func.vmap(model)(batch[0]), batch[1])


def per_sample(model: nn.Module, batch: Any) -> Tensor:
    def one(params: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, params, (x,)), y)

    grads = torch.func.vmap(torch.func.grad(one), (None, 0, 0))
    found = grads(dict(model.named_parameters()), *batch)
    return F.cross_entropy(model(batch[0]), batch[1]) + sum(
        g.square().sum() for g in found.values()
    )


def pushed(model: nn.Module, batch: Any) -> Tensor:
    out, tangent = torch.func.jvp(model, (batch[0],), (torch.ones_like(batch[0]),))
    return F.cross_entropy(out, batch[1]) + tangent.square().mean()


def penalized(model: nn.Module, batch: Any) -> Tensor:
    """The gradient penalty of Wasserstein critics (Gulrajani et al. 2017)."""
    x = batch[0].detach().clone().requires_grad_()
    out = model(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return F.cross_entropy(out, batch[1]) + (slope.norm(dim=1) - 1).square().mean()


def penalized_at_once(model: nn.Module, batch: Any) -> Tensor:
    """The batch itself is marked, and the gradient is of second order."""
    x = batch[0].requires_grad_()
    (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    (curve,) = torch.autograd.grad(slope.square().sum(), x, create_graph=True)
    return F.cross_entropy(model(x), batch[1]) + curve.square().mean()


def flat(model: nn.Module, batch: Any) -> Tensor:
    """A penalty on the gradient by the weights."""
    loss = F.cross_entropy(model(batch[0]), batch[1])
    grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    return loss + 0.1 * sum(g.square().sum() for g in grads)


def adversarial(model: nn.Module, batch: Any) -> Tensor:
    """Inputs moved along a gradient that is a constant, since no graph of it is made."""
    x = batch[0].detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(model(x), batch[1]), x)
    return F.cross_entropy(model(x + 0.5 * slope), batch[1])


def stepped(model: nn.Module, batch: Any) -> Tensor:
    """A step of gradient descent of its own: the loss of MAML inside the inner loss."""
    names, params = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(
        F.cross_entropy(model(batch[0]), batch[1]), params, create_graph=True
    )
    moved = {n: p - 0.3 * g for n, p, g in zip(names, params, grads, strict=True)}
    return F.cross_entropy(torch.func.functional_call(model, moved, (batch[0],)), batch[1])


def curved(model: nn.Module, batch: Any) -> Tensor:
    jacobian = torch.autograd.functional.jacobian(
        lambda x: model(x).sum(0), batch[0], create_graph=True
    )
    return F.cross_entropy(model(batch[0]), batch[1]) + jacobian.square().mean()


DERIVED = [
    mapped, per_sample, pushed, penalized, penalized_at_once, flat, adversarial, stepped, curved
]  # fmt: skip


@pytest.mark.parametrize("loss", DERIVED, ids=lambda loss: loss.__name__)
def test_derivatives_inside_an_objective(loss: Callable[..., Tensor]) -> None:
    def own_batch(model: nn.Module, batch: Any) -> Tensor:
        return loss(model, (batch[0].clone(), batch[1]))  # eager PyTorch would mark the user's

    plain = Objective(own_batch) if loss is penalized_at_once else None
    assert_exact(mlp(), classes(), Objective(loss), plain_loss=plain)


# --- compiled, scripted and copied parts ---------------------------------------------------------


@torch.jit.script
def doubled(x: Tensor) -> Tensor:
    return torch.tanh(x) * 2.0


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(doubled(self.layer(x)))


class Plain(Scripted):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x)) * 2.0)


class ScriptedPart(nn.Module):
    def __init__(self, scripted: bool) -> None:
        super().__init__()
        net = mlp(second=nn.GELU())
        self.net = torch.jit.script(net) if scripted else net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * 2


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("optimized", [False, True])
def test_scripts_are_what_they_compute(optimized: bool) -> None:
    """The executor rewrites a script after some runs, and detaches what it has rewritten."""
    whole, part = Scripted(), ScriptedPart(scripted=True)
    for _ in range(4 if optimized else 0):
        for model in (whole, part):
            torch.autograd.grad(model(torch.ones(3, 4)).sum(), list(model.parameters()))
    assert_exact(whole, classes(), plain=twin(whole, lambda: Plain()))
    assert_exact(part, classes(), plain=twin(part, lambda: ScriptedPart(scripted=False)))


def test_a_traced_submodule() -> None:
    layer = nn.Linear(4, 4)
    model = mlp(torch.jit.trace(layer, torch.ones(2, 4)))
    assert_exact(model, classes(), plain=twin(model, mlp))


def compiled_submodule() -> nn.Module:
    model = mlp()
    model[0].compile()
    return model


@torch.compile
def doubled_too(x: Tensor) -> Tensor:
    return torch.tanh(x) * 2.0


class CompiledFunction(Scripted):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(doubled_too(self.layer(x)))


def test_compiled_parts_are_run_as_they_are_written() -> None:
    """Eager PyTorch has no second derivative of compiled code, so their originals are the oracle.

    The compiled modules wrap the originals and have their parameters, under other names.
    """
    model = compiled_submodule()
    assert_exact(model, classes(), plain=twin(model, mlp))
    model = CompiledFunction()
    assert_exact(model, classes(), plain=twin(model, Plain))
    original = mlp()
    losses = []
    for subject in (original, torch.compile(original), nn.Sequential(torch.compile(original))):
        opt, meta = held(subject, momentum)
        *train, val = classes()
        result = unrollc.compile(subject, opt, F.cross_entropy)(train, val)
        losses.append((result.loss, *torch.autograd.grad(result.loss, list(meta.values()))))
    for other in losses[1:]:
        assert all(torch.equal(a, b) for a, b in zip(losses[0], other, strict=True))


class Taught(nn.Module):
    """A copy of the network teaches it; copying cuts the gradient, as a detach would."""

    def __init__(self, copied: bool) -> None:
        super().__init__()
        self.net = mlp()
        self._copied = copied

    def forward(self, x: Tensor) -> Tensor:
        if self._copied:
            return self.net(x) - 0.5 * copy.deepcopy(self.net)(x)
        weights = {name: p.detach() for name, p in self.net.named_parameters()}
        return self.net(x) - 0.5 * torch.func.functional_call(self.net, weights, (x,))


def test_a_deep_copy_in_a_forward_is_a_constant() -> None:
    model = Taught(copied=True)
    assert_exact(model, classes(), plain=twin(model, lambda: Taught(copied=False)))
