# SPDX-License-Identifier: Apache-2.0
"""Where a prompt's visual tokens lie and where its instruction begins; chunks of positions.

Spans come from the request's own multimodal items, never from a token name of one model family.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from aircache_sglang.config import INSTRUCTION_LIMIT


@dataclasses.dataclass(frozen=True, slots=True)
class VisualPrompt:
    """Layout of one prompt.

    spans: half-open [start, end) position ranges of visual tokens, ascending, disjoint, merged.
    length: tokens of the prompt.
    n_visual: visual tokens of all spans (images and frames share one budget).
    window_start: first position of the instruction; None for `end`. See `unified`.
    """

    spans: tuple[tuple[int, int], ...]
    length: int
    n_visual: int
    window_start: int | None = None

    def unified(self) -> VisualPrompt:
        """The same prompt with all of its tokens in the place of the visual ones (paper, table 6).

        Its instruction is still what follows the last picture, and may be evicted itself.
        """
        return VisualPrompt(((0, self.length),), self.length, self.length, window_start=self.end)

    @property
    def is_unified(self) -> bool:
        """Whether text may be evicted too."""
        return self.window_start is not None

    @property
    def start(self) -> int:
        """First visual position; the text before it is the shareable head of the prompt."""
        return self.spans[0][0]

    @property
    def end(self) -> int:
        """One past the last visual position."""
        return self.spans[-1][1]

    @property
    def n_between(self) -> int:
        """Text tokens between visual spans."""
        return self.end - self.start - self.n_visual

    @property
    def instruction(self) -> tuple[int, int]:
        """Half-open positions of the instruction, at most the last INSTRUCTION_LIMIT tokens."""
        start = self.end if self.window_start is None else self.window_start
        return max(start, self.length - INSTRUCTION_LIMIT), self.length

    def visual_positions(self) -> torch.Tensor:
        """int64 [n_visual], ascending."""
        return torch.cat([torch.arange(a, b) for a, b in self.spans])

    def visual_of(self, values: torch.Tensor) -> torch.Tensor:
        """The visual tokens' rows of `values` [>= end, ...]; slices copy no index to a device."""
        return torch.cat(self.visual_parts(values))

    def visual_parts(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Views, one a span, of the visual tokens' rows of `values` [>= end, ...]."""
        return [values[start:end] for start, end in self.spans]

    def between_of(self, values: torch.Tensor) -> torch.Tensor:
        """The rows of `values` [>= end, ...] of the text between visual spans."""
        return torch.cat(self.between_parts(values))

    def between_parts(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Views, at least one, of the rows of `values` [>= end, ...] between visual spans."""
        gaps = itertools.pairwise(self.spans)
        return [values[:0], *[values[left[1] : right[0]] for left, right in gaps]]


def merge_spans(spans: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...] | None:
    """Sort half-open spans and join the adjacent ones; None if two of them overlap."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start < merged[-1][1]:
            return None
        if merged and start == merged[-1][1]:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return tuple(merged)


def read_spans(mm_items: Sequence[Any]) -> list[tuple[int, int]]:
    """Half-open spans of all image and video items.

    SGLang stores inclusive (start, end) pairs, absolute in `origin_input_ids`, several for one
    video (managers/schedule_batch.py, MultimodalDataItem.offsets).
    """
    spans: list[tuple[int, int]] = []
    for item in mm_items:
        if item.is_image() or item.is_video():
            spans.extend((int(start), int(end) + 1) for start, end in item.offsets or ())
    return spans


def placeholder_runs(input_ids: Sequence[int], pad_floor: int) -> list[tuple[int, int]]:
    """Half-open maximal runs of ids >= pad_floor."""
    spans: list[tuple[int, int]] = []
    for position, token in enumerate(input_ids):
        if token >= pad_floor:
            start = spans.pop()[0] if spans and spans[-1][1] == position else position
            spans.append((start, position + 1))
    return spans


def bare_spans(
    input_ids: Sequence[int], mm_items: Sequence[Any], pad_floor: int
) -> list[tuple[int, list[int]]]:
    """(start, placeholders) of items that SGLang's Transformers fallback leaves unpadded.

    Their tokens in the prompt are the same for every picture (models/transformers.py,
    pad_input_ids); the placeholders are drawn from the picture's hash, as in other models.
    """
    return [
        (int(start), list(item.padding_sequence(int(end) + 1 - int(start))))
        for item in mm_items
        if item.pad_value is not None
        for start, end in item.offsets or ()
        if int(start) < len(input_ids) and input_ids[int(start)] < pad_floor
    ]


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """Positions [start, end) of a request, in the batch's rows from `first_row` on."""

    start: int
    end: int
    first_row: int

    @property
    def rows(self) -> slice:
        """The batch's rows."""
        return slice(self.first_row, self.first_row + self.end - self.start)

    def within(self, lo: int, hi: int) -> Chunk | None:
        """The part in [lo, hi), where all before `lo` has been seen; None where there is none."""
        start, end = max(lo, self.start), min(hi, self.end)
        if start >= end:
            return None
        # A gap means that tokens were matched in the tree; their queries are lost.
        assert start == lo, f"queries skip from {lo} to {start}"
        return Chunk(start, end, self.first_row + start - self.start)
