# SPDX-License-Identifier: Apache-2.0
"""Tiny Qwen2.5-VL: windowed vision attention, M-RoPE with absolute time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from aircache_sglang.testing.checkpoints.checkpoint import (
    Words,
    edit_json,
    save_model,
    write_qwen_processor,
)

PATCH, MERGE = 14, 2


def make_qwen2_5_vl(path: str | Path, *, seed: int = 0, **text: Any) -> Path:
    """Write a checkpoint of h / 28 * w / 28 visual tokens a picture; ``text`` changes the decoder.

    The vision tower has a windowed and a full-attention block.
    """
    folder, words = Path(path), Words()
    text_config = words.text_config(
        rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]}, use_sliding_window=False, **text
    )
    vision_config = {
        "depth": 2,
        "fullatt_block_indexes": [1],
        "hidden_size": 32,
        "in_channels": 3,
        "in_chans": 3,  # SGLang reads this name, Transformers the other
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": text_config["hidden_size"],
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
    }
    config = Qwen2_5_VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        tie_word_embeddings=False,
        **words.qwen_tokens(),
    )
    save_model(folder, Qwen2_5_VLForConditionalGeneration, config, words, seed=seed)
    edit_json(folder / "config.json", vision_config=config.vision_config.to_dict() | vision_config)
    write_qwen_processor(folder, words, "Qwen2_5_VLProcessor", "Qwen2VL", PATCH, MERGE)
    return folder
