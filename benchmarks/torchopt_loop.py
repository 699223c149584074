"""The workloads by ``torchopt``: its functional optimizers, chained as its documentation shows.

Where each tensor has its own learning rate, and for the learned optimizer, the chain ends in a
`GradientTransformation` of ours, which is torchopt's way to extend it. Adam takes the smallest
normal number as ``eps_root``, which torchopt asks for in meta-gradients: it keeps the root's slope
finite and is too small to change a digit.
"""

from __future__ import annotations

from typing import Any

import torch
import torchopt
from implementations import Call, batch_loss, torch_call
from networks import LearnedOptimizer
from torch import Tensor
from torchopt.base import GradientTransformation
from workloads import Batch, Problem


def torchopt_loop(problem: Problem, *, accelerated: bool = False) -> Call:
    """``FuncOptimizer.step`` on a functional model.

    Args:
        accelerated: Adam by torchopt's fused C++ operators.
    """
    names = [name for name, _ in problem.model.named_parameters()]

    def run(train: Batch, val: Batch) -> Tensor:
        opt = torchopt.FuncOptimizer(_transformation(problem, accelerated))
        params = tuple(problem.model.parameters())
        buffers = {name: b.clone() for name, b in problem.model.named_buffers()}
        for j in range(problem.steps):
            values = dict(zip(names, params, strict=True)), buffers
            loss = batch_loss(problem, values, problem.batch_of(train, j))
            params = opt.step(loss, params)
        return batch_loss(problem, (dict(zip(names, params, strict=True)), buffers), val)

    return torch_call(problem, run)


def _transformation(problem: Problem, accelerated: bool) -> Any:
    opt = problem.opt
    if isinstance(opt, LearnedOptimizer):
        return _learned(opt)
    group = opt.param_groups[0]
    if problem.rates is not None:
        return torchopt.sgd(lr=problem.rates.__getitem__)
    rates = _scaled([g["lr"] for g in opt.param_groups])
    if isinstance(opt, torch.optim.Adam):
        transform = torchopt.transform
        make = transform.scale_by_accelerated_adam if accelerated else transform.scale_by_adam
        beta1, beta2 = group["betas"]
        tiny = torch.finfo(torch.get_default_dtype()).tiny
        return torchopt.chain(make(beta1, beta2, group["eps"], eps_root=tiny), rates)
    if group["momentum"]:
        return torchopt.chain(torchopt.transform.trace(group["momentum"]), rates)
    return rates


def _scaled(rates: list[Any]) -> GradientTransformation:
    """A rate for each tensor, or one for all."""

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> Any:
        each = rates * len(updates) if len(rates) == 1 else rates
        return tuple(-lr * u for lr, u in zip(each, updates, strict=True)), state

    return GradientTransformation(lambda params: (), update)


def _learned(opt: LearnedOptimizer) -> GradientTransformation:
    def start(params: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return opt.net.blank(torch.cat([p.detach().flatten() for p in params]))

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> Any:
        new, state = opt.net(torch.cat([u.flatten() for u in updates]), state)
        parts = new.split([u.numel() for u in updates])
        return tuple(part.view_as(u) for part, u in zip(parts, updates, strict=True)), state

    return GradientTransformation(start, update)
