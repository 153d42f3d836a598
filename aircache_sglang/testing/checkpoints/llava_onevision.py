# SPDX-License-Identifier: Apache-2.0
"""Tiny LLaVA-OneVision in the form of Transformers: AnyRes tiles, row separators, pooled frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from aircache_sglang.testing.checkpoints.checkpoint import Words, save_model, write_json

PIXELS = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "LlavaOnevisionProcessor",
    "rescale_factor": 1 / 255,
    "resample": 3,
}


def make_llava_onevision(
    path: str | Path, *, tile: int = 112, patch: int = 14, seed: int = 0, **text: Any
) -> Path:
    """Write a checkpoint with a SigLIP tower of tile x tile pixels; ``text`` changes the Qwen2.

    A picture becomes (tile / patch)**2 tokens, then those of its tiles (1 to 2 a side) with a
    separator after each row.
    """
    folder, words = Path(path), Words("<image>", "<video>")
    pinpoints = [[tile * rows, tile * columns] for rows in (1, 2) for columns in (1, 2)]
    config = LlavaOnevisionConfig(
        text_config=words.text_config(model_type="qwen2", **text),
        vision_config=siglip_config(tile, patch),
        image_token_index=words.id("<image>"),
        video_token_index=words.id("<video>"),
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=False,
        vision_aspect_ratio="anyres_max_9",
    )
    save_model(folder, LlavaOnevisionForConditionalGeneration, config, words, seed=seed)
    size = {"height": tile, "width": tile}
    write_json(
        folder / "preprocessor_config.json",
        PIXELS
        | {
            "image_grid_pinpoints": pinpoints,
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": size,
        },
    )
    write_json(
        folder / "video_preprocessor_config.json",
        PIXELS | {"size": size, "video_processor_type": "LlavaOnevisionVideoProcessor"},
    )
    write_json(
        folder / "processor_config.json",
        {
            "image_token": "<image>",
            "num_image_tokens": (tile // patch) ** 2,
            "processor_class": "LlavaOnevisionProcessor",
            "video_token": "<video>",
            "vision_aspect_ratio": "anyres_max_9",
            "vision_feature_select_strategy": "full",
        },
    )
    words.write(
        folder,
        image="<image>\n",
        video="<video>\n",
        processor_class="LlavaOnevisionProcessor",
        image_token="<image>",
        video_token="<video>",
    )
    return folder


def siglip_config(tile: int, patch: int) -> dict[str, Any]:
    """A SigLIP of 2 blocks without its pooling head."""
    return {
        "hidden_size": 32,
        "image_size": tile,
        "intermediate_size": 64,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "patch_size": patch,
        "vision_use_head": False,
    }
