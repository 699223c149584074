"""Captured steps and their adjoints, run on tensors of the test's choice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import unrollc
from unrollc.step import Role, StepGraph


def captured(model: nn.Module, opt: torch.optim.Optimizer, loss: Any, batch: Any) -> StepGraph:
    """The steady step of a loop."""
    program = unrollc.compile(model, opt, loss, meta=list(model.parameters()))
    with torch.no_grad():
        return program.lower(unrollc.repeat(batch, 2), batch).step


def pulled_back(step: StepGraph, given: dict[str, Tensor], adjoint: Any) -> dict[str, Tensor]:
    """The cotangents that an adjoint of `step` returns, for random ones that it receives.

    Args:
        given: Tensors by label for the step's inputs; zeros where there is none.
        adjoint: `reverse_adjoint` or `mixed_adjoint`.
    """
    state = step.outputs_with(Role.THETA, Role.OPT_STATE, Role.AVERAGE)
    floating = [v for v, n in state if n is not None and n.meta["val"].is_floating_point()]
    live = frozenset((v.role, v.label) for v in floating if "step" not in v.label)
    wanted = frozenset((v.role, v.label) for v, _ in step.inputs_with(Role.HYPER, Role.CONTEXT))
    made = adjoint(step, wanted, live).graph
    generator = torch.Generator().manual_seed(7)
    values = []
    for value, node in zip(made.inputs, made.placeholders, strict=True):
        if value.role is Role.CONSTANT:
            values.append(made.constants[value.name])
        elif value.role is Role.COTANGENT:
            values.append(torch.randn(node.meta["val"].shape, generator=generator))
        else:
            values.append(given.get(value.label, torch.zeros(node.meta["val"].shape)))
    with torch.no_grad():
        results = made.module(*values)
    return {
        v.label: result
        for v, result in zip(made.outputs, results, strict=True)
        if result is not None and v.role is Role.COTANGENT
    }
