# SPDX-License-Identifier: Apache-2.0
"""Pages as pictures: one character a cell, one cell a visual token."""

from __future__ import annotations

import dataclasses
import functools
import string
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

CELL = 28  # Qwen2-VL: one visual token is a square of 28 x 28 pixels
BLANK = " "
# As on number plates, without the letters that look like digits.
LETTERS = "".join(sorted(set(string.ascii_uppercase) - {"I", "O"}))
ALPHABET = string.digits + LETTERS
CHARACTERS = BLANK + ALPHABET
FONTS = ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif")
SIZES = (18, 20, 22)
_SHIFT = 3  # pixels that a page's print may be off centre


@dataclasses.dataclass(frozen=True, slots=True)
class Sheet:
    """What stands on a page: `text` [rows] of equally long lines, `bold` [rows, columns]."""

    text: tuple[str, ...]
    bold: NDArray[np.bool_]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.text), len(self.text[0])

    def codes(self) -> NDArray[np.int64]:
        """[rows, columns] indices into CHARACTERS."""
        return np.array([[CHARACTERS.index(c) for c in line] for line in self.text])


@functools.cache
def _glyphs(font: str, size: int, bold: bool) -> NDArray[np.float32]:
    """Coverage [len(CHARACTERS), CELL + 2 * _SHIFT, CELL + 2 * _SHIFT], 0 to 1."""
    # Matplotlib ships the DejaVu fonts.
    name = font + ("-Bold" if bold else "") + ".ttf"
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
    face = ImageFont.truetype(str(path), size)
    side = CELL + 2 * _SHIFT
    drawn = []
    for character in CHARACTERS:
        cell = Image.new("L", (side, side))
        ImageDraw.Draw(cell).text((side / 2, side / 2), character, fill=255, font=face, anchor="mm")
        drawn.append(np.asarray(cell, dtype=np.float32) / 255)
    return np.stack(drawn)


def render(sheet: Sheet, generator: np.random.Generator) -> NDArray[np.uint8]:
    """The page as RGB [rows * CELL, columns * CELL, 3]: font, inks, position and noise vary."""
    font = FONTS[generator.integers(len(FONTS))]
    size = SIZES[generator.integers(len(SIZES))]
    codes = sheet.codes()
    plain, bold = _glyphs(font, size, False), _glyphs(font, size, True)
    cells = np.where(sheet.bold[:, :, None, None], bold[codes], plain[codes])
    y, x = generator.integers(2 * _SHIFT + 1, size=2)
    cells = cells[:, :, y : y + CELL, x : x + CELL]
    rows, columns = sheet.shape
    ink_at = cells.transpose(0, 2, 1, 3).reshape(rows * CELL, columns * CELL, 1)
    dark = generator.integers(0, 100, size=3).astype(np.float32)
    light = generator.integers(190, 256, size=3).astype(np.float32)
    ink, paper = (light, dark) if generator.random() < 0.2 else (dark, light)
    page = paper + (ink - paper) * ink_at
    noise = generator.standard_normal(page.shape[:2], dtype=np.float32)[:, :, None]
    page += noise * generator.uniform(0, 10)
    return page.clip(0, 255).astype(np.uint8)
