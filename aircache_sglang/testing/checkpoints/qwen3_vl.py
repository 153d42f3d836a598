# SPDX-License-Identifier: Apache-2.0
"""Tiny Qwen3-VL and Qwen3-VL-MoE: deepstack, interleaved M-RoPE, timestamps between frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from aircache_sglang.testing.checkpoints.checkpoint import (
    Words,
    edit_json,
    save_model,
    write_qwen_processor,
)

PATCH, MERGE = 16, 2
# A head of 16 has 8 rotary frequencies to share between time, height and width.
ROPE = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
EXPERTS = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 96,
    "norm_topk_prob": True,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


def make_qwen3_vl(path: str | Path, *, seed: int = 0, **text: Any) -> Path:
    """Write a checkpoint of h / 32 * w / 32 visual tokens a picture; ``text`` changes the decoder.

    The features of three vision blocks are also added to the decoder's first layers (deepstack);
    SGLang's MoE variant counts on three (models/qwen3_vl_moe.py:63).
    """
    return _make(Path(path), Qwen3VLConfig, Qwen3VLForConditionalGeneration, seed, text)


def make_qwen3_vl_moe(path: str | Path, *, seed: int = 0, **text: Any) -> Path:
    """The same with 4 experts, 2 of them active, in every decoder layer."""
    folder = _make(
        Path(path), Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration, seed, EXPERTS | text
    )
    # Published checkpoints hold the experts' matrices transposed, and SGLang reads them so.
    file = folder / "model.safetensors"
    weights = {
        name: weight.transpose(1, 2).contiguous() if ".experts." in name else weight
        for name, weight in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def _make(
    folder: Path, config_class: Any, model_class: Any, seed: int, text: dict[str, Any]
) -> Path:
    words = Words()
    text_config = words.text_config(head_dim=16, rope_scaling=ROPE, **text)
    config = config_class(
        text_config=text_config,
        vision_config=vision_config(text_config["hidden_size"]),
        tie_word_embeddings=False,
        **words.qwen_tokens(),
    )
    save_model(folder, model_class, config, words, seed=seed)
    # SGLang reads the older name of Transformers' rope_parameters.
    saved = config.text_config.to_dict()
    edit_json(folder / "config.json", text_config=saved | {"rope_scaling": ROPE, "rope_theta": 1e6})
    write_qwen_processor(
        folder, words, "Qwen3VLProcessor", "Qwen2VL", PATCH, MERGE, videos="Qwen3VL"
    )
    return folder


def vision_config(outputs: int) -> dict[str, Any]:
    """A tower of 3 blocks, all of which the decoder gets, for a decoder of that width."""
    return {
        "deepstack_visual_indexes": [0, 1, 2],
        "depth": 3,
        "hidden_size": 32,
        "in_channels": 3,
        "intermediate_size": 64,
        "num_heads": 2,
        "num_position_embeddings": 64,
        "out_hidden_size": outputs,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
    }
