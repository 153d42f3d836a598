# SPDX-License-Identifier: Apache-2.0
"""Readers of documents: PaddleOCR-VL, dots.ocr, and Step3-VL, which cuts pages into patches."""

from __future__ import annotations

from typing import Any

from PIL import Image

from aircache_sglang.testing.checkpoints import make_dots_ocr, make_paddleocr_vl, make_step_vl
from tests.support.families.family import Family, Reader, Words

PADDLE = ("<|IMAGE_START|>", "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_END|>")
DOTS = ("<|img|>", "<|imgpad|>", "<|endofimg|>")
SIDE = 28  # pixels of a visual token


class PaddleReader(Reader):
    """SGLang interpolates the tower's positions with the corners not aligned
    (models/paddleocr_vl.py, interpolate_pos_encoding)."""

    def _load(self, attention: str | dict[str, str]) -> Any:
        model = super()._load(attention)
        [embeddings] = [m for m in model.modules() if hasattr(m, "interpolation_align_corners")]
        embeddings.interpolation_align_corners = False
        return model


def dots_expansion(_: int, image: Image.Image) -> str:
    """One span, a token for each 28 x 28 pixels."""
    start, token, end = DOTS
    return start + token * (image.width // SIDE * image.height // SIDE) + end


def step_expansion(_: int, image: Image.Image) -> str:
    """81 tokens for each patch, then 169 for the whole picture."""
    from sglang.srt.multimodal.processors.step3_vl import ImagePatcher

    _, patches, newlines = ImagePatcher()(image)
    text = ""
    for newline in newlines or [False] * len(patches):
        text += "<patch_start>" + "<im_patch>" * 81 + "<patch_end>"
        text += "<patch_newline>" if newline else ""
    return text + "<im_start>" + "<im_patch>" * 169 + "<im_end>"


FAMILIES = {
    "paddleocr-vl": Family(
        make_paddleocr_vl, "".join(PADDLE), None, PaddleReader, Words(PADDLE[1], PADDLE[::2])
    ),
    "dots-ocr": Family(
        *(make_dots_ocr, "".join(DOTS), None, None, Words(DOTS[1], DOTS[::2])),
        dtype="bfloat16",
        expansion=dots_expansion,
    ),
    "step-vl": Family(
        *(make_step_vl, "<im_patch>", None, None),
        Words("<im_patch>", ("<im_start>", "<im_end>", "<patch_start>", "<patch_newline>")),
        expansion=step_expansion,
    ),
}
