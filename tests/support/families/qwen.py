# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL and Qwen3-VL."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from PIL import Image
from transformers.vision_utils import get_vision_cu_seqlens

from aircache_sglang.testing.checkpoints import make_qwen2_5_vl, make_qwen3_vl, make_qwen3_vl_moe
from tests.support.families.family import Family, Reader, Words, decoder_of

QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
QWEN_WORDS = Words("<|image_pad|>", ("<|vision_start|>", "<|vision_end|>"))


class QwenReader(Reader):
    """Qwen*-VL: SGLang samples and resizes the frames itself, before Transformers' processor."""

    def read(
        self, text: str, images: list[Image.Image], videos: list[np.ndarray], **fields: Any
    ) -> Any:
        from sglang.srt.multimodal.processors.qwen_vl import preprocess_video

        sampled = [asyncio.run(preprocess_video(decoder_of(video))) for video in videos]
        if sampled and "Qwen3VL" in type(self.processor).__name__:
            fields["video_metadata"] = [data for _, data in sampled]
            fields["do_sample_frames"] = False
        return self.processor(
            text=[text],
            images=images or None,
            videos=[video for video, _ in sampled] or None,
            return_tensors="pt",
            **fields,
        )


class Qwen2_5Reader(QwenReader):
    """SGLang's full vision attention sees a whole video (models/qwen2_5_vl.py:549), not a frame."""

    def _load(self, attention: str | dict[str, str]) -> Any:
        def whole_videos(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            limits = get_vision_cu_seqlens(kwargs["grid_thw"], merge_temporal=True)
            return args, kwargs | {"cu_seqlens": limits}

        model = super()._load(attention)
        model.model.visual.register_forward_pre_hook(whole_videos, with_kwargs=True)
        return model


FAMILIES = {
    "qwen2.5-vl": Family(make_qwen2_5_vl, QWEN_IMAGE, QWEN_VIDEO, Qwen2_5Reader, QWEN_WORDS),
    "qwen3-vl": Family(make_qwen3_vl, QWEN_IMAGE, QWEN_VIDEO, QwenReader, QWEN_WORDS),
    "qwen3-vl-moe": Family(make_qwen3_vl_moe, QWEN_IMAGE, QWEN_VIDEO, QwenReader, QWEN_WORDS),
}
