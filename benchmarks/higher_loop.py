"""The workloads by ``higher``: ``innerloop_ctx``, and differentiable copies of optimizers.

It has copies of the optimizers of torch; that of the learned one is registered here, the way its
documentation gives for optimizers of one's own.
"""

from __future__ import annotations

from typing import Any

import higher
import torch
from higher.optim import DifferentiableOptimizer, register_optim
from implementations import Call, torch_call
from networks import LearnedOptimizer
from torch import Tensor
from workloads import Batch, Problem


class _Learned(DifferentiableOptimizer):
    """`LearnedOptimizer`, with the network's own parameters in the graph."""

    def __init__(self, other: LearnedOptimizer, *args: Any, **kwargs: Any) -> None:
        super().__init__(other, *args, **kwargs)
        self._net, self._memory = other.net, ()

    def _update(self, grouped_grads: list[list[Tensor]], **kwargs: Any) -> None:
        (group,), (grads,) = self.param_groups, grouped_grads
        flat = torch.cat([g.flatten() for g in grads])
        updates, self._memory = self._net(flat, self._memory or self._net.blank(flat))
        params = group["params"]
        parts = updates.split([p.numel() for p in params])
        group["params"] = [p + u.view_as(p) for p, u in zip(params, parts, strict=True)]


register_optim(LearnedOptimizer, _Learned)


def higher_loop(problem: Problem) -> Call:
    """The loop that its documentation shows, differentiable back to the initial weights."""
    groups = problem.opt.param_groups
    learned = isinstance(groups[0].get("lr"), Tensor)
    override = {"lr": [group["lr"] for group in groups]} if learned else None

    def run(train: Batch, val: Batch) -> Tensor:
        kwargs = {"copy_initial_weights": False, "override": override}
        with higher.innerloop_ctx(problem.model, problem.opt, **kwargs) as (model, opt):
            for j in range(problem.steps):
                inputs, target = problem.batch_of(train, j)
                now = _override(problem, j)
                opt.step(problem.loss(model(inputs), target), override=now)
            return problem.loss(model(val[0]), val[1])

    return torch_call(problem, run)


def _override(problem: Problem, step: int) -> dict[str, list[Any]] | None:
    """Settings of one inner step: a rate of its own, or the ε that makes its Adam that of torch.

    higher adds ε to √v where torch adds it to √v / √(1 − β₂ᵗ).
    """
    if problem.rates is not None:
        return {"lr": [problem.rates[step]]}
    if isinstance(problem.opt, torch.optim.Adam):
        group = problem.opt.param_groups[0]
        return {"eps": [group["eps"] * (1 - group["betas"][1] ** (step + 1)) ** 0.5]}
    return None
