"""The workloads by ``torch.compile``: the whole unrolled loop under ``torch.func.grad``, one graph.

The loop is that of `implementations.unrolled`, written with ``torch.func`` throughout. Compilation
traces every inner step, so that it takes a time that grows with T; whoever calls sets the limit.
"""

from __future__ import annotations

from typing import Any

import torch
from implementations import Params, batch_loss, rule_of
from prepared import Prepared
from torch import Tensor
from torch.func import grad, grad_and_value
from torch.nn.attention import SDPBackend, sdpa_kernel
from workloads import Batch, Problem


def compiled_loop(problem: Problem) -> Prepared:
    """Compiled, which takes a first call."""
    function = torch.compile(grad_and_value(meta_loss_of(problem)), fullgraph=True)
    leaves = {label: leaf.detach() for label, leaf in problem.leaves.items()}
    found: Params = {}

    def call() -> list[float]:
        found.clear()
        losses = []
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            for train, val in problem.tasks:
                gradients, loss = function(leaves, train, val)
                losses.append(loss.item())
                for label, g in gradients.items():
                    found[label] = found[label].add_(g) if label in found else g
        return losses

    call()
    return Prepared(call, lambda: found)


def meta_loss_of(problem: Problem) -> Any:
    """``leaves, train, val -> validation loss`` without side effects."""
    rule = rule_of(problem)
    names = [name for name, _ in problem.model.named_parameters()]
    fixed = {name: p.detach() for name, p in problem.model.named_parameters()}
    buffers = {name: b.detach() for name, b in problem.model.named_buffers()}

    def loss_of(params: Params, batch: Batch) -> Tensor:
        # In training mode nobody reads the statistics; their updates go to copies.
        copies = {name: b.clone() for name, b in buffers.items()}
        return batch_loss(problem, (params, copies), batch)

    def meta_loss(leaves: Params, train: Batch, val: Batch) -> Tensor:
        images = leaves.get("images")
        params = {name: leaves.get(name, fixed[name]) for name in names}
        state: dict[str, Any] = {}
        for j in range(problem.steps):
            batch = problem.batch_of(train, j)
            if images is not None:
                batch = images, batch[1]
            gradients = grad(loss_of)(params, batch)
            params, state = rule(leaves, j, params, tuple(gradients.values()), state)
        return loss_of(params, val)

    return meta_loss
