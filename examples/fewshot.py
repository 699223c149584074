"""Few-shot classification: images grouped by character, a split by character, and tasks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Characters:
    """Classes of equally many grey images each.

    Attributes:
        images: uint8 [classes, samples, height, width]; ink is 255, paper 0.
        names: one name per class.
    """

    images: Tensor
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.dim() != 4 or len(self.images) != len(self.names):
            raise ValueError(
                f"{len(self.names)} names for images of shape {list(self.images.shape)}; "
                "expected [classes, samples, height, width] with one name per class"
            )

    def __len__(self) -> int:
        return len(self.names)

    def select(self, indices: list[int]) -> Characters:
        """The classes at `indices`, in that order."""
        return Characters(self.images[indices], tuple(self.names[i] for i in indices))


@dataclass(frozen=True)
class Split:
    """Disjoint classes: no character of one part is in another."""

    train: Characters
    validation: Characters
    test: Characters


def split_by_family(
    characters: Characters,
    family: Callable[[str], str],
    fractions: tuple[float, float],
    generator: torch.Generator,
) -> Split:
    """Split at random by family, so that classes that share a family stay in one part.

    Args:
        family: from a class name to the family's name.
        fractions: shares of families for training and validation; the rest is for testing.
    """
    families = sorted({family(name) for name in characters.names})
    order = torch.randperm(len(families), generator=generator).tolist()
    bounds = [round(len(families) * share) for share in (fractions[0], sum(fractions))]
    part_of = {
        families[index]: sum(rank >= bound for bound in bounds) for rank, index in enumerate(order)
    }
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for index, name in enumerate(characters.names):
        parts[part_of[family(name)]].append(index)
    return Split(*(characters.select(part) for part in parts))


@dataclass(frozen=True)
class Task:
    """One classification problem: adapt on `support`, judge on `query`.

    Attributes:
        support: images float32 [ways * shots, 1, height, width] in 0..1, labels int64.
        query: likewise with ways * queries images.
        names: the character behind each label.
    """

    support: Batch
    query: Batch
    names: tuple[str, ...]


@dataclass(frozen=True)
class TaskSampler:
    """Draws N-way K-shot tasks; the same generator state draws the same tasks.

    Each character of a task has one random orientation, the same for its support and query
    images. A character and an orientation make a class, so there are more classes than any
    training sees. (Quarter turns are usual on Omniglot since Santoro et al. 2016; here every
    angle is possible, and the mirror image too.)
    """

    characters: Characters
    generator: torch.Generator
    ways: int = 5
    shots: int = 1
    queries: int = 15

    def __post_init__(self) -> None:
        classes, samples = self.characters.images.shape[:2]
        if classes < self.ways:
            raise ValueError(f"{self.ways}-way tasks need {self.ways} classes; there are {classes}")
        if samples < self.shots + self.queries:
            raise ValueError(
                f"{self.shots} shots and {self.queries} queries need "
                f"{self.shots + self.queries} samples per class; there are {samples}"
            )

    @property
    def images_per_task(self) -> int:
        return self.ways * (self.shots + self.queries)

    def draw(self) -> Task:
        """A task of `ways` distinct characters; no image is both support and query."""
        classes, samples = self.characters.images.shape[:2]
        chosen = torch.randperm(classes, generator=self.generator)[: self.ways]
        drawn = torch.stack(
            [
                self.characters.images[index][torch.randperm(samples, generator=self.generator)]
                for index in chosen
            ]
        )
        drawn = drawn[:, : self.shots + self.queries] / 255
        drawn = orient(drawn, random_orientations(self.ways, self.generator))
        support, query = drawn[:, : self.shots], drawn[:, self.shots :]
        names = tuple(self.characters.names[index] for index in chosen.tolist())
        return Task(_batch(support), _batch(query), names)


def _batch(images: Tensor) -> Batch:
    """[ways, n, height, width] to [ways * n, 1, height, width] and its labels."""
    ways, count = images.shape[:2]
    return images.flatten(0, 1).unsqueeze(1), torch.arange(ways).repeat_interleave(count)


@dataclass(frozen=True)
class Orientations:
    """Counterclockwise angles in radians [n], and whether mirrored first [n]."""

    angles: Tensor
    mirrored: Tensor


def random_orientations(count: int, generator: torch.Generator) -> Orientations:
    """Uniform over angles and mirror images."""
    angles = 2 * math.pi * torch.rand(count, generator=generator)
    return Orientations(angles, torch.rand(count, generator=generator) < 0.5)


def orient(images: Tensor, orientations: Orientations) -> Tensor:
    """Mirror and turn float [n, channels, height, width], all channels of an image alike."""
    mirrored = orientations.mirrored.view(-1, 1, 1, 1)
    images = torch.where(mirrored, images.flip(-1), images)
    cos, sin = orientations.angles.cos(), orientations.angles.sin()
    zero = torch.zeros_like(cos)
    rows = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks and the half width of its 95 % confidence interval."""

    mean: float
    half_width: float

    @staticmethod
    def of(accuracies: list[float]) -> Estimate:
        """Normal approximation, tasks being independent draws."""
        values = torch.tensor(accuracies, dtype=torch.float64)
        error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return Estimate(values.mean().item(), 1.96 * error)

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} % ± {100 * self.half_width:.1f} %"
