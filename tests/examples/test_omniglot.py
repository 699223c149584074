"""Omniglot's folder layout, on a small imitation."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from omniglot import OmniglotLayoutError, load_omniglot, read_characters, read_image
from PIL import Image


def test_parts(omniglot_folder: Path) -> None:
    split = load_omniglot(omniglot_folder, seed=0)
    assert (len(split.train), len(split.validation), len(split.test)) == (42, 6, 6)
    assert not set(split.train.names) & set(split.validation.names)
    assert set(split.test.names) == {f"Tagalog/character{n:02d}" for n in range(1, 7)}
    assert split.train.images.shape == (42, 20, 28, 28)
    assert split.train.images.dtype == torch.uint8


def test_split_follows_the_seed(omniglot_folder: Path) -> None:
    first, again, other = (load_omniglot(omniglot_folder, seed).validation for seed in (0, 0, 1))
    assert first.names == again.names != other.names
    assert torch.equal(first.images, again.images)


def test_ink_is_bright(tmp_path: Path) -> None:
    paper = np.full((105, 105), True)
    paper[:, :45] = False  # black ink on the left
    Image.fromarray(paper).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.shape == (28, 28) and image.dtype == np.uint8
    assert (image[:, :12] == 255).all() and (image[:, 12:] == 0).all()


def test_files_other_than_png_are_left_out(omniglot_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(omniglot_folder, root)
    folder = root / "images_evaluation" / "Tagalog" / "character01"
    (folder / "notes.txt").write_text("not an image")
    (root / "images_evaluation" / "Tagalog" / "readme").write_text("not a character")
    assert read_characters(root, "images_evaluation").images.shape == (6, 20, 28, 28)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(OmniglotLayoutError, match="the folder does not exist"):
        load_omniglot(tmp_path / "nowhere")
    with pytest.raises(OmniglotLayoutError, match=r"no folder images_background .*it is empty"):
        load_omniglot(tmp_path)
    (tmp_path / "omniglot-py").mkdir()
    with pytest.raises(OmniglotLayoutError, match="it holds omniglot-py"):
        load_omniglot(tmp_path)


def test_missing_evaluation(omniglot_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(omniglot_folder / "images_background", root / "images_background")
    with pytest.raises(OmniglotLayoutError, match="no folder images_evaluation"):
        load_omniglot(root)


def test_no_characters(tmp_path: Path) -> None:
    (tmp_path / "images_background" / "Latin").mkdir(parents=True)
    with pytest.raises(OmniglotLayoutError, match=r"no folders Alphabet/characterNN .*Latin"):
        load_omniglot(tmp_path)


def test_character_without_images(tmp_path: Path) -> None:
    (tmp_path / "images_background" / "Latin" / "character01").mkdir(parents=True)
    with pytest.raises(OmniglotLayoutError, match=r"no \.png files in .*character01"):
        load_omniglot(tmp_path)


def test_unequal_numbers_of_images(omniglot_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(omniglot_folder, root)
    next((root / "images_background" / "Latin" / "character03").glob("*.png")).unlink()
    with pytest.raises(OmniglotLayoutError, match=r"character03 has 19 images, .* has 20"):
        load_omniglot(root)
