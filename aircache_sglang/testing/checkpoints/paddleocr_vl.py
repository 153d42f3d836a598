# SPDX-License-Identifier: Apache-2.0
"""Tiny PaddleOCR-VL: an Ernie 4.5 decoder with M-RoPE, a NaViT of SigLIP's blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PaddleOCRVLConfig, PaddleOCRVLForConditionalGeneration

from aircache_sglang.testing.checkpoints.checkpoint import (
    Words,
    edit_json,
    save_model,
    write_qwen_pixels,
)

PATCH, MERGE = 14, 2
TOKENS = ("<|IMAGE_START|>", "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_END|>")
ROPE = {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [4, 2, 2]}


def make_paddleocr_vl(path: str | Path, *, seed: int = 0, **text: Any) -> Path:
    """Write a checkpoint of h / 28 * w / 28 visual tokens a picture; ``text`` changes the decoder.

    The tower has learned positions for 112 x 112 pixels, which are interpolated.
    """
    folder, words = Path(path), Words(*TOKENS)
    start, token, end = TOKENS
    config = PaddleOCRVLConfig(
        text_config=words.text_config(
            **({"head_dim": 16, "rope_parameters": ROPE, "use_bias": False} | text)
        ),
        vision_config={
            "hidden_size": 32,
            "image_size": 112,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "tokens_per_second": 2,  # SGLang's positions multiply by it
        },
        image_token_id=words.id(token),
        video_token_id=words.id("<|video_pad|>"),
        vision_start_token_id=words.id(start),
        vision_end_token_id=words.id(end),
        tie_word_embeddings=False,
    )
    save_model(folder, PaddleOCRVLForConditionalGeneration, config, words, seed=seed)
    # Published configurations are flat, and SGLang reads them so.
    flat = json.loads((folder / "config.json").read_text())["text_config"]
    flat = {key: value for key, value in flat.items() if key not in ("model_type", "dtype")}
    rope = {"rope_is_neox_style": True, "rope_scaling": ROPE, "rope_theta": ROPE["rope_theta"]}
    edit_json(folder / "config.json", **flat, **rope)
    name, side = "PaddleOCRVLProcessor", PATCH * MERGE
    write_qwen_pixels(folder, name, "PaddleOCRVL", PATCH, MERGE, (4 * side**2, 1280 * side**2))
    edit_json(folder / "preprocessor_config.json", temporal_patch_size=1)
    (folder / "video_preprocessor_config.json").unlink()
    words.write(
        folder,
        image="".join(TOKENS),
        video="",
        processor_class=name,
        extra_special_tokens={"image_token": token},
    )
    return folder
