"""Meta-gradients by eager PyTorch: every inner step on one autograd graph.

The model is called by ``torch.func.functional_call``, the inner gradient is taken with
``create_graph=True`` and the optimizer is written out by hand. ``torch.optim`` itself cannot be
this oracle: SGD starts its momentum from ``grad.detach()`` even with ``differentiable=True``, so
its meta-gradient is inexact at the first step.

The formulas are those of the single-tensor, non-capturable code of ``torch.optim`` 2.13 (where
eps stands in a denominator matters at 1e-10). A hyperparameter that is a Python number 0 leaves
its term out, as there; one that is a tensor always takes part, so that its gradient exists at 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.oracles.objectives import Batch, Loss, MathAttention, Objective, as_objective

State = dict[str, Tensor]
Rule = Callable[[Tensor, Tensor, State, int, Mapping[str, Any]], tuple[Tensor, State]]


def _used(value: Any) -> bool:
    return isinstance(value, Tensor) or value != 0


def direction(param: Tensor, grad: Tensor, group: Mapping[str, Any]) -> Tensor:
    """The gradient with its sign (``maximize``) and L2 weight decay."""
    grad = -grad if group["maximize"] else grad
    decay = group["weight_decay"]
    return grad + decay * param if _used(decay) else grad


def sgd(
    param: Tensor, grad: Tensor, state: State, step: int, group: Mapping[str, Any]
) -> tuple[Tensor, State]:
    grad = direction(param, grad, group)
    momentum, state = group["momentum"], dict(state)
    if _used(momentum):
        if state.get("momentum_buffer") is None:
            buffer = grad
        else:
            buffer = momentum * state["momentum_buffer"] + (1 - group["dampening"]) * grad
        state["momentum_buffer"] = buffer
        grad = grad + momentum * buffer if group["nesterov"] else buffer
    return param - group["lr"] * grad, state


def adam(
    param: Tensor, grad: Tensor, state: State, step: int, group: Mapping[str, Any]
) -> tuple[Tensor, State]:
    if group["decoupled_weight_decay"]:
        grad = -grad if group["maximize"] else grad
        if _used(group["weight_decay"]):
            param = param * (1 - group["lr"] * group["weight_decay"])
    else:
        grad = direction(param, grad, group)
    beta1, beta2 = group["betas"]
    zeros = torch.zeros_like(param)
    mean = beta1 * state.get("exp_avg", zeros) + (1 - beta1) * grad
    square = beta2 * state.get("exp_avg_sq", zeros) + (1 - beta2) * grad * grad
    new = {"exp_avg": mean, "exp_avg_sq": square}
    if group["amsgrad"]:
        square = torch.maximum(state.get("max_exp_avg_sq", zeros), square)
        new["max_exp_avg_sq"] = square
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    denominator = square.sqrt() / correction2**0.5 + group["eps"]
    return param - (group["lr"] / correction1) * mean / denominator, new


def rmsprop(
    param: Tensor, grad: Tensor, state: State, step: int, group: Mapping[str, Any]
) -> tuple[Tensor, State]:
    grad = direction(param, grad, group)
    alpha, momentum = group["alpha"], group["momentum"]
    zeros = torch.zeros_like(param)
    square = alpha * state.get("square_avg", zeros) + (1 - alpha) * grad * grad
    new = {"square_avg": square}
    if group["centered"]:
        mean = alpha * state.get("grad_avg", zeros) + (1 - alpha) * grad
        new["grad_avg"] = mean
        denominator = (square - mean * mean).sqrt() + group["eps"]
    else:
        denominator = square.sqrt() + group["eps"]
    update = grad / denominator
    if _used(momentum):
        update = momentum * state.get("momentum_buffer", zeros) + update
        new["momentum_buffer"] = update
    return param - group["lr"] * update, new


def adagrad(
    param: Tensor, grad: Tensor, state: State, step: int, group: Mapping[str, Any]
) -> tuple[Tensor, State]:
    grad = direction(param, grad, group)
    start = torch.full_like(param, group["initial_accumulator_value"])
    total = state.get("sum", start) + grad * grad
    rate = group["lr"] / (1 + (step - 1) * group["lr_decay"])
    return param - rate * grad / (total.sqrt() + group["eps"]), {"sum": total}


RULES: dict[type[torch.optim.Optimizer], Rule] = {
    torch.optim.SGD: sgd,
    torch.optim.Adam: adam,
    torch.optim.AdamW: adam,
    torch.optim.RMSprop: rmsprop,
    torch.optim.Adagrad: adagrad,
}


@dataclass(frozen=True)
class Unrolled:
    """One unrolled run; tensors that a meta-gradient can reach are still on its graph."""

    loss: Tensor
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    opt_state: dict[str, State]
    inner_losses: Tensor

    def gradients(self, tensors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """The meta-gradient of ``loss`` for each tensor; None where nothing depends on it."""
        return torch.autograd.grad(self.loss, tensors, allow_unused=True, retain_graph=True)


class _Evaluated(nn.Module):
    """The objective as a module, so that ``functional_call`` also covers ``fn(model, batch)``.

    Returns the loss and the buffers as the call left them: in-place updates and reassigned
    buffers alike.
    """

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self._objective = objective

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self._objective.fn(self.model, batch)
        return loss, dict(self.model.named_buffers())


def _evaluate(
    model: nn.Module,
    objective: Objective,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    batch: Batch,
) -> tuple[Tensor, dict[str, Tensor]]:
    values = {f"model.{name}": value for name, value in params.items()}
    values |= {f"model.{name}": value.clone() for name, value in buffers.items()}
    with MathAttention():
        return torch.func.functional_call(_Evaluated(model, objective), values, (batch,))


def _initial_state(state: Mapping[str, Any]) -> tuple[State, int]:
    step = int(state.get("step", 0))
    tensors = {
        key: value.clone()
        for key, value in state.items()
        if key != "step" and isinstance(value, Tensor)
    }
    return tensors, step


def unroll(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    loss: Loss | Objective,
    train: Sequence[Batch],
    val: Batch,
    *,
    val_loss: Loss | Objective | None = None,
    per_step: Mapping[tuple[int, str], Tensor] | None = None,
    first_order: bool = False,
    truncated: int | None = None,
    rules: Mapping[type[torch.optim.Optimizer], Rule] = RULES,
) -> Unrolled:
    """Train on the batches of ``train`` and evaluate on ``val``, all on one autograd graph.

    Args:
        model: Left untouched. Its parameters are θ_0, as leaves of the graph.
        opt: Left untouched. Its param groups give the hyperparameters, its state the start.
        train: A list of T batches.
        per_step: Values with a leading dimension T that replace ``param_groups[i][key]``.
        first_order: Take the inner gradients for constants.
        truncated: Keep only the last this many steps on the graph: θ, optimizer state and
            buffers are detached before them.
        rules: The optimizer updates by class; tests put wrong ones here.
    """
    objective = as_objective(loss)
    outer = objective if val_loss is None else as_objective(val_loss)
    rule, per_step = rules[type(opt)], per_step or {}
    names = {param: name for name, param in model.named_parameters()}
    group_of = {
        names[param]: i
        for i, group in enumerate(opt.param_groups)
        for param in group["params"]
        if param.requires_grad
    }
    params = dict(model.named_parameters())
    initial = {names[param]: _initial_state(state) for param, state in opt.state.items()}
    states = {name: initial.get(name, ({}, 0))[0] for name in group_of}
    counts = {name: initial.get(name, ({}, 0))[1] for name in group_of}
    buffers = dict(model.named_buffers())
    inner_losses = []
    for j, batch in enumerate(train):
        if truncated is not None and j == len(train) - truncated:
            params = params | {name: params[name].detach() for name in group_of}
            states = {n: {k: v.detach() for k, v in s.items()} for n, s in states.items()}
            buffers = {name: value.detach() for name, value in buffers.items()}
            params = params | {name: params[name].requires_grad_() for name in group_of}
        inner_loss, buffers = _evaluate(model, objective, params, buffers, batch)
        inner_losses.append(inner_loss.detach())
        grads = torch.autograd.grad(
            inner_loss, [params[name] for name in group_of], create_graph=True, allow_unused=True
        )
        new = {}
        for (name, i), grad in zip(group_of.items(), grads, strict=True):
            if grad is None:  # the optimizer would find .grad is None and pass it over
                continue
            group = dict(opt.param_groups[i])
            group |= {key: value[j] for (at, key), value in per_step.items() if at == i}
            counts[name] += 1
            grad = grad.detach() if first_order else grad
            new[name], states[name] = rule(params[name], grad, states[name], counts[name], group)
        params = params | new
    outer_loss, _ = _evaluate(model, outer, params, buffers, val)
    return Unrolled(outer_loss, params, buffers, states, torch.stack(inner_losses))
