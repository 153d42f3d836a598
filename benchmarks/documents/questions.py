# SPDX-License-Identifier: Apache-2.0
"""Pages with questions about them, made from seeds; the evaluation set is a fixed part of them.

An answer belongs to the evaluation or to the training by a checksum of itself, so that no answer
that is evaluated was ever an answer, or stood on a page, in training.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from benchmarks.documents.pages import ALPHABET, LETTERS, Sheet, render

KINDS = ("value", "line", "cell", "page")
_HELD_OUT = 8  # one answer in so many is the evaluation's
_REPEATS = 0.3  # share of training's answers in which a character comes again, beside chance

TEMPLATES: dict[str, tuple[str, ...]] = {
    "value": (
        "what is the value of {key}?",
        "find {key} and copy the value beside it",
        "which value belongs to {key}?",
        "please look up {key}",
    ),
    "line": (
        "read line {key}",
        "what is written on line {key}?",
        "copy the text of line {key} please",
        "which text does line {key} show?",
    ),
    "cell": (
        "what stands in row {row}, column {column}?",
        "read the table at row {row} and column {column}",
        "find column {column} and copy its value in row {row}",
        "which value does row {row} show below {column}?",
    ),
    "page": (
        "on page {number}, what is the value of {key}?",
        "look at page {number} and find {key}",
        "which value belongs to {key} on page {number}?",
        "please look up {key}, page {number}",
    ),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """The shape of a request: kind, cells of a page, pages."""

    kind: str
    rows: int
    columns: int
    pages: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.rows < 3 or self.columns < 16 or self.pages < 1:
            raise ValueError(
                "a layout needs at least 3 rows, 16 columns and 1 page, got "
                f"{self.rows}, {self.columns} and {self.pages}"
            )

    @property
    def visual_tokens(self) -> int:
        return self.rows * self.columns * self.pages


# What is evaluated: at least 256 visual tokens a page.
EVALUATED = {
    "value": Layout("value", 16, 16),
    "line": Layout("line", 16, 16),
    "cell": Layout("cell", 12, 24),
    "page": Layout("page", 16, 16, 3),
}
LARGE = {"value": Layout("value", 32, 32), "line": Layout("line", 32, 32)}


@dataclasses.dataclass(frozen=True, slots=True)
class Ask:
    """What can be asked: the question's slots, the answer, and its (page, row, first column)."""

    slots: dict[str, str]
    answer: str
    place: tuple[int, int, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """Pages, and everything that can be asked about them."""

    sheets: tuple[Sheet, ...]
    asks: tuple[Ask, ...]


@dataclasses.dataclass(frozen=True)
class Question:
    """One request: images first, then the prompt, in one user message.

    place: (page, row, first column) of the answer.
    """

    id: str
    kind: str
    prompt: str
    answer: str
    sheets: tuple[Sheet, ...]
    place: tuple[int, int, int]
    seed: tuple[int, ...]

    @property
    def cells(self) -> range:
        """Ordinals of the answer's cells among the visual tokens of all sheets."""
        page, row, column = self.place
        rows, width = self.sheets[0].shape
        first = (page * rows + row) * width + column
        return range(first, first + len(self.answer))

    def images(self) -> list[Image.Image]:
        """The pages, rendered anew; the same pixels each time."""
        generator = np.random.default_rng(self.seed)
        return [Image.fromarray(render(sheet, generator)) for sheet in self.sheets]


class _Writer:
    """Draws strings and fills sheets from one generator."""

    def __init__(self, generator: np.random.Generator, held_out: bool) -> None:
        self.random = generator
        self._held_out = held_out

    def string(self, letters: str, length: int) -> str:
        return "".join(letters[i] for i in self.random.integers(len(letters), size=length))

    def answer(self, low: int, high: int) -> str:
        """A string of `low` to `high` characters on the right side of the checksum.

        Training repeats characters more often than chance does: they are the hard ones to read on
        from. The evaluation does not.
        """
        while True:
            text = self.string(ALPHABET, int(self.random.integers(low, high + 1)))
            if not self._held_out and self.random.random() < _REPEATS:
                at = int(self.random.integers(1, len(text)))
                # Every second one follows itself.
                first = at - 1 if self.random.random() < 0.5 else int(self.random.integers(at))
                text = text[:at] + text[first] + text[at + 1 :]
            if (zlib.crc32(text.encode()) % _HELD_OUT == 0) == self._held_out:
                return text

    def distinct(self, letters: str, length: int, count: int) -> list[str]:
        """`count` strings, no two alike."""
        found: dict[str, None] = {}
        while len(found) < count:
            found.setdefault(self.string(letters, length))
        return list(found)


def _sheet(cells: list[list[str]], bold: np.ndarray) -> Sheet:
    return Sheet(tuple("".join(row) for row in cells), bold)


def _blank(layout: Layout) -> tuple[list[list[str]], np.ndarray]:
    cells = [[" "] * layout.columns for _ in range(layout.rows)]
    return cells, np.zeros((layout.rows, layout.columns), dtype=np.bool_)


def _print(cells: list[list[str]], row: int, column: int, text: str) -> None:
    cells[row][column : column + len(text)] = text


def _blocks(layout: Layout) -> int:
    """Entries side by side: one in 16 cells."""
    return layout.columns // 16


def _entries(
    writer: _Writer, layout: Layout, keys: list[str], first_row: int, page: int = 0
) -> tuple[Sheet, list[Ask]]:
    """`key value` in every place of the page, in the order of `keys`."""
    cells, bold = _blank(layout)
    asks = []
    places = [
        (row, block * 16)
        for block in range(_blocks(layout))
        for row in range(first_row, layout.rows)
    ]
    for (row, column), key in zip(places, keys, strict=True):
        answer = writer.answer(5, 16 - 2 - len(key))
        _print(cells, row, column, key)
        bold[row, column : column + len(key)] = True
        column += len(key) + 1
        _print(cells, row, column, answer)
        asks.append(Ask({"key": key}, answer, (page, row, column)))
    return _sheet(cells, bold), asks


def _value(writer: _Writer, layout: Layout) -> Document:
    keys = writer.distinct(ALPHABET, 3, layout.rows * _blocks(layout))
    sheet, asks = _entries(writer, layout, keys, 0)
    return Document((sheet,), tuple(asks))


def _line(writer: _Writer, layout: Layout) -> Document:
    count = layout.rows * _blocks(layout)
    first = int(writer.random.integers(10, 100 - count))
    keys = [str(first + i) for i in range(count)]
    sheet, asks = _entries(writer, layout, keys, 0)
    return Document((sheet,), tuple(asks))


def _cell(writer: _Writer, layout: Layout) -> Document:
    cells, bold = _blank(layout)
    width = 7
    columns = writer.distinct(LETTERS, 2, (layout.columns - 3) // width)
    rows = writer.distinct("0123456789", 2, layout.rows - 1)
    asks = []
    for j, column in enumerate(columns):
        _print(cells, 0, 3 + j * width, column)
        bold[0, 3 + j * width : 5 + j * width] = True
    for i, row in enumerate(rows, start=1):
        _print(cells, i, 0, row)
        bold[i, 0:2] = True
        for j, column in enumerate(columns):
            text = writer.answer(5, width - 1)
            _print(cells, i, 3 + j * width, text)
            asks.append(Ask({"row": row, "column": column}, text, (0, i, 3 + j * width)))
    return Document((_sheet(cells, bold),), tuple(asks))


def _page(writer: _Writer, layout: Layout) -> Document:
    keys = writer.distinct(ALPHABET, 3, (layout.rows - 1) * _blocks(layout))
    sheets, asks = [], []
    for number in range(1, layout.pages + 1):
        # The same keys on every page, in another order.
        order = [keys[i] for i in writer.random.permutation(len(keys))]
        sheet, found = _entries(writer, layout, order, 1, number - 1)
        heading = f"PAGE {number}"
        text = (heading.ljust(layout.columns), *sheet.text[1:])
        sheet.bold[0, : len(heading)] = True
        sheets.append(Sheet(text, sheet.bold))
        asks += [
            dataclasses.replace(ask, slots=ask.slots | {"number": str(number)}) for ask in found
        ]
    return Document(tuple(sheets), tuple(asks))


_WRITERS: dict[str, Callable[[_Writer, Layout], Document]] = {
    "value": _value,
    "line": _line,
    "cell": _cell,
    "page": _page,
}


def document(layout: Layout, generator: np.random.Generator, *, held_out: bool) -> Document:
    """A document of `layout`; `held_out` draws the answers of the evaluation."""
    return _WRITERS[layout.kind](_Writer(generator, held_out), layout)


def wording(kind: str, slots: dict[str, str], generator: np.random.Generator) -> str:
    """A question in one of the kind's wordings."""
    templates = TEMPLATES[kind]
    return templates[generator.integers(len(templates))].format(**slots)


def evaluation_set(kind: str, n: int, *, layout: Layout | None = None) -> list[Question]:
    """The first `n` questions of a kind's evaluation, each about pages of its own.

    Raises ValueError for an unknown kind or a negative n.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}")
    layout = layout or EVALUATED[kind]
    questions = []
    for index in range(n):
        seed = (2503, 23956, KINDS.index(kind), layout.visual_tokens, index)
        generator = np.random.default_rng(seed)
        made = document(layout, generator, held_out=True)
        ask = made.asks[generator.integers(len(made.asks))]
        prompt = wording(kind, ask.slots, generator)
        name = f"{kind}-{layout.visual_tokens}-{index}"
        questions.append(Question(name, kind, prompt, ask.answer, made.sheets, ask.place, seed))
    return questions
