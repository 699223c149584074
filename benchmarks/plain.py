"""Plain eager training of the same steps, without a meta-gradient: the floor to compare with.

As a user trains who wants no meta-gradient: one parameter group (all learning rates start equal),
`torch.optim` with its own choice of kernels, fused attention, and a validation loss at the end.
"""

from __future__ import annotations

import torch
from implementations import Call
from networks import LearnedOptimizer
from torch import Tensor
from workloads import Problem


def plain_training(problem: Problem) -> Call:
    """Train from the initial weights at every call; the validation loss of each task."""
    params = list(problem.model.parameters())
    initial = [p.detach().clone() for p in params]
    for leaf in problem.leaves.values():
        leaf.requires_grad_(any(leaf is p for p in params))

    def call() -> list[float]:
        return [task_loss(task) for task in problem.tasks]

    def task_loss(task: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]) -> float:
        train, val = task
        with torch.no_grad():
            torch._foreach_copy_(params, initial)
        opt = _optimizer(problem, params)
        for j in range(problem.steps):
            inputs, target = problem.batch_of(train, j)
            opt.zero_grad()
            problem.loss(problem.model(inputs), target).backward()
            opt.step()
        with torch.no_grad():
            loss = problem.loss(problem.model(val[0]), val[1]).item()
        opt.zero_grad()
        return loss

    return call


def _optimizer(problem: Problem, params: list[Tensor]) -> torch.optim.Optimizer:
    opt = problem.opt
    if isinstance(opt, LearnedOptimizer):
        return LearnedOptimizer(params, opt.net)
    groups = opt.param_groups
    rates = {float(group["lr"]) for group in groups}
    if problem.rates is not None:
        rates |= set(problem.rates.tolist())
    # A learning rate that is written twice in decimals may differ by float32's rounding.
    assert max(rates) - min(rates) <= 1e-6 * max(rates), "learning rates that start equal"
    if isinstance(opt, torch.optim.Adam):
        return torch.optim.Adam(params, max(rates), groups[0]["betas"], groups[0]["eps"])
    return torch.optim.SGD(params, max(rates), groups[0]["momentum"])
