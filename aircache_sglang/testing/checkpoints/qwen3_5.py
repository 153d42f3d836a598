# SPDX-License-Identifier: Apache-2.0
"""Tiny Qwen3.5, Qwen3.5-MoE and InternS2-Preview.

Three gated-delta-net layers, then one of full attention.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import (
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
)

from aircache_sglang.testing.checkpoints.checkpoint import (
    Words,
    edit_json,
    save_model,
    write_qwen_processor,
)

PATCH, MERGE = 16, 2
# A quarter of a head of 64 rotates: 8 frequencies for time, height and width.
ROPE = {
    "rope_type": "default",
    "rope_theta": 1e6,
    "partial_rotary_factor": 0.25,
    "mrope_section": [4, 2, 2],
    "mrope_interleaved": True,
}


def make_qwen3_5(path: str | Path, *, seed: int = 0, patch: int = PATCH, **text: Any) -> Path:
    """Write a checkpoint of a visual token for 2 x 2 patches; ``text`` changes the decoder.

    8 layers, of which the fourth and the eighth attend; 2 KV heads.
    """
    return _make(Path(path), Qwen3_5Config, Qwen3_5ForConditionalGeneration, seed, patch, text)


def make_qwen3_5_moe(path: str | Path, *, seed: int = 2, **text: Any) -> Path:
    """The same with 4 experts, 2 of them active, and a shared one in every layer."""
    experts = {
        "moe_intermediate_size": 96,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 96,
    }
    return _make(
        Path(path),
        Qwen3_5MoeConfig,
        Qwen3_5MoeForConditionalGeneration,
        seed,
        PATCH,
        experts | text,
    )


def make_interns2_preview(path: str | Path) -> Path:
    """Write a Qwen3.5-MoE under the name of which SGLang's class is that of Qwen3.5-MoE."""
    folder = make_qwen3_5_moe(path, seed=3)
    edit_json(
        folder / "config.json",
        architectures=["InternS2PreviewForConditionalGeneration"],
        model_type="intern_s2_preview",
    )
    return folder


def _make(
    folder: Path, config_class: Any, model_class: Any, seed: int, patch: int, text: dict[str, Any]
) -> Path:
    words = Words()
    fields: dict[str, Any] = {
        "full_attention_interval": 4,
        "head_dim": 64,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 16,
        "num_hidden_layers": 8,
        "rope_parameters": ROPE,
    }
    text_config = words.text_config(**(fields | text))
    vision_config = {
        "depth": 2,
        "hidden_size": 32,
        "in_channels": 3,
        "intermediate_size": 64,
        "num_heads": 2,
        "num_position_embeddings": 64,
        "out_hidden_size": text_config["hidden_size"],
        "patch_size": patch,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
    }
    config = config_class(
        text_config=text_config,
        vision_config=vision_config,
        tie_word_embeddings=False,
        **words.qwen_tokens(),
    )
    save_model(folder, model_class, config, words, seed=seed)
    # Its norms multiply by 1 + weight, but for the gated one and those of the vision tower.
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name, weight in weights.items():
        if name.endswith("norm.weight") and "visual" not in name and ".linear_attn." not in name:
            weight -= 1.0
    save_file(weights, file, metadata={"format": "pt"})
    # SGLang reads the interval, which Transformers replaces by the layers' types.
    interval = {"full_attention_interval": text_config["full_attention_interval"]}
    edit_json(
        folder / "config.json",
        text_config=config.text_config.to_dict() | interval,
        vision_config=config.vision_config.to_dict() | {"deepstack_visual_indexes": []},
    )
    write_qwen_processor(
        folder, words, "Qwen3VLProcessor", "Qwen2VL", patch, MERGE, videos="Qwen3VL"
    )
    return folder
