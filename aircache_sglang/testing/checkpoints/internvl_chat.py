# SPDX-License-Identifier: Apache-2.0
"""Tiny InternVL2/2.5/3 in the form of their authors (`InternVLChatModel`, own config and names).

The weights are those of `make_internvl_hf` with the same arguments, renamed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import InternVLConfig, InternVLForConditionalGeneration

from aircache_sglang.testing.checkpoints.checkpoint import Words, fill, write_json
from aircache_sglang.testing.checkpoints.internvl_hf import TOKENS, vision_config

# SGLang cuts pictures into tiles of 448 pixels, whatever the config says
# (multimodal/processors/internvl.py, dynamic_preprocess).
TILE, PATCH = 448, 56

_RENAMED = {
    r"^(model\.)?multi_modal_projector\.layer_norm\.": "mlp1.0.",
    r"^(model\.)?multi_modal_projector\.linear_1\.": "mlp1.1.",
    r"^(model\.)?multi_modal_projector\.linear_2\.": "mlp1.3.",
    r"^model\.language_model\.": "language_model.model.",
    r"^lm_head\.": "language_model.lm_head.",
    r"^(model\.)?vision_tower\.": "vision_model.",
    r"embeddings\.cls_token": "embeddings.class_embedding",
    r"embeddings\.patch_embeddings\.projection\.": "embeddings.patch_embedding.",
    r"embeddings\.position_embeddings": "embeddings.position_embedding",
    r"encoder\.layer\.": "encoder.layers.",
    r"\.attention\.projection_layer\.": ".attn.proj.",
    r"\.layernorm_before\.": ".norm1.",
    r"\.layernorm_after\.": ".norm2.",
    r"\.lambda_": ".ls",
}


def make_internvl_chat(path: str | Path, *, seed: int = 0, **text: Any) -> Path:
    """Write a checkpoint of 16 visual tokens a tile; ``text`` changes the decoder, a Qwen2."""
    folder, words = Path(path), Words(*TOKENS)
    folder.mkdir(parents=True, exist_ok=True)
    text_config = words.text_config(**text)
    config = InternVLConfig(
        text_config=text_config | {"model_type": "qwen2"},
        vision_config=vision_config(TILE, PATCH),
        image_token_id=words.id("<IMG_CONTEXT>"),
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        model = InternVLForConditionalGeneration(config)
    fill(model, words, seed=seed)
    save_file(renamed(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    vision = vision_config(TILE, PATCH)
    write_json(
        folder / "config.json",
        {
            "architectures": ["InternVLChatModel"],
            "downsample_ratio": 0.5,
            "dynamic_image_size": True,
            "force_image_size": TILE,
            "llm_config": text_config
            | {
                "architectures": ["Qwen2ForCausalLM"],
                "model_type": "qwen2",
                "torch_dtype": "float32",
            },
            "max_dynamic_patch": 12,
            "min_dynamic_patch": 1,
            "model_type": "internvl_chat",
            "ps_version": "v2",
            "select_layer": -1,
            "template": "internvl2_5",
            "torch_dtype": "float32",
            "use_thumbnail": True,
            "vision_config": {
                "architectures": ["InternVisionModel"],
                "hidden_act": "gelu",
                "hidden_size": vision["hidden_size"],
                "image_size": TILE,
                "intermediate_size": vision["intermediate_size"],
                "layer_norm_eps": 1e-6,
                "model_type": "intern_vit_6b",
                "norm_type": "layer_norm",
                "num_attention_heads": vision["num_attention_heads"],
                "num_channels": 3,
                "num_hidden_layers": vision["num_hidden_layers"],
                "patch_size": PATCH,
                "qk_normalization": False,
                "qkv_bias": True,
                "torch_dtype": "float32",
                "use_flash_attn": False,
            },
        },
    )
    # The authors' checkpoints name CLIP's; SGLang does not use it.
    write_json(
        folder / "preprocessor_config.json",
        {
            "crop_size": TILE,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
            "resample": 3,
            "size": TILE,
        },
    )
    words.write(folder, image="<image>\n", video="<video>\n", processor_class=None)
    return folder


def renamed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of Transformers' InternVL under the authors' names, queries, keys, values joined."""
    result: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        for pattern, new in _RENAMED.items():
            name = re.sub(pattern, new, name)
        result[name] = weight.contiguous()
    for name in [name for name in result if name.startswith("vision_model") and ".q_proj." in name]:
        parts = [result.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        result[name.replace(".attention.q_proj.", ".attn.qkv.")] = torch.cat(parts)
    return result
