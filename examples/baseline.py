"""The same network without meta-learning: supervised training, a new head, fine-tuning.

The head starts at zero, so that no step is spent on undoing a random one; learning rate and
number of steps are those that do best on validation tasks. BatchNorm stays in training mode, as
it does for MAML.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from conv4 import Conv4
from fewshot import Characters, Task, orient, random_orientations
from torch import nn

BATCH = 64
PEAK_LR = 5e-3
LEARNING_RATES = (0.1, 0.2, 0.4)
STEPS = (10, 20, 40)


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune: SGD over all weights."""

    learning_rate: float
    steps: int


def pretrain(
    characters: Characters,
    images: int,
    generator: torch.Generator,
    on_batch: Callable[[float], None],
) -> Conv4:
    """Tell all the training characters apart, in any orientation, from `images` images.

    Args:
        on_batch: called with the loss of every batch.
    """
    network = Conv4(outputs=len(characters))
    steps = pretraining_steps(images)
    opt = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, PEAK_LR, total_steps=steps)
    classes, samples = characters.images.shape[:2]
    for _ in range(steps):
        label = torch.randint(classes, (BATCH,), generator=generator)
        sample = torch.randint(samples, (BATCH,), generator=generator)
        drawn = characters.images[label, sample].unsqueeze(1) / 255
        loss = F.cross_entropy(network(orient(drawn, random_orientations(BATCH, generator))), label)
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        on_batch(loss.item())
    return network


def pretraining_steps(images: int) -> int:
    """Batches that `images` images make."""
    return max(2, images // BATCH)


def fine_tune(
    network: Conv4, task: Task, learning_rate: float, checkpoints: Sequence[int]
) -> list[float]:
    """Accuracy on the task's queries after each number of steps on its support images."""
    network = copy.deepcopy(network)
    network.head = nn.Linear(network.head.in_features, len(task.names))
    nn.init.zeros_(network.head.weight)
    nn.init.zeros_(network.head.bias)
    opt = torch.optim.SGD(network.parameters(), lr=learning_rate)
    (support, labels), (query, truth) = task.support, task.query
    accuracies = []
    for step in range(1, max(checkpoints) + 1):
        opt.zero_grad()
        F.cross_entropy(network(support), labels).backward()
        opt.step()
        if step in checkpoints:
            with torch.no_grad():
                accuracies.append((network(query).argmax(1) == truth).float().mean().item())
    return accuracies


def choose_recipe(network: Conv4, tasks: Sequence[Task], on_task: Callable[[str], None]) -> Recipe:
    """The learning rate and number of steps with the best mean accuracy over `tasks`."""
    accuracy = torch.zeros(len(LEARNING_RATES), len(STEPS))
    for task in tasks:
        rows = [fine_tune(network, task, rate, STEPS) for rate in LEARNING_RATES]
        accuracy += torch.tensor(rows) / len(tasks)
        on_task("")
    rate, steps = divmod(int(accuracy.argmax()), len(STEPS))
    return Recipe(LEARNING_RATES[rate], STEPS[steps])
