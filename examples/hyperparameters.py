"""Tune Adam by its meta-gradient: a learning rate and a weight decay for each tensor.

An MLP on scikit-learn's digits is trained for 100 steps of Adam. The gradient of its validation
loss with respect to every learning rate and every weight decay, through all 100 steps, drives an
outer Adam. A grid search over one global learning rate and weight decay gets the same wall time.
Both are judged on test images that neither has seen, from fresh initial weights.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from digits import draw_batches, load_parts, reinitialise
from display import console, progress
from fewshot import Batch, Estimate
from rich.table import Table
from torch import Tensor, nn

import unrollc

START_LR = 1e-3  # PyTorch's default
START_WEIGHT_DECAY = 1e-4
LR_RANGE = (1e-4, 1e-1)  # of the grid
WEIGHT_DECAY_RANGE = (1e-6, 1e-2)
BATCH = 32
REPEATS = 3  # trainings in a cell: by one alone the grid would pick a lucky cell
OUTER_LR = 0.3  # in units of log learning rate


@dataclass(frozen=True)
class Digits:
    """Images with their labels in three disjoint parts."""

    train: Batch
    validation: Batch
    test: Batch


def deep_mlp(hidden_layers: int, width: int = 64) -> nn.Sequential:
    """Images [n, 64] to logits [n, 10] through `hidden_layers` tanh layers."""
    hidden = [layer for _ in range(hidden_layers) for layer in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(width, 10))


class Trainer:
    """An MLP, its Adam with one param group per tensor, and the compiled 100 steps."""

    def __init__(self, data: Digits, steps: int, generator: torch.Generator) -> None:
        self.data, self.steps, self.generator = data, steps, generator
        self.model = deep_mlp(hidden_layers=4)
        self.names = [name for name, _ in self.model.named_parameters()]
        groups = [{"params": [parameter]} for parameter in self.model.parameters()]
        self.opt = torch.optim.Adam(groups)
        self.program = unrollc.compile(self.model, self.opt, F.cross_entropy)

    def train(self, lrs: Tensor, weight_decays: Tensor, evaluate_on: Batch) -> unrollc.Result:
        """Train from fresh weights on fresh batches; hyperparameters are [tensors] each."""
        reinitialise(self.model, self.generator)
        for group, lr, weight_decay in zip(self.opt.param_groups, lrs, weight_decays, strict=True):
            group["lr"], group["weight_decay"] = lr, weight_decay
        batches = draw_batches(self.data.train, self.steps, BATCH, self.generator)
        return self.program(batches, evaluate_on)

    def accuracy(self, result: unrollc.Result, batch: Batch) -> float:
        """Of the trained weights, 0..1."""
        images, labels = batch
        with torch.no_grad():
            logits = torch.func.functional_call(self.model, dict(result.params), (images,))
        return (logits.argmax(1) == labels).float().mean().item()


@dataclass(frozen=True)
class Tuned:
    """Hyperparameters, each of shape [tensors], and what finding them cost."""

    lrs: Tensor
    weight_decays: Tensor
    seconds: float
    runs: str


def untuned(trainer: Trainer) -> Tuned:
    count = len(trainer.names)
    return Tuned(
        torch.full((count,), START_LR), torch.full((count,), START_WEIGHT_DECAY), 0.0, "none"
    )


def meta_learn(trainer: Trainer, steps: int) -> Tuned:
    """Descend the validation loss in the logarithms, which keeps every value positive."""
    start = untuned(trainer)
    log_lrs = start.lrs.log().requires_grad_()
    log_weight_decays = start.weight_decays.log().requires_grad_()
    outer = torch.optim.Adam([log_lrs, log_weight_decays], lr=OUTER_LR, betas=(0.8, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(outer, steps)
    begin = time.perf_counter()
    with progress("meta-gradient", steps) as advance:
        for _ in range(steps):
            result = trainer.train(log_lrs.exp(), log_weight_decays.exp(), trainer.data.validation)
            outer.zero_grad()
            result.loss.backward()
            outer.step()
            schedule.step()
            accuracy = trainer.accuracy(result, trainer.data.validation)
            advance(f"validation loss {result.loss.item():.3f}, accuracy {100 * accuracy:.1f} %")
    return Tuned(
        log_lrs.exp().detach(),
        log_weight_decays.exp().detach(),
        time.perf_counter() - begin,
        f"{steps} gradients",
    )


def grid_search(trainer: Trainer, seconds: float) -> Tuned:
    """The best cell of a square grid in log space that takes about `seconds` in all."""
    side = affordable_side(trainer, seconds)
    cells = list(
        itertools.product(log_range(*LR_RANGE, side), log_range(*WEIGHT_DECAY_RANGE, side))
    )
    losses: list[float] = []
    begin = time.perf_counter()
    with progress("grid search", len(cells)) as advance, torch.no_grad():
        for lr, weight_decay in cells:
            loss = sum(uniform_run(trainer, lr, weight_decay) for _ in range(REPEATS)) / REPEATS
            losses.append(loss if math.isfinite(loss) else math.inf)
            advance(f"best validation loss {min(losses):.3f}")
    lr, weight_decay = cells[losses.index(min(losses))]
    count = len(trainer.names)
    return Tuned(
        torch.full((count,), lr),
        torch.full((count,), weight_decay),
        time.perf_counter() - begin,
        f"{side} × {side} cells",
    )


def affordable_side(trainer: Trainer, seconds: float) -> int:
    """Of the square grid (at least 2) whose trainings fit, by the clock."""
    trials = 5
    with torch.no_grad():
        uniform_run(trainer, START_LR, START_WEIGHT_DECAY)  # lowers the program without gradients
        begin = time.perf_counter()
        for _ in range(trials):
            uniform_run(trainer, START_LR, START_WEIGHT_DECAY)
    cell = REPEATS * (time.perf_counter() - begin) / trials
    return max(2, round(math.sqrt(seconds / cell)))


def uniform_run(trainer: Trainer, lr: float, weight_decay: float) -> float:
    """Validation loss of one training with the same hyperparameters for every tensor."""
    count = len(trainer.names)
    lrs, weight_decays = torch.full((count,), lr), torch.full((count,), weight_decay)
    return trainer.train(lrs, weight_decays, trainer.data.validation).loss.item()


def log_range(low: float, high: float, count: int) -> list[float]:
    return torch.logspace(math.log10(low), math.log10(high), count).tolist()


@dataclass(frozen=True)
class Scores:
    """Losses and accuracies over trainings that differ in initial weights and batches."""

    validation_loss: float
    validation_accuracy: Estimate
    test_loss: float
    test_accuracy: Estimate


def judge(trainer: Trainer, tuned: Tuned, trainings: int, seed: int) -> Scores:
    """Average over fresh trainings; the same seed gives every method the same ones."""
    trainer.generator.manual_seed(seed)
    losses: list[tuple[float, float]] = []
    accuracies: list[tuple[float, float]] = []
    parts = (trainer.data.validation, trainer.data.test)
    with torch.no_grad():
        for _ in range(trainings):
            result = trainer.train(tuned.lrs, tuned.weight_decays, trainer.data.validation)
            accuracies.append(tuple(trainer.accuracy(result, part) for part in parts))
            losses.append(tuple(loss_of(trainer, result, part) for part in parts))
    validation_loss, test_loss = (sum(column) / trainings for column in zip(*losses, strict=True))
    validation, test = (Estimate.of(list(column)) for column in zip(*accuracies, strict=True))
    return Scores(validation_loss, validation, test_loss, test)


def loss_of(trainer: Trainer, result: unrollc.Result, batch: Batch) -> float:
    images, labels = batch
    logits = torch.func.functional_call(trainer.model, dict(result.params), (images,))
    return F.cross_entropy(logits, labels).item()


def show_scores(methods: dict[str, tuple[Tuned, Scores]], trainings: int) -> None:
    table = Table(title=f"Means of {trainings} fresh trainings, 95 % intervals of accuracy")
    table.add_column("method", no_wrap=True)
    for heading in ("search", "s", "val loss", "val accuracy", "test loss", "test accuracy"):
        table.add_column(heading, justify="right")
    for method, (tuned, scores) in methods.items():
        table.add_row(
            method,
            tuned.runs,
            f"{tuned.seconds:.1f}",
            f"{scores.validation_loss:.3f}",
            str(scores.validation_accuracy),
            f"{scores.test_loss:.3f}",
            str(scores.test_accuracy),
        )
    console.print(table)


def show_hyperparameters(names: list[str], methods: dict[str, Tuned]) -> None:
    table = Table(title="Learning rate / weight decay")
    table.add_column("tensor")
    for method in methods:
        table.add_column(method, justify="right")
    for index, name in enumerate(names):
        values = [
            f"{tuned.lrs[index].item():.1e} / {tuned.weight_decays[index].item():.1e}"
            for tuned in methods.values()
        ]
        table.add_row(name, *values)
    console.print(table)


def main(
    steps: Annotated[int, typer.Option(help="Outer steps, one meta-gradient each.")] = 60,
    inner: Annotated[int, typer.Option(help="Inner steps of Adam in a training.")] = 100,
    trainings: Annotated[int, typer.Option(help="Fresh trainings that judge a method.")] = 20,
    seed: Annotated[int, typer.Option(help="Of data split, weights and batches.")] = 0,
    quick: Annotated[bool, typer.Option(help="A few small steps, to see that it runs.")] = False,
) -> None:
    """Meta-learn Adam's learning rates and weight decays; compare with a grid search."""
    if quick:
        steps, inner, trainings = 3, 10, 3
    torch.set_num_threads(1)  # the matrices are too small to share out
    generator = torch.Generator().manual_seed(seed)
    trainer = Trainer(Digits(*load_parts([400, 600], generator)), inner, generator)
    learned = meta_learn(trainer, steps)
    tuned = {
        "untuned": untuned(trainer),
        "grid search": grid_search(trainer, learned.seconds),
        "meta-learned": learned,
    }
    console.print(
        "Both searches get the same wall time, lowering included; a meta-gradient trains once and "
        f"goes back through all {inner} steps, a cell of the grid trains {REPEATS} times."
    )
    scores = {name: judge(trainer, method, trainings, seed + 1) for name, method in tuned.items()}
    show_scores({name: (tuned[name], scores[name]) for name in tuned}, trainings)
    show_hyperparameters(trainer.names, tuned)


if __name__ == "__main__":
    typer.run(main)
