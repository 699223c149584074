"""Printed characters as few-shot classes, from the DejaVu fonts that come with matplotlib.

A character is a class. Its samples are its 12 styles (sans, serif and mono, each regular, bold,
oblique and bold oblique), every style under a few small random affine changes.
"""

from __future__ import annotations

import functools
import unicodedata
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from fewshot import Characters, Split, split_by_family
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

STYLES = tuple(
    f"DejaVu{family}{face}.ttf"
    for family, faces in {
        "Sans": ("", "-Bold", "-Oblique", "-BoldOblique"),
        "SansMono": ("", "-Bold", "-Oblique", "-BoldOblique"),
        "Serif": ("", "-Bold", "-Italic", "-BoldItalic"),
    }.items()
    for face in faces
)

SIDE = 28
CANVAS = 2 * SIDE  # glyphs are drawn at twice the size and averaged down after the affine change
EM = 40  # font size on the canvas, in pixels
MARGIN = 4

ROTATION = 10.0  # degrees either way, as the following are either way
SHEAR = 0.1
LOG_SCALE = 0.1
SHIFT = 0.2  # of half the canvas


def font_file(style: str) -> Path:
    """Where matplotlib keeps a style."""
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / style


def common_characters() -> list[str]:
    """The characters that every style has, by code point."""
    charmaps = [set(FT2Font(str(font_file(style))).get_charmap()) for style in STYLES]
    return [chr(code) for code in sorted(set.intersection(*charmaps))]


def draw_upright(character: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """The glyph centred by its ink: uint8 [CANVAS, CANVAS], all zero if there is none."""
    left, top, right, bottom = (round(edge) for edge in font.getbbox(character))
    glyph = Image.new("L", (max(right - left, 1), max(bottom - top, 1)))
    ImageDraw.Draw(glyph).text((-left, -top), character, fill=255, font=font)
    canvas = Image.new("L", (CANVAS, CANVAS))
    ink = glyph.getbbox()
    if ink is not None:
        glyph = glyph.crop(ink)
        glyph.thumbnail((CANVAS - 2 * MARGIN, CANVAS - 2 * MARGIN))
        canvas.paste(glyph, ((CANVAS - glyph.width) // 2, (CANVAS - glyph.height) // 2))
    return np.asarray(canvas)


@functools.cache
def upright_glyphs() -> tuple[Tensor, tuple[str, ...]]:
    """Every usable character in every style: uint8 [classes, styles, CANVAS, CANVAS] and names.

    Left out are characters without ink in some style (spaces, controls), and characters that
    in some style look exactly like an earlier one (Latin A, Greek Alpha, Cyrillic A).
    """
    characters = common_characters()
    glyphs = np.zeros((len(characters), len(STYLES), CANVAS, CANVAS), dtype=np.uint8)
    for column, style in enumerate(STYLES):
        basic = ImageFont.Layout.BASIC
        font = ImageFont.truetype(str(font_file(style)), EM, layout_engine=basic)
        for row, character in enumerate(characters):
            glyphs[row, column] = draw_upright(character, font)
    kept = distinct_rows(glyphs)
    return torch.from_numpy(glyphs[kept]), tuple(characters[row] for row in kept)


def distinct_rows(glyphs: np.ndarray) -> list[int]:
    """Rows with ink in every style and no image that an earlier row has in the same style."""
    seen: list[set[bytes]] = [set() for _ in range(glyphs.shape[1])]
    kept = []
    for row, styles in enumerate(glyphs):
        if not styles.any(axis=(1, 2)).all():
            continue
        images = [image.tobytes() for image in styles]
        if not any(image in earlier for image, earlier in zip(images, seen, strict=True)):
            kept.append(row)
        for image, earlier in zip(images, seen, strict=True):
            earlier.add(image)
    return kept


def random_affine(count: int, generator: torch.Generator) -> Tensor:
    """Rotation x shear x scale and a shift, as `affine_grid` takes them: float32 [count, 2, 3]."""
    uniform = 2 * torch.rand(count, 5, generator=generator) - 1
    angle = torch.deg2rad(ROTATION * uniform[:, 0])
    shear, shift = SHEAR * uniform[:, 1], SHIFT * uniform[:, 3:]
    scale = torch.exp(LOG_SCALE * uniform[:, 2])
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = torch.stack([cos, shear * cos - sin, sin, shear * sin + cos], dim=1)
    return torch.cat([rows.view(count, 2, 2), shift.unsqueeze(2)], dim=2)


def distort(upright: Tensor, generator: torch.Generator) -> Tensor:
    """Each image under its own affine change: uint8 [n, CANVAS, CANVAS] to [n, SIDE, SIDE]."""
    images = upright.unsqueeze(1).float()
    grid = F.affine_grid(
        random_affine(len(images), generator), list(images.shape), align_corners=False
    )
    moved = F.grid_sample(images, grid, align_corners=False)
    return F.avg_pool2d(moved, CANVAS // SIDE).squeeze(1).round().byte()


def render_glyphs(seed: int = 0, variants: int = 2) -> Characters:
    """All characters, `variants` random affine changes of each style.

    Returns:
        images uint8 [classes, variants * 12, 28, 28]; names are the characters themselves.
    """
    upright, names = upright_glyphs()
    generator = torch.Generator().manual_seed(seed)
    samples = [
        distort(upright[:, style], generator)
        for style in range(len(STYLES))
        for _ in range(variants)
    ]
    return Characters(torch.stack(samples, dim=1), names)


def base_letter(character: str) -> str:
    """The letter under the accents: á, ă and ǻ all give a."""
    return unicodedata.normalize("NFD", character)[0]


def load_glyphs(seed: int = 0) -> Split:
    """Meta-train, meta-validation and meta-test characters (70, 10 and 20 % of base letters).

    Accented forms stay with their letter, so that a held-out character has no near twin among
    the training characters.
    """
    generator = torch.Generator().manual_seed(seed)
    return split_by_family(render_glyphs(seed), base_letter, (0.7, 0.1), generator)
