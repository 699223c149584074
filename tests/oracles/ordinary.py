"""T ordinary training steps of a copy of the real model with its real optimizer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.oracles.objectives import Batch, Loss, Objective, as_objective


@dataclass(frozen=True)
class Trained:
    """What ordinary training leaves behind."""

    model: nn.Module
    opt: torch.optim.Optimizer
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    opt_state: dict[str, dict[str, Any]]
    inner_losses: Tensor
    loss: Tensor | None


def _number(value: Any) -> Any:
    """A hyperparameter as the user of an ordinary optimizer writes it: a Python number."""
    if isinstance(value, Tensor):
        return value.item()
    if hasattr(value, "per_step"):  # put anew before each step
        return value.per_step[0].item()
    if isinstance(value, tuple):
        return tuple(_number(item) for item in value)
    return value


def _copied(
    model: nn.Module, opt: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    groups, defaults = opt.param_groups, opt.defaults
    opt.param_groups = [
        {key: value if key == "params" else _number(value) for key, value in group.items()}
        for group in groups
    ]
    opt.defaults = {key: _number(value) for key, value in defaults.items()}
    try:
        # One call: the optimizer's parameters stay the model's. Its attributes are copied beside
        # it, because an optimizer's ``__getstate__`` leaves them out.
        own = {key: value for key, value in vars(opt).items() if key not in ("state", "step")}
        copied_model, copied_opt, copied = copy.deepcopy((model, opt, own))
        for key, value in copied.items():
            vars(copied_opt).setdefault(key, value)
        return copied_model, copied_opt
    finally:
        opt.param_groups, opt.defaults = groups, defaults


def _put(group: dict[str, Any], key: str, number: float) -> None:
    name, _, index = key.rstrip("]").partition("[")
    if not index:
        group[name] = number
        return
    entries = list(group[name])
    entries[int(index)] = number
    group[name] = tuple(entries)


def train(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    loss: Loss | Objective,
    batches: Sequence[Batch],
    val: Batch | None = None,
    *,
    val_loss: Loss | Objective | None = None,
    per_step: Mapping[tuple[int, str], Tensor] | None = None,
) -> Trained:
    """Train a copy of ``model`` on a list of batches; ``model`` and ``opt`` stay untouched.

    Tensor hyperparameters become Python numbers, and ``per_step`` values are set before each
    step as a scheduler would; a key may name an entry of a tuple, ``betas[1]``.
    """
    model, opt = _copied(model, opt)
    objective = as_objective(loss)
    outer = objective if val_loss is None else as_objective(val_loss)
    held = [param for group in opt.param_groups for param in group["params"]]
    held = [param for param in held if param.requires_grad]
    inner_losses = []
    for j, batch in enumerate(batches):
        for (i, key), values in (per_step or {}).items():
            _put(opt.param_groups[i], key, values[j].item())
        inner_loss = objective.fn(model, batch)
        inner_losses.append(inner_loss.detach())
        # Not backward(): parameters of the loss are the caller's and must not get a .grad.
        grads = torch.autograd.grad(inner_loss, held, allow_unused=True)
        for param, grad in zip(held, grads, strict=True):
            param.grad = grad
        opt.step()
    opt.zero_grad()
    names = {param: name for name, param in model.named_parameters()}
    params = {name: param.detach().clone() for name, param in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    outer_loss = None
    if val is not None:
        with torch.no_grad():  # on a copy: evaluation in training mode would move the buffers
            outer_loss = outer.fn(copy.deepcopy(model), val)
    state = {names[param]: dict(value) for param, value in opt.state.items()}
    return Trained(model, opt, params, buffers, state, torch.stack(inner_losses), outer_loss)
