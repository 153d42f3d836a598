# SPDX-License-Identifier: Apache-2.0
"""LLaVA in the form of its authors, and in Transformers'."""

from __future__ import annotations

from aircache_sglang.testing.checkpoints import (
    make_llava,
    make_llava_next,
    make_llava_next_video,
    make_llava_onevision,
    make_llava_qwen,
)
from tests.support.families.family import Family, Reader, Words

WORDS = Words("<image>")

FAMILIES = {
    "llava-onevision": Family(
        *(make_llava_onevision, "<image>", "<video>", Reader, WORDS), has_tree=False, counts=True
    ),
    "llava-qwen": Family(
        *(make_llava_qwen, "<image>", None, None, WORDS),
        dtype="float16",
        several={"modalities": ["multi-images"]},
    ),
    "llava-next-video": Family(
        *(make_llava_next_video, "<image>", "<video>", Reader, WORDS), has_tree=False, counts=True
    ),
    "llava-next": Family(
        *(make_llava_next, "<image>", None, Reader, WORDS), has_tree=False, counts=True
    ),
    # SGLang's own class does not start with CLIP.
    "llava-1.5": Family(
        *(make_llava, "<image>", None, Reader, WORDS),
        flags=("--model-impl", "transformers"),
        has_tree=False,
        counts=True,
    ),
}
