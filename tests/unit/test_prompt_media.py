# SPDX-License-Identifier: Apache-2.0
"""Prompts against the pictures beside them (patches/aircache_patches/prompt_media.py)."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from aircache_patches.prompt_media import (
    Mark,
    check_embedding,
    check_grid,
    check_patches,
    check_runs,
    check_spans,
    check_tensor,
    check_tiles,
    fit,
    runs_of,
)

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
PAD, START, END = 7, 5, 6
# As SGLang's processors of Qwen*-VL and of InternVL, and Transformers' of LLaVA, say it.
QWEN = Mark(
    *("picture", "<|image_pad|>", PAD, PICTURE),
    re.compile(r"<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>|<image>"),
)
INTERNVL = Mark("picture", "<IMG_CONTEXT>", PAD, "<image>", re.compile("<image>"))
LLAVA = Mark("picture", "<image>", PAD, "<image>", re.compile("<image>"))


@pytest.mark.parametrize(
    ("mark", "prompt", "given"),
    [
        (QWEN, f"a{PICTURE}b{PICTURE}", 2),
        (QWEN, [1, START, PAD, END, 2], 1),
        (QWEN, "no picture", 0),
        (INTERNVL, "a<image>b", 1),
        (LLAVA, "<image><image>", 2),
        (LLAVA, [PAD, PAD, 1], 2),
    ],
)
def test_a_prompt_that_fits_is_unchanged(mark: Mark, prompt: Any, given: int) -> None:
    assert fit(prompt, given, mark) == (prompt, [])


@pytest.mark.parametrize(
    ("mark", "prompt", "given", "found"),
    [
        (QWEN, f"{PICTURE} what is <|image_pad|>?", 1, "2 pictures"),
        (QWEN, f"{PICTURE} what is {PICTURE}?", 1, "2 pictures"),
        (QWEN, f"{PICTURE} what is an <image>?", 1, "2 pictures"),
        (QWEN, PICTURE, 2, "1 picture "),
        (QWEN, "what is <|image_pad|>?", 0, "1 picture "),
        (QWEN, [1, START, PAD, END, PAD], 1, "2 pictures"),
        (QWEN, [1, 2], 1, "0 pictures"),
        (INTERNVL, "<image> what is <IMG_CONTEXT>?", 1, "2 pictures"),
        (LLAVA, [PAD, PAD, PAD], 1, "3 pictures"),
    ],
)
def test_a_prompt_that_does_not_fit(mark: Mark, prompt: Any, given: int, found: str) -> None:
    with pytest.raises(ValueError, match=f"speaks of {found}.*brings {given}; write") as error:
        fit(prompt, given, mark)
    assert mark.token in str(error.value) and "\n" not in str(error.value)


def test_marks_that_a_processor_adds() -> None:
    assert fit("a question", 2, INTERNVL, may_add=True) == ("a question", [])
    with pytest.raises(ValueError, match="speaks of 2 pictures"):
        fit("<image><image>", 1, INTERNVL, may_add=True)


@pytest.mark.parametrize(
    ("expanded", "single"),
    [
        (
            [1, START, *[PAD] * 3, END, START, *[PAD] * 2, END, 8, 8],
            [1, START, PAD, END, START, PAD, END, 8, 8],
        ),
        (
            f"a{PICTURE.replace('<|image_pad|>', '<|image_pad|>' * 3)}{PICTURE}",
            f"a{PICTURE}{PICTURE}",
        ),
    ],
)
def test_an_expanded_prompt_is_taken_back(expanded: Any, single: Any) -> None:
    prompt, runs = fit(expanded, 2, QWEN)
    assert prompt == single
    assert runs[0] == 3


def test_a_bare_sentinel_becomes_the_native_mark() -> None:
    assert fit("a<image>b", 1, QWEN) == (f"a{PICTURE}b", [])


def test_expanded_runs_must_be_those_of_this_server() -> None:
    ids = [1, START, *[PAD] * 3, END, START, *[PAD] * 2, END]
    assert runs_of(ids, PAD) == [3, 2]
    check_runs([3, 2], ids, QWEN)
    check_runs([], ids, QWEN)
    with pytest.raises(ValueError, match=r"4 times for picture 2, which fills 2; write it once"):
        check_runs([3, 4], ids, QWEN)


def test_spans() -> None:
    assert check_spans([(1, 3), (5, 5)], 6, "picture") == 4
    for offsets in (None, []):
        with pytest.raises(ValueError, match="has no place"):
            check_spans(offsets, 6, "picture")
    for offsets in ([(1, 6)], [(-1, 2)], [(3, 2)]):
        with pytest.raises(ValueError, match="of a prompt that has 6"):
            check_spans(offsets, 6, "picture")


def test_embeddings() -> None:
    check_embedding(torch.zeros(6, 8), 6, 8, "picture")
    check_embedding(torch.zeros(2, 3, 8), 6, 8, "picture")
    with pytest.raises(ValueError, match=r"has 5 rows, and the prompt keeps 6 tokens"):
        check_embedding(torch.zeros(5, 8), 6, 8, "picture")
    for shape in ((6, 9), (8,)):
        with pytest.raises(ValueError, match=r"this model reads \[tokens, 8\]"):
            check_embedding(torch.zeros(shape), 6, 8, "picture")


@pytest.mark.parametrize("value", [[[0.0]], None, torch.zeros(2, 2, dtype=torch.long)])
def test_only_tensors_stand_for_pictures(value: Any) -> None:
    with pytest.raises(ValueError, match="must be a floating-point tensor, got"):
        check_tensor(value, "picture", "precomputed embedding")
    check_tensor(torch.zeros(2, 2), "picture", "precomputed embedding")


def test_grids_and_patches() -> None:
    grid = torch.tensor([[1, 4, 4], [1, 2, 4]])
    assert check_grid(grid, 6, merge=2, kind="picture") == 24
    with pytest.raises(ValueError, match="fills 6 tokens, and the prompt keeps 7"):
        check_grid(grid, 7, merge=2, kind="picture")
    for bad in (None, torch.tensor([1, 4, 4])):
        with pytest.raises(ValueError, match=r"reads \[pictures, 3\]"):
            check_grid(bad, 6, merge=2, kind="picture")
    check_patches(torch.zeros(24, 12), 24, 12, "picture")
    for shape in ((24, 9), (20, 12)):
        with pytest.raises(ValueError, match=r"need \[24, 12\]"):
            check_patches(torch.zeros(shape), 24, 12, "picture")


def test_tiles() -> None:
    check_tiles(torch.zeros(2, 3, 28, 28), 8, side=28, tokens=4, kind="picture")
    with pytest.raises(ValueError, match=r"\[tiles, 3, 28, 28\]"):
        check_tiles(torch.zeros(2, 3, 14, 14), 8, side=28, tokens=4, kind="picture")
    with pytest.raises(ValueError, match="fills 8 tokens, and the prompt keeps 9"):
        check_tiles(torch.zeros(2, 3, 28, 28), 9, side=28, tokens=4, kind="picture")
