"""Omniglot (Lake et al. 2015) from its own folder layout.

DIR/images_background/<Alphabet>/characterNN/*.png
DIR/images_evaluation/<Alphabet>/characterNN/*.png
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from fewshot import Characters, Split, split_by_family
from PIL import Image, ImageOps

SIDE = 28


class OmniglotLayoutError(ValueError):
    """The folder does not look like Omniglot; the message says what is missing and where."""


def load_omniglot(directory: Path, seed: int = 0) -> Split:
    """Background characters for training and validation (7 : 1), evaluation ones for testing."""
    background = read_characters(directory, "images_background")
    test = read_characters(directory, "images_evaluation")
    generator = torch.Generator().manual_seed(seed)
    parts = split_by_family(background, lambda name: name, (0.875, 0.125), generator)
    return Split(parts.train, parts.validation, test)


def read_characters(directory: Path, part: str) -> Characters:
    """One part of the data set; a class is named "Alphabet/characterNN"."""
    folders = character_folders(directory, part)
    files = {folder: sorted(folder.glob("*.png")) for folder in folders}
    _check_samples(files)
    images = np.stack(
        [np.stack([read_image(file) for file in files[folder]]) for folder in folders]
    )
    names = tuple(f"{folder.parent.name}/{folder.name}" for folder in folders)
    return Characters(torch.from_numpy(images), names)


def character_folders(directory: Path, part: str) -> list[Path]:
    """The characterNN folders of every alphabet of one part."""
    root = directory / part
    if not root.is_dir():
        raise OmniglotLayoutError(
            f"no folder {part} in {directory} ({_listing(directory)}); "
            "give the folder that holds images_background and images_evaluation, unzipped"
        )
    folders = sorted(folder for folder in root.glob("*/character*") if folder.is_dir())
    if not folders:
        raise OmniglotLayoutError(f"no folders Alphabet/characterNN in {root} ({_listing(root)})")
    return folders


def read_image(file: Path) -> np.ndarray:
    """Black ink on white paper to uint8 [28, 28] with ink 255."""
    with Image.open(file) as image:
        grey = ImageOps.invert(image.convert("L"))
        return np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BOX))


def _check_samples(files: dict[Path, list[Path]]) -> None:
    first, *others = files
    if not files[first]:
        raise OmniglotLayoutError(f"no .png files in {first} ({_listing(first)})")
    for folder in others:
        if len(files[folder]) != len(files[first]):
            raise OmniglotLayoutError(
                f"{folder} has {len(files[folder])} images, {first} has {len(files[first])}; "
                "every character needs equally many"
            )


def _listing(directory: Path) -> str:
    if not directory.is_dir():
        return "the folder does not exist"
    names = sorted(entry.name for entry in directory.iterdir())
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return f"it holds {shown}" if names else "it is empty"
