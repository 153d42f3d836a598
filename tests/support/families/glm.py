# SPDX-License-Identifier: Apache-2.0
"""GLM-4.1V, GLM-4.5V and GLM-OCR."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from aircache_sglang.testing.checkpoints import make_glm4v, make_glm4v_moe, make_glm_ocr
from aircache_sglang.testing.checkpoints.glm_v import IMAGE, VIDEO
from tests.support.families.family import Family, Reader, Words, decoder_of

WORDS = Words(
    "<|image|>",
    (
        *("<|begin_of_image|>", "<|end_of_image|>"),
        *("<|begin_of_video|>", "<|end_of_video|>"),
    ),
)


class GlmReader(Reader):
    """SGLang samples the frames itself, by the rules of Transformers' processor, and before it.

    Transformers' model takes every token of a picture for one of a video and the other way, so that
    a prompt can hold one of the two; its processor tells them apart.
    """

    def _load(self, attention: str | dict[str, str]) -> Any:
        model = super()._load(attention)
        kinds: list[torch.Tensor] = []  # int64 [1, S], of the forward that runs

        def keep(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
            kinds[:] = [kwargs["mm_token_type_ids"]]

        def masks(*_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return (kinds[0] == 1)[..., None], (kinds[0] == 2)[..., None]

        model.model.register_forward_pre_hook(keep, with_kwargs=True)
        model.model.get_placeholder_mask = masks
        return model

    def read(self, text: str, images: list[Image.Image], videos: list[np.ndarray]) -> Any:
        from sglang.srt.multimodal.processors.glm4v import (
            glm_processor_video_config,
            glm_sample_and_decode_sync,
        )

        rules = self.processor.video_processor
        config = glm_processor_video_config(rules)
        sampled = [glm_sample_and_decode_sync(decoder_of(video), config, rules) for video in videos]
        fields: dict[str, Any] = {}
        if sampled:
            fields = {
                "videos": [frames for frames, _ in sampled],
                "video_metadata": [metadata for _, metadata in sampled],
                "do_sample_frames": False,
            }
        return self.processor(text=[text], images=images or None, return_tensors="pt", **fields)


FAMILIES = {
    "glm-4v": Family(make_glm4v, IMAGE, VIDEO, GlmReader, WORDS),
    "glm-4v-moe": Family(make_glm4v_moe, IMAGE, VIDEO, GlmReader, WORDS),
    "glm-ocr": Family(make_glm_ocr, IMAGE, VIDEO, GlmReader, WORDS),
}
