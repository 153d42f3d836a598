# SPDX-License-Identifier: Apache-2.0
"""Tiny Qwen3-Omni: the thinker alone, which reads pictures and videos as Qwen3-VL-MoE does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeForConditionalGeneration

from aircache_sglang.testing.checkpoints.checkpoint import (
    QWEN_IMAGE,
    QWEN_VIDEO,
    Words,
    edit_json,
    save_model,
    write_qwen_processor,
)
from aircache_sglang.testing.checkpoints.qwen3_vl import (
    EXPERTS,
    MERGE,
    PATCH,
    ROPE,
    vision_config,
)

AUDIO = ("<|audio_start|>", "<|audio_pad|>", "<|audio_end|>")


def make_qwen3_omni(path: str | Path, *, seed: int = 0, **text: Any) -> Path:
    """Write a checkpoint of h / 32 * w / 32 visual tokens a picture, 13 tokens a second of sound.

    ``text`` changes the decoder, of 4 experts a layer, 2 of them active.
    """
    folder, words = Path(path), Words(*AUDIO)
    start, token, end = AUDIO
    rope = ROPE | {"rope_theta": 1e6}
    text_config = words.text_config(**({"head_dim": 16, "rope_parameters": rope} | EXPERTS | text))
    thinker = {
        "audio_config": {
            "d_model": 32,
            "downsample_hidden_size": 8,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "encoder_layers": 1,
            "num_mel_bins": 128,
            "output_dim": text_config["hidden_size"],
        },
        "audio_end_token_id": words.id(end),
        "audio_start_token_id": words.id(start),
        "audio_token_id": words.id(token),
        "text_config": text_config,
        "tie_word_embeddings": False,
        "vision_config": vision_config(text_config["hidden_size"]),
        **words.qwen_tokens(),
    }
    config = Qwen3OmniMoeConfig(thinker_config=thinker, enable_audio_output=False)
    save_model(folder, _Model, config, words, seed=seed)
    edit_json(
        folder / "config.json",
        architectures=["Qwen3OmniMoeForConditionalGeneration"],
        enable_audio_output=False,
    )
    file = folder / "model.safetensors"
    weights = dict(pair for weight in load_file(file).items() for pair in _one_by_one(*weight))
    save_file(weights, file, metadata={"format": "pt"})
    name = "Qwen3OmniMoeProcessor"
    write_qwen_processor(folder, words, name, "Qwen2VL", PATCH, MERGE)
    # Pictures and sounds share one file.
    edit_json(
        folder / "preprocessor_config.json",
        feature_extractor_type="WhisperFeatureExtractor",
        feature_size=128,
        hop_length=160,
        n_fft=400,
        sampling_rate=16_000,
    )
    words.write(
        folder,
        image=QWEN_IMAGE,
        video=QWEN_VIDEO,
        processor_class=name,
        extra_special_tokens={
            "audio_bos_token": start,
            "audio_eos_token": end,
            "audio_token": token,
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
        },
    )
    edit_json(folder / "generation_config.json", eos_token_id=words.id("<|im_end|>"))
    return folder


def _one_by_one(name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The experts of a layer as published checkpoints hold them; any other weight is itself."""
    prefix, _, last = name.rpartition(".")
    if prefix.endswith(".experts"):
        parts = last.removesuffix("_proj").split("_")  # gate and up, or down
        for index, expert in enumerate(weight):
            for part, matrix in zip(parts, expert.chunk(len(parts)), strict=True):
                yield f"{prefix}.{index}.{part}_proj.weight", matrix.contiguous()
    else:
        yield name, weight


class _Model(Qwen3OmniMoeForConditionalGeneration):
    def get_output_embeddings(self) -> Any:
        return self.thinker.lm_head
