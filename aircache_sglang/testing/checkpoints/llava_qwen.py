# SPDX-License-Identifier: Apache-2.0
"""Tiny LLaVA-OneVision / LLaVA-NeXT in the form of their authors (`LlavaQwenForCausalLM`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from aircache_sglang.testing.checkpoints.checkpoint import Words, edit_json, fill, write_json
from aircache_sglang.testing.checkpoints.llava_onevision import PIXELS, siglip_config

# The order matters: the projector's new name would match no other.
_RENAMED = (
    ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("model.vision_tower.", "model.vision_tower.vision_tower."),
    ("model.language_model.", "model."),
)


def make_llava_qwen(
    path: str | Path, *, tile: int = 112, patch: int = 14, seed: int = 0, **text: Any
) -> Path:
    """Write a checkpoint in float16, which is all that SGLang serves of this family.

    A picture alone becomes (tile / patch)**2 tokens, then those of its tiles (1 to 2 a side) with a
    separator after each row; several pictures become (tile / patch)**2 tokens each. The vision
    tower is a checkpoint of its own in the folder, whose name tells SGLang its kind.
    """
    folder, words = Path(path), Words("<image>")
    tower = folder / "siglip"
    tower.mkdir(parents=True, exist_ok=True)
    text_config = words.text_config(**text)
    pinpoints = [[tile * rows, tile * columns] for rows in (1, 2) for columns in (1, 2)]
    vision = siglip_config(tile, patch)
    config = LlavaOnevisionConfig(
        text_config=text_config | {"model_type": "qwen2"},
        vision_config=vision,
        image_token_index=words.id("<image>"),
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        model = LlavaOnevisionForConditionalGeneration(config)
    fill(model, words, seed=seed)
    model.half()
    model.model.vision_tower.save_pretrained(tower)
    edit_json(tower / "config.json", **vision)
    size = {"height": tile, "width": tile}
    processor = PIXELS | {
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "LlavaProcessor",
        "size": size,
    }
    write_json(tower / "preprocessor_config.json", processor)
    write_json(folder / "preprocessor_config.json", processor)
    weights = {}
    for name, weight in model.state_dict().items():
        for old, new in _RENAMED:
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        weights[name] = weight.contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(
        folder / "config.json",
        text_config
        | {
            "architectures": ["LlavaQwenForCausalLM"],
            "image_aspect_ratio": "anyres_max_9",
            "image_grid_pinpoints": pinpoints,
            "image_token_index": words.id("<image>"),
            "mm_hidden_size": vision["hidden_size"],
            "mm_patch_merge_type": "spatial_unpad",
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -1,
            "mm_vision_tower": str(tower),
            "model_type": "llava",
            "projector_hidden_act": "gelu",
            "text_config": text_config | {"model_type": "qwen2"},
            "torch_dtype": "float16",
            "vision_config": vision,
        },
    )
    words.write(folder, image="<image>\n", video="", processor_class="LlavaProcessor")
    return folder
