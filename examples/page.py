# SPDX-License-Identifier: Apache-2.0
"""An invoice that the repository's own model can read: a code and a value in every line."""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

from benchmarks.documents.pages import ALPHABET, Sheet, render

STYLE = 24  # the seed of font, inks and noise: dark on light
WIDTH = 16  # cells of one entry: a code of three, a blank, a value of five to eleven


@dataclasses.dataclass(frozen=True)
class Invoice:
    """facts: what stands beside each code, in the order of the page."""

    sheet: Sheet
    facts: dict[str, str]

    def image(self) -> Image.Image:
        """The page, 28 pixels a cell; the same pixels each time."""
        return Image.fromarray(render(self.sheet, np.random.default_rng(STYLE)))


def invoice(number: int = 1, *, rows: int = 16) -> Invoice:
    """A page of `rows` x 16 visual tokens, full of entries; all follows `number`."""
    if rows < 8:
        raise ValueError(f"an invoice needs at least 8 rows, got {rows}")
    pick = np.random.default_rng(number)

    def serial(length: int) -> str:
        return "".join(ALPHABET[i] for i in pick.choice(len(ALPHABET), length, replace=False))

    facts = {"REF": serial(8), "ACC": serial(10), "BUY": serial(7)}
    net = 0
    while len(facts) < rows - 3:
        article, price = serial(3), int(pick.integers(10, 900))
        facts.setdefault(article, f"{price}EUR")
        net += price
    facts |= {"NET": f"{net}EUR", "TAX": f"{net // 5}EUR", "SUM": f"{net + net // 5}EUR"}
    entries = [f"{code} {value}".ljust(WIDTH) for code, value in facts.items()]
    bold = np.zeros((rows, WIDTH), dtype=np.bool_)
    bold[:, :3] = True
    return Invoice(Sheet(tuple(entries), bold), facts)
