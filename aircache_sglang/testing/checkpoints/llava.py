# SPDX-License-Identifier: Apache-2.0
"""Tiny LLaVA-1.5 and LLaVA-NeXT in the form of Transformers: CLIP and a Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from aircache_sglang.testing.checkpoints.checkpoint import Words, save_model, write_json
from aircache_sglang.testing.checkpoints.llava_next_video import clip_config
from aircache_sglang.testing.checkpoints.llava_onevision import PIXELS


def make_llava(
    path: str | Path, *, tile: int = 140, patch: int = 14, seed: int = 0, **text: Any
) -> Path:
    """Write a LLaVA-1.5: a picture of any size becomes (tile / patch)**2 tokens.

    ``text`` changes the Llama.
    """
    folder, words = Path(path), Words("<image>")
    config = LlavaConfig(
        text_config=words.text_config(model_type="llama", **text),
        vision_config=clip_config(tile, patch),
        image_token_index=words.id("<image>"),
        image_seq_length=(tile // patch) ** 2,
        tie_word_embeddings=False,
    )
    save_model(folder, LlavaForConditionalGeneration, config, words, seed=seed)
    pixels = {"image_processor_type": "CLIPImageProcessor"}
    return _write_processor(folder, words, "LlavaProcessor", tile, patch, pixels)


def make_llava_next(
    path: str | Path, *, tile: int = 112, patch: int = 14, seed: int = 0, **text: Any
) -> Path:
    """Write a LLaVA-NeXT: an overview, then 1 to 2 tiles a side with a separator after each row.

    ``text`` changes the Llama.
    """
    folder, words = Path(path), Words("<image>")
    pinpoints = [[tile * rows, tile * columns] for rows in (1, 2) for columns in (1, 2)]
    config = LlavaNextConfig(
        text_config=words.text_config(model_type="llama", **text),
        vision_config=clip_config(tile, patch),
        image_token_index=words.id("<image>"),
        image_grid_pinpoints=pinpoints,
        image_seq_length=(tile // patch) ** 2,
        tie_word_embeddings=False,
    )
    save_model(folder, LlavaNextForConditionalGeneration, config, words, seed=seed)
    pixels = {
        "image_grid_pinpoints": pinpoints,
        "image_processor_type": "LlavaNextImageProcessor",
    }
    return _write_processor(folder, words, "LlavaNextProcessor", tile, patch, pixels)


def _write_processor(
    folder: Path, words: Words, processor: str, tile: int, patch: int, pixels: dict[str, Any]
) -> Path:
    write_json(
        folder / "preprocessor_config.json",
        PIXELS
        | {
            "crop_size": {"height": tile, "width": tile},
            "do_center_crop": True,
            "processor_class": processor,
            "size": {"shortest_edge": tile},
        }
        | pixels,
    )
    write_json(
        folder / "processor_config.json",
        {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": patch,
            "processor_class": processor,
            "vision_feature_select_strategy": "default",
        },
    )
    words.write(
        folder, image="<image>\n", video="", processor_class=processor, image_token="<image>"
    )
    return folder
