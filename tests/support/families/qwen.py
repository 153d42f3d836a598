# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL, Qwen3-VL, Qwen3.5 and InternS2-Preview."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Qwen3_5MoeForConditionalGeneration
from transformers.vision_utils import get_vision_cu_seqlens

from aircache_sglang.testing.checkpoints import (
    make_interns2_preview,
    make_qwen2_5_vl,
    make_qwen3_5,
    make_qwen3_5_moe,
    make_qwen3_vl,
    make_qwen3_vl_moe,
)
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


class HybridReader(QwenReader):
    """Qwen3.5, token by token as on the CPU platform: Transformers' own prefill sums the delta rule
    up by chunks, which rounds otherwise and may choose other experts."""

    tolerance = 2e-4

    def _load(self, attention: str | dict[str, str]) -> Any:
        model = self._as_made(attention)
        module = sys.modules[type(model).__module__]
        module.torch_chunk_gated_delta_rule = module.torch_recurrent_gated_delta_rule
        return model

    def _as_made(self, attention: str | dict[str, str]) -> Any:
        return super()._load(attention)


class InternS2Reader(HybridReader):
    """Which Transformers does not know by its own name."""

    def _as_made(self, attention: str | dict[str, str]) -> Any:
        return Qwen3_5MoeForConditionalGeneration.from_pretrained(
            self.checkpoint, dtype=torch.float32, attn_implementation=attention
        ).eval()


# States in the type of the model: SGLang's default, bfloat16, is up to 0.3 off in a logprob.
HYBRID_FLAGS = ("--disable-radix-cache", "--mamba-ssm-dtype", "float32")
HYBRID_ENV = {"SGLANG_MAMBA_CONV_DTYPE": "float32"}


def hybrid(make: Any, video: str | None = QWEN_VIDEO, reader: Any = HybridReader) -> Family:
    return Family(
        *(make, QWEN_IMAGE, video, reader, QWEN_WORDS),
        flags=HYBRID_FLAGS,
        env=HYBRID_ENV,
        has_tree=False,
    )


FAMILIES = {
    "qwen2.5-vl": Family(make_qwen2_5_vl, QWEN_IMAGE, QWEN_VIDEO, Qwen2_5Reader, QWEN_WORDS),
    "qwen3-vl": Family(make_qwen3_vl, QWEN_IMAGE, QWEN_VIDEO, QwenReader, QWEN_WORDS),
    "qwen3-vl-moe": Family(make_qwen3_vl_moe, QWEN_IMAGE, QWEN_VIDEO, QwenReader, QWEN_WORDS),
    "qwen3.5": hybrid(make_qwen3_5),
    "qwen3.5-moe": hybrid(make_qwen3_5_moe),
    # Of whose videos SGLang 0.5.23 finds no positions (mrope_rope_index.py:78).
    "interns2-preview": hybrid(make_interns2_preview, None, InternS2Reader),
}
