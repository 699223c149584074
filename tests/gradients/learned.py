"""Learned optimizers for the tests: the class as a user writes it, and the same rule as a function.

The function is the oracle's: pure, without ``no_grad`` and without in-place ops, so that eager
PyTorch differentiates it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import unrollc
from tests.oracles import cases
from tests.oracles.objectives import Batch, unstack

Params = dict[str, Tensor]
#: ``(θ, G, state) -> (θ', state')``; the state is None before the first step.
Rule = Callable[[Params, Params, Any], tuple[Params, Any]]

PREPROCESSING = 10.0


def preprocessed(g: Tensor) -> Tensor:
    """[n] -> [n, 2]: log-magnitude and sign (Andrychowicz et al. 2016, appendix A)."""
    small = math.exp(-PREPROCESSING)
    size = g.abs()
    log = torch.where(size >= small, size.clamp(min=small).log() / PREPROCESSING, -1.0)
    return torch.stack([log, torch.where(size >= small, g.sign(), g / small)], 1)


@dataclass(frozen=True)
class Unrolled:
    """An eager run: validation loss on the autograd graph, and what it ends with."""

    loss: Tensor
    params: Params
    state: Any
    inner_losses: Tensor


def unroll(
    model: nn.Module,
    rule: Rule,
    batches: Sequence[Batch],
    val: Batch,
    *,
    first_order: bool = False,
    back: int | None = None,
) -> Unrolled:
    """The inner loop by hand: ``torch.autograd.grad`` with a graph, then the rule."""
    theta: Params = dict(model.named_parameters())
    state, losses = None, []
    start = 0 if back is None else len(batches) - back
    for j, (x, y) in enumerate(batches):
        if 0 < j == start:
            theta = {name: p.detach().requires_grad_() for name, p in theta.items()}
            state = torch.utils._pytree.tree_map(Tensor.detach, state)
        loss = F.cross_entropy(functional_call(model, theta, (x,)), y)
        losses.append(loss.detach())
        found = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        grads = dict(zip(theta, found, strict=True))
        if first_order:
            grads = {name: g.detach() for name, g in grads.items()}
        theta, state = rule(theta, grads, state)
    loss = F.cross_entropy(functional_call(model, theta, (val[0],)), val[1])
    return Unrolled(loss, theta, state, torch.stack(losses))


T = 2
SHAPE = (5, 4)

Build = Callable[[Any], torch.optim.Optimizer]


class Setting:
    """A small model, an optimizer over it that holds networks, and data for T steps."""

    def __init__(self, build: Build, steps: int = T) -> None:
        # Bounded scores: softmax does not see a shift of all of them, and the update's bias is one.
        self.model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
        self.opt = build(self.model.parameters())
        self.train = cases.batches(SHAPE, steps, seed=1)
        self.val = unstack(cases.batches(SHAPE, 1, seed=2))[0]

    def program(self, **options: Any) -> unrollc.Program:
        return unrollc.compile(self.model, self.opt, F.cross_entropy, **options)

    def unroll(self, rule: Rule, **options: Any) -> Unrolled:
        return unroll(self.model, rule, unstack(self.train), self.val, **options)


# --- a network for each parameter tensor: gradient and momenta in, update out ---------------------


class Mlp(nn.Module):
    """[n, 3] -> [n]"""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(3, 4), nn.Linear(4, 1)
        self.inner = inner or nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(self.hidden(features)))).squeeze(1)


class _Halved(torch.autograd.Function):
    """The identity, declared to have half its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 0.5 * gradient


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Halved.apply(x)


class PerParameter(torch.optim.Optimizer):
    """An MLP on the gradient and two momenta of each coordinate."""

    def __init__(self, params: Any, net: nn.Module) -> None:
        super().__init__(params, {})
        self.net = net

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["fast"], state["slow"] = torch.zeros_like(p), torch.zeros_like(p)
                state["fast"].mul_(0.5).add_(p.grad)
                state["slow"].mul_(0.9).add_(p.grad.detach())
                features = torch.stack([p.grad, state["fast"], state["slow"]], -1)
                update = self.net(features.flatten(0, -2))
                p.data.add_(update.view_as(p), alpha=0.3)


