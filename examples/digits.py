"""Scikit-learn's 1,797 images of handwritten digits: parts, batches, fresh networks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from fewshot import Batch
from sklearn.datasets import load_digits
from torch import nn


def load_parts(sizes: Sequence[int], generator: torch.Generator) -> list[Batch]:
    """Disjoint random parts of these sizes, and the rest.

    Each part is images float32 [n, 64] in 0..1 with labels int64 [n].
    """
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=generator)
    images = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
    labels = torch.tensor(digits.target)[order]
    split = [*sizes, len(order) - sum(sizes)]
    return list(zip(images.split(split), labels.split(split), strict=True))


def draw_batches(part: Batch, steps: int, size: int, generator: torch.Generator) -> Batch:
    """Images [steps, size, 64] and labels [steps, size], drawn with replacement."""
    images, labels = part
    drawn = torch.randint(len(labels), (steps, size), generator=generator)
    return images[drawn], labels[drawn]


def reinitialise(model: nn.Module, generator: torch.Generator) -> None:
    """Fresh parameters, uniform in ±1/√n, where n is the length of their last dimension."""
    with torch.no_grad():
        for parameter in model.parameters():
            bound = 1 / math.sqrt(parameter.shape[-1])
            parameter.uniform_(-bound, bound, generator=generator)
