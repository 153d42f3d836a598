# SPDX-License-Identifier: Apache-2.0
"""Tiny LLaVA-NeXT-Video in the form of Transformers: CLIP, AnyRes pictures, pooled frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

from aircache_sglang.testing.checkpoints.checkpoint import Words, save_model, write_json
from aircache_sglang.testing.checkpoints.llava_onevision import PIXELS

PROCESSOR = {"processor_class": "LlavaNextVideoProcessor"}


def make_llava_next_video(
    path: str | Path, *, tile: int = 112, patch: int = 14, seed: int = 0, **text: Any
) -> Path:
    """Write a checkpoint with a CLIP tower of tile x tile pixels; ``text`` changes the Llama.

    A picture becomes (tile / patch)**2 tokens, then those of its tiles (1 to 2 a side) with a
    separator after each row; a frame becomes (tile / patch / 2)**2 tokens.
    """
    folder, words = Path(path), Words("<image>", "<video>")
    pinpoints = [[tile * rows, tile * columns] for rows in (1, 2) for columns in (1, 2)]
    tokens = (tile // patch) ** 2
    config = LlavaNextVideoConfig(
        text_config=words.text_config(model_type="llama", **text),
        vision_config=clip_config(tile, patch),
        image_token_index=words.id("<image>"),
        video_token_index=words.id("<video>"),
        image_grid_pinpoints=pinpoints,
        image_seq_length=tokens,
        video_seq_length=tokens // 4,
        tie_word_embeddings=False,
    )
    save_model(folder, LlavaNextVideoForConditionalGeneration, config, words, seed=seed)
    size = {"size": {"shortest_edge": tile}, "crop_size": {"height": tile, "width": tile}}
    write_json(
        folder / "preprocessor_config.json",
        PIXELS
        | PROCESSOR
        | size
        | {
            "do_center_crop": True,
            "image_grid_pinpoints": pinpoints,
            "image_processor_type": "LlavaNextImageProcessor",
        },
    )
    write_json(
        folder / "video_preprocessor_config.json",
        PIXELS
        | PROCESSOR
        | size
        | {"do_center_crop": True, "video_processor_type": "LlavaNextVideoVideoProcessor"},
    )
    write_json(
        folder / "processor_config.json",
        PROCESSOR
        | {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": patch,
            "video_token": "<video>",
            "vision_feature_select_strategy": "default",
        },
    )
    words.write(
        folder,
        image="<image>\n",
        video="<video>\n",
        processor_class="LlavaNextVideoProcessor",
        image_token="<image>",
        video_token="<video>",
    )
    return folder


def clip_config(tile: int, patch: int) -> dict[str, Any]:
    """A CLIP of 3 blocks: the features are those of the last but one."""
    return {
        "hidden_size": 32,
        "image_size": tile,
        "intermediate_size": 64,
        "model_type": "clip_vision_model",
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "patch_size": patch,
        "projection_dim": 32,
    }
