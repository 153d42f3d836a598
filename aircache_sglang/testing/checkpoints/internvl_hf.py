# SPDX-License-Identifier: Apache-2.0
"""Tiny InternVL in the form of Transformers: tiles of one size, pixel shuffle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import InternVLConfig, InternVLForConditionalGeneration

from aircache_sglang.testing.checkpoints.checkpoint import Words, save_model, write_json

TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
PIXELS = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "processor_class": "InternVLProcessor",
    "rescale_factor": 1 / 255,
    "resample": 3,
}


def make_internvl_hf(
    path: str | Path, *, tile: int = 224, patch: int = 14, seed: int = 0, **text: Any
) -> Path:
    """Write a checkpoint of (tile / patch / 2)**2 visual tokens a tile; ``text`` changes the Qwen2.

    A picture is cut into at most 4 tiles of its aspect ratio; more than one get a thumbnail.
    """
    folder, words = Path(path), Words(*TOKENS)
    config = InternVLConfig(
        text_config=words.text_config(model_type="qwen2", **text),
        vision_config=vision_config(tile, patch),
        image_token_id=words.id("<IMG_CONTEXT>"),
        image_seq_length=(tile // patch // 2) ** 2,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    save_model(folder, InternVLForConditionalGeneration, config, words, seed=seed)
    size = {"height": tile, "width": tile}
    write_json(
        folder / "preprocessor_config.json",
        PIXELS
        | {
            "crop_to_patches": True,
            "image_processor_type": "GotOcr2ImageProcessor",
            "max_patches": 4,
            "min_patches": 1,
            "size": size,
        },
    )
    write_json(
        folder / "video_preprocessor_config.json",
        PIXELS | {"size": size, "video_processor_type": "InternVLVideoProcessor"},
    )
    write_json(
        folder / "processor_config.json",
        {"image_seq_length": config.image_seq_length, "processor_class": "InternVLProcessor"},
    )
    words.write(
        folder,
        image="<IMG_CONTEXT>\n",
        video="<video>\n",
        processor_class="InternVLProcessor",
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    return folder


def vision_config(tile: int, patch: int) -> dict[str, Any]:
    """An InternViT of 2 blocks."""
    return {
        "attention_bias": True,
        "hidden_size": 32,
        "image_size": [tile, tile],
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "patch_size": [patch, patch],
        "use_absolute_position_embeddings": True,
        "use_qk_norm": False,
    }
