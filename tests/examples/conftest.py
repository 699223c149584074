"""Examples are scripts beside their modules: make these importable, and fake an Omniglot."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

SAMPLES = 20


def write_character(folder: Path, seed: int, samples: int = SAMPLES) -> None:
    """A character of noisy black squares on white, as Omniglot's 105 x 105 PNGs."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    pattern = rng.random((5, 5)) < 0.3
    for sample in range(samples):
        flipped = rng.random((5, 5)) < 0.05
        ink = np.kron(pattern ^ flipped, np.ones((21, 21), dtype=bool))
        Image.fromarray(~ink).save(folder / f"{seed:04d}_{sample + 1:02d}.png")


@pytest.fixture(scope="session")
def omniglot_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 background characters in two alphabets and 6 evaluation characters in one."""
    root = tmp_path_factory.mktemp("omniglot")
    layout = {"images_background": {"Latin": 24, "Greek": 24}, "images_evaluation": {"Tagalog": 6}}
    seed = 0
    for part, alphabets in layout.items():
        for alphabet, count in alphabets.items():
            for number in range(1, count + 1):
                write_character(root / part / alphabet / f"character{number:02d}", seed)
                seed += 1
    return root
