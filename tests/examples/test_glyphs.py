"""The letterforms: which characters, what they look like, how they are split and drawn."""

from __future__ import annotations

import math

import glyphs
import numpy as np
import pytest
import torch
from fewshot import (
    Characters,
    Estimate,
    Orientations,
    Split,
    TaskSampler,
    orient,
    split_by_family,
)


@pytest.fixture(scope="module")
def characters() -> Characters:
    return glyphs.render_glyphs(seed=0, variants=2)


@pytest.fixture(scope="module")
def split() -> Split:
    return glyphs.load_glyphs(seed=0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_number_of_common_characters() -> None:
    common = glyphs.common_characters()
    assert len(glyphs.STYLES) == 12
    assert len(common) == 2383
    assert {"A", "a", "ß", "Ω", "Ж", "→"} <= set(common)


def test_usable_characters_have_ink_and_look_different() -> None:
    images, names = glyphs.upright_glyphs()
    assert images.dtype == torch.uint8
    assert images.shape == (len(names), 12, glyphs.CANVAS, glyphs.CANVAS)
    assert len(set(names)) == len(names) > 2000
    assert images.flatten(2).amax(2).min() > 0
    for style in range(12):
        assert len({image.numpy().tobytes() for image in images[:, style]}) == len(names)
    assert " " not in names
    # Latin, Greek and Cyrillic: one of them stays.
    assert [letter in names for letter in ("A", "Α", "А")] == [True, False, False]  # noqa: RUF001


def test_distinct_rows_drops_empty_and_repeated_images() -> None:
    def row(*pixels: int) -> np.ndarray:
        return np.array(pixels, dtype=np.uint8).reshape(2, 1, 1)

    rows = np.stack([row(1, 2), row(0, 3), row(3, 2), row(3, 4), row(5, 5), row(2, 1)])
    # 1 is empty in the first style; 2 repeats 0 in the second; 3 repeats the dropped 2.
    assert glyphs.distinct_rows(rows) == [0, 4, 5]


def test_rendered_images(characters: Characters) -> None:
    assert characters.images.dtype == torch.uint8
    assert characters.images.shape == (len(characters), 24, 28, 28)
    assert characters.images.amax() > 200
    ink = characters.images.float().mean((2, 3))
    assert ink.min() > 0
    assert 5 < ink.mean() < 60  # mostly paper


def test_rendering_follows_the_seed(characters: Characters) -> None:
    again = glyphs.render_glyphs(seed=0, variants=2)
    other = glyphs.render_glyphs(seed=1, variants=2)
    assert again.names == characters.names == other.names
    assert torch.equal(again.images, characters.images)
    assert not torch.equal(other.images, characters.images)


def test_affine_changes_stay_small() -> None:
    affine = glyphs.random_affine(4000, generator())
    linear, shift = affine[:, :, :2], affine[:, :, 2]
    assert shift.abs().max() <= glyphs.SHIFT
    scale = torch.linalg.det(linear).sqrt()
    assert scale.log().abs().max() <= glyphs.LOG_SCALE + 1e-5
    angle = torch.atan2(linear[:, 1, 0], linear[:, 0, 0])
    assert angle.abs().max() <= math.radians(glyphs.ROTATION) + 1e-5
    assert angle.abs().max() > math.radians(glyphs.ROTATION) * 0.95


def test_parts_share_neither_character_nor_letter(split: Split) -> None:
    parts = [split.train, split.validation, split.test]
    names = [set(part.names) for part in parts]
    letters = [{glyphs.base_letter(name) for name in part.names} for part in parts]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not names[i] & names[j]
        assert not letters[i] & letters[j]
    assert sum(len(part) for part in parts) == len(glyphs.upright_glyphs()[1])
    assert len(split.train) > len(split.test) > len(split.validation) > 100


def test_split_follows_the_seed(characters: Characters) -> None:
    def names(seed: int) -> tuple[str, ...]:
        parts = split_by_family(characters, glyphs.base_letter, (0.7, 0.1), generator(seed))
        return parts.test.names

    assert names(3) == names(3)
    assert names(3) != names(4)


def test_split_keeps_image_and_name_together(split: Split, characters: Characters) -> None:
    row = characters.names.index(split.test.names[7])
    assert torch.equal(split.test.images[7], characters.images[row])


def test_base_letter() -> None:
    assert [glyphs.base_letter(letter) for letter in "áǻa"] == ["a", "a", "a"]
    assert glyphs.base_letter("ø") == "ø"


def test_task(split: Split) -> None:
    sampler = TaskSampler(split.train, generator(), ways=5, shots=2, queries=15)
    task = sampler.draw()
    (support, labels), (query, truth) = task.support, task.query
    assert support.shape == (10, 1, 28, 28) and query.shape == (75, 1, 28, 28)
    assert support.dtype == query.dtype == torch.float32
    assert query.min() >= 0 and query.max() <= 1 and query.max() > 0.5
    assert labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert torch.equal(truth.bincount(), torch.full((5,), 15))
    assert len(set(task.names)) == 5 and set(task.names) <= set(split.train.names)
    assert sampler.images_per_task == 85
    distances = torch.cdist(support.flatten(1), query.flatten(1))
    assert distances.min() > 0  # no image is both support and query


def test_tasks_follow_the_generator(split: Split) -> None:
    def draw(seed: int) -> list[torch.Tensor]:
        sampler = TaskSampler(split.test, generator(seed))
        return [sampler.draw().query[0] for _ in range(2)]

    first, second = draw(5)
    assert torch.equal(torch.stack(draw(5)), torch.stack([first, second]))
    assert not torch.equal(first, second)
    assert not torch.equal(first, draw(6)[0])


def test_orientation_is_one_for_each_character_of_a_task() -> None:
    """A sample that differs from its twin in nothing is turned like its twin."""
    image = torch.zeros(28, 28, dtype=torch.uint8)
    image[6:20, 10] = image[19, 10:18] = 255
    same = Characters(image.expand(5, 16, 28, 28), tuple("abcde"))
    support, query = (part[0] for part in _draw(same))
    assert torch.equal(query.view(5, 15, 28, 28), support.expand(5, 15, 28, 28))
    assert len({turned.numpy().tobytes() for turned in support}) == 5


def _draw(characters: Characters) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    task = TaskSampler(characters, generator()).draw()
    return task.support, task.query


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("mirrored", [False, True])
def test_orient_by_quarter_turns(turns: int, mirrored: bool) -> None:
    image = torch.rand(1, 2, 28, 28, generator=generator())
    angles = torch.tensor([turns * math.pi / 2])
    expected = torch.rot90(image.flip(-1) if mirrored else image, turns, (2, 3))
    actual = orient(image, Orientations(angles, torch.tensor([mirrored])))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)  # float32 grid positions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 7}, "7-way tasks need 7 classes; there are 6"),
        ({"queries": 16}, "need 17 samples per class; there are 16"),
    ],
)
def test_sampler_names_what_is_short(options: dict[str, int], message: str) -> None:
    few = Characters(torch.zeros(6, 16, 28, 28, dtype=torch.uint8), tuple("abcdef"))
    with pytest.raises(ValueError, match=message):
        TaskSampler(few, generator(), **options)


def test_characters_need_a_name_each() -> None:
    with pytest.raises(ValueError, match="2 names for images of shape"):
        Characters(torch.zeros(3, 4, 28, 28), ("a", "b"))


def test_estimate_against_closed_form() -> None:
    # variance of 0, 1, 0, 1 is 1/3 with Bessel's correction
    estimate = Estimate.of([0.0, 1.0, 0.0, 1.0])
    assert estimate.mean == 0.5
    assert estimate.half_width == pytest.approx(1.96 * math.sqrt(1 / 3 / 4))
    assert str(Estimate(0.876, 0.0114)) == "87.6 % ± 1.1 %"