def per_parameter(net: Callable[[Tensor], Tensor]) -> Rule:
    def rule(theta: Params, grads: Params, state: Any) -> tuple[Params, Any]:
        new, kept = {}, {}
        for name, p in theta.items():
            fast, slow = (state[name]["fast"], state[name]["slow"]) if state else (0.0, 0.0)
            fast, slow = 0.5 * fast + grads[name], 0.9 * slow + grads[name]
            features = torch.stack([grads[name].flatten(), fast.flatten(), slow.flatten()], 1)
            new[name] = p + 0.3 * net(features).view_as(p)
            kept[name] = {"fast": fast, "slow": slow}
        return new, kept

    return rule


# --- an LSTM that runs over the coordinates -------------------------------------------------------


class TwoCells(nn.Module):
    """Two LSTM layers; ``([n, 2], ((h, c), (h, c))) -> ([n], ((h, c), (h, c)))``"""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.first, self.second = nn.LSTMCell(2, hidden), nn.LSTMCell(hidden, hidden)
        self.out = nn.Linear(hidden, 1)

    def zeros(self, n: int) -> Any:
        return tuple((torch.zeros(n, self.hidden), torch.zeros(n, self.hidden)) for _ in range(2))

    def forward(self, g: Tensor, memory: Any) -> tuple[Tensor, Any]:
        first = self.first(preprocessed(g), memory[0])
        second = self.second(first[0], memory[1])
        return 0.5 * self.out(second[0]).squeeze(1), (first, second)


class Coordinatewise(torch.optim.Optimizer):
    """Andrychowicz et al. 2016: one LSTM for every coordinate, each with a memory of its own."""

    def __init__(self, params: Any, net: TwoCells) -> None:
        super().__init__(params, {})
        self.net = net

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                memory = self.state[p].get("memory") or self.net.zeros(p.numel())
                update, memory = self.net(p.grad.flatten(), memory)
                self.state[p]["memory"] = memory
                p.add_(update.view_as(p))


def coordinatewise(net: TwoCells) -> Rule:
    def rule(theta: Params, grads: Params, state: Any) -> tuple[Params, Any]:
        new, kept = {}, {}
        for name, p in theta.items():
            memory = state[name]["memory"] if state else net.zeros(p.numel())
            update, memory = net(grads[name].flatten(), memory)
            new[name], kept[name] = p + update.view_as(p), {"memory": memory}
        return new, kept

    return rule


class Concatenated(torch.optim.Optimizer):
    """The same on one long vector, by ``nn.LSTM``, its memory under a name of its own.

    The update begins with ``enable_grad``, as code does that was written to be differentiated.
    """

    def __init__(self, params: Any, lstm: nn.LSTM, out: nn.Module) -> None:
        super().__init__(params, {})
        self.nets = [lstm, out]

    @torch.enable_grad()
    def step(self, closure: Any = None) -> None:
        lstm, out = self.nets
        params = self.param_groups[0]["params"]
        g = torch.cat([p.grad.flatten() for p in params])
        hidden, self.state["shared"] = lstm(preprocessed(g)[None], self.state["shared"] or None)
        updates = out(hidden[0]).flatten().split([p.numel() for p in params])
        for p, update in zip(params, updates, strict=True):
            p.data.add_(update.view_as(p))


def concatenated(lstm: nn.LSTM, out: nn.Module) -> Rule:
    def rule(theta: Params, grads: Params, state: Any) -> tuple[Params, Any]:
        g = torch.cat([grads[name].flatten() for name in theta])
        hidden, state = lstm(preprocessed(g)[None], state)
        updates = out(hidden[0]).flatten().split([p.numel() for p in theta.values()])
        pairs = zip(theta.items(), updates, strict=True)
        return {name: p + update.view_as(p) for (name, p), update in pairs}, state

    return rule


# --- a learned learning rate for each tensor ------------------------------------------------------


class Rates(torch.optim.Optimizer):
    """A network of the gradient's statistics gives each tensor its learning rate."""

    def __init__(self, params: Any, net: nn.Module) -> None:
        super().__init__(params, {"net": net, "scale": 0.3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                rate = F.softplus(group["net"](statistics(p.grad)))
                p.sub_(rate * p.grad, alpha=group["scale"])


def statistics(g: Tensor) -> Tensor:
    return torch.stack([g.mean(), g.square().mean().sqrt(), g.abs().max()])


def rates(net: nn.Module) -> Rule:
    def rule(theta: Params, grads: Params, state: Any) -> tuple[Params, Any]:
        new = {
            name: p - 0.3 * F.softplus(net(statistics(grads[name]))) * grads[name]
            for name, p in theta.items()
        }
        return new, {}

    return rule
