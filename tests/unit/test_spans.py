# SPDX-License-Identifier: Apache-2.0
"""Where the visual tokens of a prompt lie, read from SGLang's own multimodal items."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.managers.schedule_batch import (
    MM_PAD_SHIFT_VALUE,
    Modality,
    MultimodalDataItem,
)

from aircache_sglang.config import INSTRUCTION_LIMIT
from aircache_sglang.runtime.decide import read_prompt
from aircache_sglang.runtime.spans import (
    VisualPrompt,
    merge_spans,
    placeholder_runs,
    read_spans,
)

PAD = MM_PAD_SHIFT_VALUE


def item(*offsets: tuple[int, int], modality: Modality = Modality.IMAGE) -> MultimodalDataItem:
    """offsets: inclusive pairs, as SGLang writes them."""
    return MultimodalDataItem(modality=modality, offsets=list(offsets))


def prompt_ids(length: int, *offsets: tuple[int, int]) -> list[int]:
    ids = list(range(length))
    for start, end in offsets:
        for position in range(start, end + 1):
            # SGLang's placeholders of one picture are not all the same.
            ids[position] = PAD + position % 4
    return ids


def test_one_picture() -> None:
    prompt = read_prompt(prompt_ids(10, (2, 6)), [item((2, 6))], PAD)
    assert prompt == VisualPrompt(spans=((2, 7),), length=10, n_visual=5)
    assert (prompt.start, prompt.end, prompt.n_between) == (2, 7, 0)
    assert prompt.instruction == (7, 10)
    assert prompt.visual_positions().tolist() == [2, 3, 4, 5, 6]
    assert prompt.between_of(torch.arange(prompt.length)).tolist() == []


def test_several_pictures_in_any_order_and_text_between() -> None:
    ids = prompt_ids(20, (0, 2), (5, 5), (8, 9))
    prompt = read_prompt(ids, [item((8, 9)), item((0, 2)), item((5, 5))], PAD)
    assert isinstance(prompt, VisualPrompt)
    assert prompt.spans == ((0, 3), (5, 6), (8, 10))
    assert (prompt.start, prompt.end, prompt.n_visual, prompt.n_between) == (0, 10, 6, 4)
    assert prompt.visual_positions().tolist() == [0, 1, 2, 5, 8, 9]
    assert prompt.between_of(torch.arange(prompt.length)).tolist() == [3, 4, 6, 7]


def test_adjacent_pictures_are_one_span() -> None:
    prompt = read_prompt(prompt_ids(10, (1, 6)), [item((4, 6)), item((1, 3))], PAD)
    assert isinstance(prompt, VisualPrompt)
    assert prompt.spans == ((1, 7),)
    assert prompt.n_visual == 6


def test_one_video_has_a_span_for_each_frame() -> None:
    ids = prompt_ids(16, (1, 3), (6, 8), (10, 12))
    video = item((1, 3), (6, 8), modality=Modality.VIDEO)
    prompt = read_prompt(ids, [video, item((10, 12))], PAD)
    assert isinstance(prompt, VisualPrompt)
    assert prompt.spans == ((1, 4), (6, 9), (10, 13))
    assert prompt.n_visual == 9


def test_audio_is_not_visual() -> None:
    audio = item((1, 3), modality=Modality.AUDIO)
    assert read_spans([audio]) == []
    assert read_prompt(prompt_ids(8, (1, 3)), [audio], PAD) is None


def test_no_items() -> None:
    assert read_prompt(prompt_ids(4), [], PAD) is None


def test_a_processor_that_leaves_the_offsets_out() -> None:
    bare = MultimodalDataItem(modality=Modality.IMAGE, offsets=None)
    audio = item((6, 6), modality=Modality.AUDIO)
    ids = prompt_ids(10, (1, 3), (6, 6))
    assert placeholder_runs(ids, PAD) == [(1, 4), (6, 7)]
    prompt = read_prompt(ids, [bare, bare], PAD, expected=4)
    assert isinstance(prompt, VisualPrompt)
    assert prompt.spans == ((1, 4), (6, 7))
    assert read_prompt(ids, [bare], PAD, expected=5) == "span_mismatch"
    assert read_prompt(ids, [bare, audio], PAD) == "span_mismatch"
    assert read_prompt(prompt_ids(10), [bare], PAD) == "span_mismatch"


def test_placeholders_that_were_not_replaced() -> None:
    ids = list(range(10))
    ids[2:5] = [99] * 3
    assert read_prompt(ids, [item((2, 4))], PAD) == "span_mismatch"
    prompt = read_prompt(ids, [item((2, 4))], PAD, bare_ids={99})
    assert isinstance(prompt, VisualPrompt)
    assert prompt.spans == ((2, 5),)


@pytest.mark.parametrize(
    ("ids", "items", "reason"),
    [
        (prompt_ids(20, (2, 8)), [item((2, 6)), item((5, 8))], "overlapping_spans"),
        (prompt_ids(20, (2, 8)), [item((2, 8)), item((2, 8))], "overlapping_spans"),
        (prompt_ids(20, (2, 8)), [item((8, 2))], "overlapping_spans"),
        # --allow-auto-truncate cut the prompt, but not the offsets.
        (prompt_ids(8, (2, 7)), [item((2, 11))], "truncated_prompt"),
        (prompt_ids(8, (0, 3)), [item((-2, 3))], "truncated_prompt"),
        (prompt_ids(20, (2, 8)), [item((2, 9))], "span_mismatch"),
        (prompt_ids(20, (3, 8)), [item((2, 8))], "span_mismatch"),
        (prompt_ids(20), [item((2, 8))], "span_mismatch"),
        (prompt_ids(20, (2, 8)), [item((2, 8)), item((11, 12))], "span_mismatch"),
        (prompt_ids(9, (2, 8)), [item((2, 8))], "no_instruction"),
    ],
)
def test_a_layout_that_cannot_be_trusted(
    ids: list[int], items: list[MultimodalDataItem], reason: str
) -> None:
    assert read_prompt(ids, items, PAD) == reason


def test_a_long_instruction_is_scored_at_its_end() -> None:
    long = VisualPrompt(spans=((0, 4),), length=4 + INSTRUCTION_LIMIT + 7, n_visual=4)
    assert long.instruction == (4 + 7, long.length)
    short = VisualPrompt(spans=((0, 4),), length=4 + INSTRUCTION_LIMIT, n_visual=4)
    assert short.instruction == (4, short.length)


def test_a_unified_prompt_keeps_its_instruction() -> None:
    prompt = VisualPrompt(spans=((3, 7), (9, 12)), length=20, n_visual=7)
    unified = prompt.unified()
    assert unified.is_unified and not prompt.is_unified
    assert (unified.start, unified.end, unified.n_visual, unified.n_between) == (0, 20, 20, 0)
    assert unified.instruction == prompt.instruction == (12, 20)
    assert unified.visual_positions().tolist() == list(range(20))


@given(st.data())
def test_positions_partition_the_prompt(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=3, max_size=15))
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    for index, length in enumerate(lengths):
        if index % 2 and length:
            offsets.append((len(ids), len(ids) + length - 1))
        ids += [PAD + 1 if index % 2 else 7] * length
    ids += [7] * data.draw(st.integers(1, 9))
    items = [item(pair) for pair in data.draw(st.permutations(offsets))]
    prompt = read_prompt(ids, items, PAD)
    if not offsets:
        assert prompt is None
        return
    assert isinstance(prompt, VisualPrompt)
    visual = [position for position, token in enumerate(ids) if token >= PAD]
    assert prompt.visual_positions().tolist() == visual
    assert prompt.n_visual == len(visual)
    between = prompt.between_of(torch.arange(prompt.length)).tolist()
    assert len(between) == prompt.n_between
    assert sorted(visual + between) == list(range(prompt.start, prompt.end))
    assert merge_spans(prompt.spans) == prompt.spans
    assert prompt.instruction[1] == len(ids)
