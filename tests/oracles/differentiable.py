"""Meta-gradients by ``differentiable=True`` of `torch.optim`: what eager PyTorch itself offers.

Each step runs the real optimizer on fresh clones of the fast weights, so that its in-place update
leaves the graph of the forward pass alone. Some optimizers refuse tensors as hyperparameters, some
read their value, some start from a detached gradient: what comes out may be missing or wrong, and
finite differences say which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.oracles.objectives import Batch, Loss, Objective, as_objective


def eager_gradients(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    loss: Loss | Objective,
    train: Sequence[Batch],
    val: Batch,
    wanted: Iterable[str],
    hyper: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Gradients of the validation loss, as far as eager PyTorch computes them.

    Hyperparameters are tried one by one: one that cannot be a tensor does not spoil the others.
    An optimizer without the flag ``differentiable`` differentiates nothing.

    Args:
        model, opt: Left untouched; one param group.
        wanted: Names of parameters of `model` and of entries of `hyper`.
        hyper: Tensor hyperparameters of the group by name, e.g. ``betas[1]``.
    """
    if "differentiable" not in opt.defaults:
        return {}
    theta = {name: p for name, p in model.named_parameters() if name in set(wanted)}
    found = _gradients(model, opt, loss, train, val, theta, {})
    for name, tensor in hyper.items():
        found |= _gradients(model, opt, loss, train, val, {}, {name: tensor})
    return found


def _gradients(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    loss: Loss | Objective,
    train: Sequence[Batch],
    val: Batch,
    theta: Mapping[str, Tensor],
    hyper: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    try:
        outer = _unrolled(model, opt, as_objective(loss), train, val, hyper)
        leaves = {**theta, **hyper}
        gradients = torch.autograd.grad(outer, list(leaves.values()), allow_unused=True)
    except (RuntimeError, ValueError, TypeError):  # eager PyTorch's refusal is an outcome
        return {}
    pairs = zip(leaves, gradients, strict=True)
    return {name: gradient for name, gradient in pairs if gradient is not None}


def _unrolled(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    objective: Objective,
    train: Sequence[Batch],
    val: Batch,
    hyper: Mapping[str, Tensor],
) -> Tensor:
    twin = object.__new__(type(opt))
    twin.__dict__.update(opt.__dict__)
    twin.defaults = {**opt.defaults, "differentiable": True}
    (group,) = opt.param_groups
    names = list(dict(model.named_parameters()))
    values = list(dict(model.named_parameters()).values())
    state = [_owned(opt.state.get(param, {})) for param in values]
    for batch in train:
        fast = [value.clone() for value in values]
        inner = torch.func.functional_call(
            _Evaluated(model, objective), _named(names, fast), (batch,)
        )
        gradients = torch.autograd.grad(inner, fast, create_graph=True)
        held = [value.clone() for value in fast]
        for tensor, gradient in zip(held, gradients, strict=True):
            tensor.grad = gradient
        numbers = _group(group, hyper)
        twin.param_groups = [{**numbers, "params": held, "differentiable": True, "foreach": False}]
        twin.state = type(opt.state)(dict)
        twin.state.update(zip(held, state, strict=True))
        twin.step()
        state = [_owned(twin.state[tensor]) for tensor in held]
        values = held
    return torch.func.functional_call(_Evaluated(model, objective), _named(names, values), (val,))


def _owned(state: Mapping[str, Any]) -> dict[str, Any]:
    """State that a step may change in place without touching the one it was copied from."""
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}


class _Evaluated(nn.Module):
    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self._objective = objective

    def forward(self, batch: Batch) -> Tensor:
        return self._objective.fn(self.model, batch)


def _named(names: Sequence[str], values: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}": value for name, value in zip(names, values, strict=True)}


def _group(group: Mapping[str, Any], hyper: Mapping[str, Tensor]) -> dict[str, Any]:
    """The group with numbers for all tensors that are not in `hyper`."""
    wanted = {id(tensor) for tensor in hyper.values()}

    def number(value: Any) -> Any:
        if isinstance(value, Tensor) and id(value) not in wanted:
            return value.item()
        if isinstance(value, tuple):
            return tuple(number(item) for item in value)
        return value

    return {key: number(value) for key, value in group.items() if key != "params"}
