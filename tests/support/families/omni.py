# SPDX-License-Identifier: Apache-2.0
"""Qwen3-Omni's thinker: pictures and videos are visual, sounds are not."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen3OmniMoeForConditionalGeneration

from aircache_sglang.testing.checkpoints import make_qwen3_omni
from aircache_sglang.testing.prompts import Prompt
from tests.support.families.family import Family, frames_of, samples_of
from tests.support.families.qwen import QWEN_IMAGE, QWEN_VIDEO, QWEN_WORDS, QwenReader


class Thinker(torch.nn.Module):
    """With the logits that are asked for, and the mask without which positions would be plain."""

    def __init__(self, thinker: Any) -> None:
        super().__init__()
        self.thinker, self.config = thinker, thinker.config

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int, **inputs: Any) -> Any:
        mask = torch.ones_like(input_ids)
        output = self.thinker(input_ids=input_ids, attention_mask=mask, **inputs)
        output.logits = output.logits[:, -logits_to_keep:]
        return output


class OmniReader(QwenReader):
    def _load(self, attention: str | dict[str, str]) -> Any:
        model = Qwen3OmniMoeForConditionalGeneration.from_pretrained(
            self.checkpoint, dtype=torch.float32
        )
        model.thinker.set_attn_implementation(attention)
        return Thinker(model.thinker).eval()

    def inputs(self, prompt: Prompt) -> Any:
        sounds = [samples_of(path) for path in prompt.audios]
        videos = [frames_of(path) for path in prompt.videos]
        return self.typed(self.read(prompt.text, list(prompt.images), videos, audio=sounds or None))


FAMILIES = {
    "qwen3-omni": Family(
        *(make_qwen3_omni, QWEN_IMAGE, QWEN_VIDEO, OmniReader, QWEN_WORDS),
        sound="<|audio_start|><|audio_pad|><|audio_end|>",
    )
}
