# SPDX-License-Identifier: Apache-2.0
"""Tiny models around a Pixtral tower: a picture is rows of patches at native resolution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    LightOnOcrConfig,
    LightOnOcrForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
)

from aircache_sglang.testing.checkpoints.checkpoint import (
    Words,
    edit_json,
    save_model,
    write_json,
)
from aircache_sglang.testing.checkpoints.qwen2_vl import IMAGE_MEAN, IMAGE_STD

PATCH = 14
LARGEST = 560  # pixels a side
MISTRAL = {"model_type": "mistral", "head_dim": 16, "sliding_window": None}
TOKENS = {
    "image_token": "[IMG]",
    "image_break_token": "[IMG_BREAK]",
    "image_end_token": "[IMG_END]",
}


def make_mistral3(path: str | Path, *, seed: int = 0, **text: Any) -> Path:
    """Write a Mistral Small 3.1 of 28 x 28 pixels a token; ``text`` changes the decoder.

    ``[IMG_BREAK]`` stands after each row of a picture, ``[IMG_END]`` after the last.
    """
    folder, words = Path(path), _words()
    config = Mistral3Config(
        text_config=words.text_config(**MISTRAL | text),
        vision_config=_vision_config(PATCH),
        image_token_index=words.id("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    save_model(folder, Mistral3ForConditionalGeneration, config, words, seed=seed)
    # SGLang takes the class token away, which Pixtral has not, unless it is told otherwise.
    edit_json(folder / "config.json", vision_feature_select_strategy="full")
    return _write_processor(folder, words, "PixtralProcessor", PATCH, merge=2)


def make_pixtral(path: str | Path, *, seed: int = 0, **text: Any) -> Path:
    """Write a Pixtral 12B in Transformers' form, a `LlavaForConditionalGeneration`; as above."""
    folder, words = Path(path), _words()
    config = LlavaConfig(
        text_config=words.text_config(**MISTRAL | text),
        vision_config=_vision_config(2 * PATCH),
        image_token_index=words.id("[IMG]"),
        image_seq_length=1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    save_model(folder, LlavaForConditionalGeneration, config, words, seed=seed)
    return _write_processor(folder, words, "PixtralProcessor", 2 * PATCH, merge=1)


def make_lighton_ocr(path: str | Path, *, seed: int = 0, **text: Any) -> Path:
    """Write a LightOnOCR: 28 x 28 pixels a token of a Qwen3, nothing between the rows."""
    folder, words = Path(path), _words()
    config = LightOnOcrConfig(
        text_config=words.text_config(**{"model_type": "qwen3", "head_dim": 16} | text),
        vision_config=_vision_config(PATCH),
        image_token_id=words.id("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    save_model(folder, LightOnOcrForConditionalGeneration, config, words, seed=seed)
    # The name under which it is published, which SGLang knows, and a projector without biases.
    edit_json(
        folder / "config.json",
        architectures=["LightOnOCRForConditionalGeneration"],
        multimodal_projector_bias=False,
    )
    return _write_processor(folder, words, "LightOnOcrProcessor", PATCH, merge=2)


def _words() -> Words:
    return Words(*TOKENS.values(), "<pad>")


def _vision_config(patch: int) -> dict[str, Any]:
    return {
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 32,
        "image_size": LARGEST,
        "intermediate_size": 64,
        "model_type": "pixtral",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "patch_size": patch,
        "rope_theta": 10_000.0,
    }


def _write_processor(folder: Path, words: Words, processor: str, patch: int, *, merge: int) -> Path:
    write_json(
        folder / "preprocessor_config.json",
        {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(IMAGE_MEAN),
            "image_processor_type": "PixtralImageProcessor",
            "image_std": list(IMAGE_STD),
            "patch_size": {"height": patch, "width": patch},
            "processor_class": processor,
            "rescale_factor": 1 / 255,
            "resample": 3,
            "size": {"longest_edge": LARGEST},
        },
    )
    write_json(
        folder / "processor_config.json",
        TOKENS | {"patch_size": patch, "processor_class": processor, "spatial_merge_size": merge},
    )
    words.write(
        folder,
        image="[IMG]",
        video="",
        processor_class=processor,
        # SGLang gives the tokenizer this one, which must not be new to it.
        pad_token="<pad>",
        extra_special_tokens=TOKENS,
    )
    return folder
