"""The comparison is fair: fine-tuning learns what can be learned, and is chosen by accuracy."""

from __future__ import annotations

import copy

import baseline
import pytest
import torch
from conv4 import Conv4
from fewshot import Characters, Task


@pytest.fixture
def easy_task() -> Task:
    """Each class is a bar at its own height; queries are noisy."""
    images = torch.zeros(5, 1, 28, 28)
    for label in range(5):
        images[label, 0, 5 * label + 2 : 5 * label + 5, 4:24] = 1
    labels = torch.arange(5)
    noise = 0.05 * torch.rand(15, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return Task(
        (images, labels), (images.repeat(3, 1, 1, 1) + noise, labels.repeat(3)), tuple("abcde")
    )


@pytest.fixture
def network() -> Conv4:
    torch.manual_seed(0)
    return Conv4(outputs=11)


def test_fine_tuning_learns_and_leaves_the_network_alone(network: Conv4, easy_task: Task) -> None:
    before = copy.deepcopy(network.state_dict())
    accuracies = baseline.fine_tune(network, easy_task, 0.1, [1, 20])
    assert len(accuracies) == 2
    assert accuracies[1] == 1.0
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


def test_recipe_is_the_best_of_the_grid(
    network: Conv4, easy_task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(_network: Conv4, _task: Task, rate: float, steps: tuple[int, ...]) -> list[float]:
        return [1 - abs(rate - 0.2) - abs(count - 20) / 1000 for count in steps]

    monkeypatch.setattr(baseline, "fine_tune", fake)
    seen: list[str] = []
    recipe = baseline.choose_recipe(network, [easy_task, easy_task], seen.append)
    assert recipe == baseline.Recipe(learning_rate=0.2, steps=20)
    assert len(seen) == 2


def test_ordinary_training_learns_the_characters() -> None:
    torch.manual_seed(0)
    ring, bar = torch.zeros(2, 28, 28, dtype=torch.uint8).unbind()
    ring[6:22, 6:22] = 255
    ring[10:18, 10:18] = 0
    bar[4:24, 12:16] = 255
    images = torch.stack([ring, bar]).unsqueeze(1).repeat(1, 4, 1, 1)
    losses: list[float] = []
    network = baseline.pretrain(
        Characters(images, ("ring", "bar")), 1280, torch.Generator().manual_seed(0), losses.append
    )
    assert network.head.out_features == 2
    assert len(losses) == baseline.pretraining_steps(1280) == 20
    assert losses[-1] < 0.1 < losses[0]
