"""The cases of the gradient matrix: a model, an optimizer, data and every kind of meta-parameter.

One case has all meta-parameters at once, so that one program covers them: θ_0 (every parameter),
a learning rate and a weight decay as tensors in the first param group, one learning rate per
step in the second, the parameters of the loss, and the training inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.oracles import eager, ordinary
from tests.oracles.models import (
    CLASSES,
    MLP,
    ConvNet,
    LSTMClassifier,
    TransformerClassifier,
    WeightedLoss,
)
from tests.oracles.objectives import unstack

Groups = list[dict[str, Any]]
BuildOptimizer = Callable[[Groups], torch.optim.Optimizer]

MODELS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "mlp": (MLP, (5, 4)),
    "conv": (ConvNet, (6, 1, 4, 4)),
    "transformer": (TransformerClassifier, (3, 4, 8)),
    "lstm": (LSTMClassifier, (4, 3, 3)),
}
ADAPTIVE = {"adam", "adamw", "rmsprop", "adagrad"}

# The first step of an adaptive optimizer is g / (|g| + eps): with PyTorch's default eps of 1e-8
# its derivative eps / (|g| + eps)² is a difference that cancels eight digits in every
# implementation. An eps (Adagrad: an accumulator) that takes part keeps 1e-10 a fair demand.
OPTIMIZERS: dict[str, BuildOptimizer] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "sgd-momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.8),
    "sgd-dampening": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.8, dampening=0.3),
    "sgd-nesterov": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.8, nesterov=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.02, eps=1e-2),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.02, eps=1e-2),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, alpha=0.9, eps=1e-2),
    "adagrad": lambda groups: torch.optim.Adagrad(
        groups, lr=0.1, eps=1e-2, initial_accumulator_value=0.1
    ),
}


@dataclass(frozen=True)
class Case:
    """Everything that one call of a program takes.

    Attributes:
        train: ``(inputs, target)``, stacked on a leading dimension T; the inputs require grad.
        meta: The meta-parameters, by names for messages.
        per_step: Meta-parameters that replace ``param_groups[i][key]``, one value per step.
    """

    model: nn.Module
    opt: torch.optim.Optimizer
    loss: nn.Module
    val_loss: Callable[[Tensor, Tensor], Tensor]
    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    meta: dict[str, Tensor]
    per_step: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def install(self, wrap: Callable[[Tensor], Any]) -> None:
        """Put the wrapped per-step values into the optimizer's param groups."""
        for (i, key), values in self.per_step.items():
            self.opt.param_groups[i][key] = wrap(values)

    def unroll(self, **options: Any) -> eager.Unrolled:
        return eager.unroll(
            self.model,
            self.opt,
            self.loss,
            unstack(self.train),
            self.val,
            val_loss=self.val_loss,
            per_step=self.per_step,
            **options,
        )

    def train_ordinarily(self) -> ordinary.Trained:
        return ordinary.train(
            self.model,
            self.opt,
            self.loss,
            unstack(self.train),
            self.val,
            val_loss=self.val_loss,
            per_step=self.per_step,
        )


def batches(shape: tuple[int, ...], steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random inputs and classes, stacked on a leading dimension ``steps``."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(steps, *shape, generator=generator, dtype=torch.float64)
    target = torch.randint(CLASSES, (steps, shape[0]), generator=generator)
    return inputs, target


def build(model_name: str, optimizer_name: str, steps: int, *, seed: int = 0) -> Case:
    """One case of the matrix, in float64."""
    build_model, shape = MODELS[model_name]
    torch.manual_seed(seed)
    bias_free = model_name == "transformer" and optimizer_name in ADAPTIVE
    model = (build_model(bias=False) if bias_free else build_model()).double()
    loss = WeightedLoss().double()
    train, val = batches(shape, steps, seed + 1), batches(shape, 1, seed + 2)
    train[0].requires_grad_()
    named = dict(model.named_parameters())
    first = [param for name, param in named.items() if not name.startswith("output.")]
    second = [param for name, param in named.items() if name.startswith("output.")]
    opt = OPTIMIZERS[optimizer_name]([{"params": first}, {"params": second}])
    rate = opt.param_groups[0]["lr"]
    lr = torch.tensor(rate, dtype=torch.float64, requires_grad=True)
    decay = torch.tensor(0.03, dtype=torch.float64, requires_grad=True)
    opt.param_groups[0]["lr"] = lr
    opt.param_groups[0]["weight_decay"] = decay
    rates = (rate * torch.linspace(1.2, 0.6, steps, dtype=torch.float64)).requires_grad_()
    meta = {f"theta_0.{name}": param for name, param in named.items()}
    meta |= {f"loss.{name}": param for name, param in loss.named_parameters()}
    meta |= {"lr": lr, "weight_decay": decay, "lr per step": rates, "train inputs": train[0]}
    return Case(
        model=model,
        opt=opt,
        loss=loss,
        val_loss=F.cross_entropy,
        train=train,
        val=(val[0][0], val[1][0]),
        meta=meta,
        per_step={(1, "lr"): rates},
    )
