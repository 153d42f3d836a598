# SPDX-License-Identifier: Apache-2.0
"""Tiny GLM-4.1V, GLM-4.5V and GLM-OCR: M-RoPE in sections, a span for each two frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    GlmOcrConfig,
    GlmOcrForConditionalGeneration,
)

from aircache_sglang.testing.checkpoints.checkpoint import (
    Words,
    edit_json,
    save_model,
    write_qwen_pixels,
)

PATCH, MERGE = 14, 2
PIXELS = (4 * (PATCH * MERGE) ** 2, 1280 * (PATCH * MERGE) ** 2)  # of two frames, or a picture
IMAGE = "<|begin_of_image|><|image|><|end_of_image|>"
VIDEO = "<|begin_of_video|><|video|><|end_of_video|>"
TOKENS = (
    *("<|image|>", "<|begin_of_image|>", "<|end_of_image|>"),
    *("<|video|>", "<|begin_of_video|>", "<|end_of_video|>"),
)


def make_glm4v(path: str | Path, *, seed: int = 0, **text: Any) -> Path:
    """Write a checkpoint of h / 28 * w / 28 visual tokens a picture; ``text`` changes the decoder.

    Half of each head rotates. A video's frames have whole seconds between them.
    """
    fields = {"rope_parameters": _rope(0.5, 2, 1, 1)} | text
    return _make(Path(path), Glm4vConfig, Glm4vForConditionalGeneration, "Glm4v", seed, fields)


def make_glm4v_moe(path: str | Path, *, seed: int = 0, **text: Any) -> Path:
    """The same with 4 experts, 2 of them active, and a shared one, in all layers but the first."""
    fields = {
        "attention_bias": True,
        "first_k_dense_replace": 1,
        "head_dim": 16,
        "moe_intermediate_size": 96,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 2,
        "rope_parameters": _rope(0.5, 2, 1, 1),
    } | text
    return _make(
        Path(path), Glm4vMoeConfig, Glm4vMoeForConditionalGeneration, "Glm4v", seed, fields
    )


def make_glm_ocr(path: str | Path, *, seed: int = 0, **text: Any) -> Path:
    """GLM-OCR: the whole head rotates, query and key norms in the vision tower.

    Its processor, that of GLM-4.6V, writes `1.0 seconds` between frames.
    """
    fields = {"head_dim": 16, "rope_parameters": _rope(1.0, 4, 2, 2)} | text
    return _make(Path(path), GlmOcrConfig, GlmOcrForConditionalGeneration, "Glm46V", seed, fields)


def _rope(share: float, *section: int) -> dict[str, Any]:
    return {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": share,
        "mrope_section": list(section),
    }


def _make(
    folder: Path, config_class: Any, model_class: Any, kind: str, seed: int, text: dict[str, Any]
) -> Path:
    words = Words(*TOKENS)
    text_config = words.text_config(**text)
    vision_config = {
        "depth": 2,
        "hidden_size": 32,
        "image_size": 112,
        "in_channels": 3,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": text_config["hidden_size"],
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
    }
    config = config_class(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=words.id("<|image|>"),
        video_token_id=words.id("<|video|>"),
        image_start_token_id=words.id("<|begin_of_image|>"),
        image_end_token_id=words.id("<|end_of_image|>"),
        video_start_token_id=words.id("<|begin_of_video|>"),
        video_end_token_id=words.id("<|end_of_video|>"),
        tie_word_embeddings=False,
    )
    save_model(folder, model_class, config, words, seed=seed)
    # SGLang reads the older name of Transformers' rope_parameters.
    saved = config.text_config.to_dict()
    saved |= {"rope_scaling": saved["rope_parameters"]}
    # Of GLM-OCR's merger: Transformers makes it of two other numbers, SGLang takes the width of the
    # tower's feed-forward layers where it is missing.
    width = {"projection_intermediate_size": 3 * text_config["hidden_size"]}
    vision = config.vision_config.to_dict() | width
    edit_json(folder / "config.json", text_config=saved, vision_config=vision)
    processor = f"{kind}Processor"
    write_qwen_pixels(folder, processor, kind, PATCH, MERGE, PIXELS)
    words.write(folder, image=IMAGE, video=VIDEO, processor_class=processor)
    return folder
