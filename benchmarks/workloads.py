"""The workloads that unrollc is measured on: inner problems as data, at the sizes of the targets.

``build(name)`` gives a `Problem`: an ordinary model and optimizer, a loss, seeded synthetic data of
the right shapes, and the tensors that get a meta-gradient. `implementations.py` runs it. Weights
and data depend on the name alone, so that every implementation has the same ones; a smaller
number of steps takes the first of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from networks import GPT, CoordinatewiseLSTM, LearnedOptimizer, conv4, densenet, lenet, tanh_mlp
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """One workload, built.

    Attributes:
        model, opt, loss: What is trained, how, on what.
        tasks: Training batches and validation batch of each run of the loop that a call makes.
            Training batches are a pair of tensors stacked on a leading dimension T, or one batch
            that serves every step if `repeated`.
        steps: T.
        leaves: The tensors that get a meta-gradient, by name.
        rates: Learning rates of each inner step [T], where they are `unrollc.PerStep`.
        repeated: Whether one batch serves every step.
    """

    model: nn.Module
    opt: torch.optim.Optimizer
    loss: Callable[[Tensor, Tensor], Tensor]
    tasks: tuple[tuple[Batch, Batch], ...]
    steps: int
    leaves: dict[str, Tensor]
    rates: Tensor | None = None
    repeated: bool = False

    def batch_of(self, train: Batch, step: int) -> Batch:
        """The batch of an inner step."""
        return train if self.repeated else (train[0][step], train[1][step])


@dataclass(frozen=True)
class Workload:
    """How a workload is built and measured.

    Attributes:
        make: ``steps -> Problem``, in the default dtype.
        steps: T.
        budgets: What ``memory=`` is given, one measurement each; None is the fastest plan.
        checked: T of the comparison in float64, where another than `steps`.
    """

    make: Callable[[int], Problem]
    steps: int
    budgets: tuple[str | None, ...] = (None,)
    checked: int | None = None


def build(name: str, steps: int | None = None, dtype: torch.dtype = torch.float32) -> Problem:
    """A workload with fresh weights and data.

    Args:
        name: A key of `WORKLOADS`.
        steps: T, if another than the workload's own.
        dtype: float32 to measure, float64 to compare implementations.
    """
    workload, before = WORKLOADS[name], torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return workload.make(workload.steps if steps is None else steps)
    finally:
        torch.set_default_dtype(before)


def _samples(lead: tuple[int, ...], shape: tuple[int, ...], classes: int, seed: int) -> Batch:
    """Inputs [*lead, *shape] and labels [*lead]; more steps leave the first ones as they are."""
    generator = torch.Generator().manual_seed(seed)
    first, *others = lead
    parts = [
        (
            torch.randn(*others, *shape, generator=generator),
            torch.randint(classes, others, generator=generator),
        )
        for _ in range(first)
    ]
    inputs, labels = zip(*parts, strict=True)
    return torch.stack(inputs), torch.stack(labels)


def _single(batch: Batch) -> Batch:
    """Without the leading dimension 1."""
    return batch[0][0], batch[1][0]


def _with_rates(
    model: nn.Module, make: Callable[..., torch.optim.Optimizer], rate: float
) -> tuple[torch.optim.Optimizer, dict[str, Tensor]]:
    """An optimizer with a learning rate of its own for each tensor, and the rates."""
    rates = {name: torch.tensor(rate, requires_grad=True) for name, _ in model.named_parameters()}
    groups = [{"params": [p], "lr": rates[name]} for name, p in model.named_parameters()]
    return make(groups), {f"lr of {name}": lr for name, lr in rates.items()}


def _mlp(width: int, batch: int) -> Callable[[int], Problem]:
    def make(steps: int) -> Problem:
        model = tanh_mlp(784, width, width, 10)
        opt, rates = _with_rates(model, torch.optim.Adam, 1e-3)
        train = _samples((steps, batch), (784,), 10, seed=1)
        val = _single(_samples((1, batch), (784,), 10, seed=2))
        leaves = dict(model.named_parameters()) | rates
        return Problem(model, opt, F.cross_entropy, ((train, val),), steps, leaves)

    return make


def _maml_conv4(steps: int) -> Problem:
    model = conv4()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    tasks = []
    for seed in range(4):
        images = _single(_samples((1, 80), (1, 28, 28), 5, seed))[0]
        labels = torch.arange(80) % 5
        train, val = zip(images.split([5, 75]), labels.split([5, 75]), strict=True)
        tasks.append((train, val))
    leaves = dict(model.named_parameters())
    return Problem(model, opt, F.cross_entropy, tuple(tasks), steps, leaves, repeated=True)


def _token_loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def _gpt(optimizer: type[torch.optim.Optimizer], rate: float) -> Callable[[int], Problem]:
    def make(steps: int) -> Problem:
        model = GPT(layers=4, width=256, heads=4, length=128, words=512)
        opt, rates = _with_rates(model, optimizer, rate)
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(512, (steps + 1, 4, 129), generator=generator)
        inputs, target = tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous()
        train, val = (inputs[1:], target[1:]), (inputs[0], target[0])
        leaves = dict(model.named_parameters()) | rates
        return Problem(model, opt, _token_loss, ((train, val),), steps, leaves)

    return make


def _learned_optimizer(steps: int) -> Problem:
    model, net = tanh_mlp(784, 20, 10), CoordinatewiseLSTM()
    opt = LearnedOptimizer(model.parameters(), net)
    train = _samples((steps, 128), (784,), 10, seed=1)
    val = _single(_samples((1, 128), (784,), 10, seed=2))
    return Problem(
        model, opt, F.cross_entropy, ((train, val),), steps, dict(net.named_parameters())
    )


def _densenet(steps: int) -> Problem:
    model = densenet()

    def momentum(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, momentum=0.9)

    opt, rates = _with_rates(model, momentum, 0.1)
    train = _samples((steps, 16), (3, 32, 32), 10, seed=1)
    val = _single(_samples((1, 16), (3, 32, 32), 10, seed=2))
    return Problem(model, opt, F.cross_entropy, ((train, val),), steps, rates)


def _distill(steps: int) -> Problem:
    model = lenet()
    rates = torch.full((steps,), 0.02, requires_grad=True)
    opt = torch.optim.SGD([{"params": list(model.parameters()), "lr": 0.02}])
    images = torch.randn(100, 1, 28, 28).requires_grad_()
    train = (images, torch.arange(100) % 10)
    val = _single(_samples((1, 256), (1, 28, 28), 10, seed=2))
    leaves = {"images": images, "learning rates": rates}
    return Problem(model, opt, F.cross_entropy, ((train, val),), steps, leaves, rates, True)


WORKLOADS = {
    "mlp-small": Workload(_mlp(32, 8), 50),
    "mlp": Workload(_mlp(128, 64), 50),
    "mlp-long-1000": Workload(_mlp(32, 8), 1_000, ("54MiB",), 100),
    "mlp-long": Workload(_mlp(32, 8), 10_000, ("54MiB",), 100),
    "maml-conv4": Workload(_maml_conv4, 5, checked=2),
    "gpt-sgd": Workload(_gpt(torch.optim.SGD, 0.1), 8, (None, "140MiB")),
    "gpt-adam": Workload(_gpt(torch.optim.Adam, 1e-3), 8, (None, "285MiB")),
    "learned-opt": Workload(_learned_optimizer, 20, (None, "75MiB")),
    "densenet-lr": Workload(_densenet, 15, ("400MiB",), 2),
    "distill": Workload(_distill, 20),
}
