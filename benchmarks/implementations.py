"""The workloads run by unrollc and by plain PyTorch, with the same arithmetic.

Each implementation is a function ``problem -> call``; ``call()`` makes one meta-gradient, summed
over the problem's tasks, into ``.grad`` of the problem's leaves and returns the validation losses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from networks import LearnedOptimizer
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from workloads import Batch, Problem

import unrollc

Call = Callable[[], list[float]]
Params = dict[str, Tensor]
State = dict[str, Any]


def compiled(
    problem: Problem, memory: str | None = None, backend: str = "auto"
) -> tuple[Any, Call]:
    """The program of unrollc and its call; the first call lowers it, if nothing did before."""
    if problem.rates is not None:
        problem.opt.param_groups[0]["lr"] = unrollc.PerStep(problem.rates)
    program = unrollc.compile(
        problem.model,
        problem.opt,
        problem.loss,
        meta=_requested(problem),
        memory=memory,
        backend=backend,
    )

    def call() -> list[float]:
        losses = []
        for train, val in problem.tasks:
            result = program(data_of(problem, train), val)
            result.loss.backward()
            losses.append(result.loss.item())
        return losses

    return program, call


def data_of(problem: Problem, train: Batch) -> Any:
    """The training batches in the form that unrollc takes."""
    return unrollc.repeat(train, problem.steps) if problem.repeated else train


def _requested(problem: Problem) -> list[Any]:
    """What ``meta=`` is: the leaves, but learning rates that are one a step as they were given."""
    leaves = [leaf for leaf in problem.leaves.values() if leaf is not problem.rates]
    return leaves if problem.rates is None else [*leaves, problem.opt.param_groups[0]["lr"]]


def unrolled(problem: Problem) -> Call:
    """Every inner step on one autograd graph: ``functional_call`` and ``create_graph=True``."""
    rule = rule_of(problem)

    def run(train: Batch, val: Batch) -> Tensor:
        params = dict(problem.model.named_parameters())
        buffers = {name: b.clone() for name, b in problem.model.named_buffers()}
        state: State = {}
        for j in range(problem.steps):
            loss = batch_loss(problem, (params, buffers), problem.batch_of(train, j))
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            params, state = rule(problem.leaves, j, params, grads, state)
        return batch_loss(problem, (params, buffers), val)

    return torch_call(problem, run)


def torch_call(problem: Problem, run: Callable[[Batch, Batch], Tensor]) -> Call:
    """Task after task, forward and backward, into ``.grad`` of the leaves.

    Args:
        run: ``train, val -> validation loss``, with an autograd graph back to the leaves.
    """

    def call() -> list[float]:
        losses = []
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
            for train, val in problem.tasks:
                loss = run(train, val)
                loss.backward(inputs=list(problem.leaves.values()))
                losses.append(loss.item())
                del loss
        return losses

    return call


def batch_loss(problem: Problem, values: tuple[Params, Params], batch: Batch) -> Tensor:
    """The loss of a batch with other parameters and buffers in the model."""
    return problem.loss(functional_call(problem.model, values, (batch[0],)), batch[1])


def rule_of(problem: Problem) -> Callable[..., tuple[Params, State]]:
    """The optimizer's update: ``leaves, step, params, grads, state -> params, state``."""
    return functools.partial(_RULES[type(problem.opt)], problem)


def _rate(problem: Problem, leaves: Params, step: int, name: str) -> Any:
    if problem.rates is not None:
        return leaves["learning rates"][step]
    return leaves.get(f"lr of {name}", problem.opt.param_groups[0]["lr"])


def _sgd(
    problem: Problem,
    leaves: Params,
    step: int,
    params: Params,
    grads: Sequence[Tensor],
    state: State,
) -> tuple[Params, State]:
    """SGD with or without momentum (no dampening)."""
    new, moved = {}, {}
    for (name, p), g in zip(params.items(), grads, strict=True):
        if momentum := problem.opt.param_groups[0]["momentum"]:
            g = momentum * state[name] + g if state else g
            moved[name] = g
        new[name] = p - _rate(problem, leaves, step, name) * g
    return new, moved


def _adam(
    problem: Problem,
    leaves: Params,
    step: int,
    params: Params,
    grads: Sequence[Tensor],
    state: State,
) -> tuple[Params, State]:
    """Adam, as `torch.optim` computes it, with the root kept off 0 where its slope is infinite."""
    group = problem.opt.param_groups[0]
    (beta1, beta2), eps = group["betas"], group["eps"]
    new, moments = {}, {}
    scale1, scale2 = 1 - beta1 ** (step + 1), (1 - beta2 ** (step + 1)) ** 0.5
    for (name, p), g in zip(params.items(), grads, strict=True):
        mean, square = state.get(name, (torch.zeros_like(p), torch.zeros_like(p)))
        mean = beta1 * mean + (1 - beta1) * g
        square = beta2 * square + (1 - beta2) * g * g
        moments[name] = mean, square
        rate = _rate(problem, leaves, step, name)
        new[name] = p - rate / scale1 * mean / (_root(square) / scale2 + eps)
    return new, moments


def _root(square: Tensor) -> Tensor:
    return square.clamp(min=torch.finfo(square.dtype).tiny).sqrt()


def _learned(
    problem: Problem,
    leaves: Params,
    step: int,
    params: Params,
    grads: Sequence[Tensor],
    state: State,
) -> tuple[Params, State]:
    net = problem.opt.net
    flat = torch.cat([g.flatten() for g in grads])
    memory = state.get("memory") or net.blank(flat)
    updates, memory = functional_call(net, leaves, (flat, memory))
    parts = updates.split([p.numel() for p in params.values()])
    new = {name: p + u.view_as(p) for (name, p), u in zip(params.items(), parts, strict=True)}
    return new, {"memory": memory}


_RULES: dict[type[torch.optim.Optimizer], Callable[..., tuple[Params, State]]] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adam,
    LearnedOptimizer: _learned,
}
