# SPDX-License-Identifier: Apache-2.0
"""Tiny dots.ocr: a Qwen2 decoder and a vision tower that SGLang runs in bfloat16 only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from aircache_sglang.testing.checkpoints.checkpoint import (
    Words,
    edit_json,
    save_weights,
    write_json,
    write_qwen_processor,
)

PATCH, MERGE, WIDTH, DEPTH = 14, 2, 64, 2
TOKENS = ("<|img|>", "<|imgpad|>", "<|endofimg|>")


def make_dots_ocr(path: str | Path, *, seed: int = 0, **text: Any) -> Path:
    """Write a checkpoint of h / 28 * w / 28 visual tokens a picture; ``text`` changes the decoder.

    Transformers has no class of it.
    """
    folder, words = Path(path), Words(*TOKENS)
    token, name = TOKENS[1], "DotsVLProcessor"
    config = Qwen2Config(**words.text_config(**text))
    save_weights(folder, _Model, config, words, seed=seed)
    write_json(
        folder / "config.json",
        config.to_dict()
        | {
            "architectures": ["DotsOCRForCausalLM"],
            "image_token_id": words.id(token),
            "model_type": "dots_ocr",
            "video_token_id": words.id("<|video_pad|>"),
            "vision_config": {
                "embed_dim": WIDTH,
                "hidden_size": config.hidden_size,
                "intermediate_size": 2 * WIDTH,
                "num_attention_heads": 2,
                "num_hidden_layers": DEPTH,
                "patch_size": PATCH,
                "spatial_merge_size": MERGE,
            },
        },
    )
    write_qwen_processor(folder, words, name, "Qwen2VL", PATCH, MERGE)
    edit_json(folder / "preprocessor_config.json", temporal_patch_size=1)
    words.write(folder, image="".join(TOKENS), video="", processor_class=name, image_token=token)
    return folder


def _linear(inputs: int, outputs: int) -> torch.nn.Linear:
    return torch.nn.Linear(inputs, outputs, bias=False)


class _Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = torch.nn.RMSNorm(WIDTH), torch.nn.RMSNorm(WIDTH)
        qkv, proj = _linear(WIDTH, 3 * WIDTH), _linear(WIDTH, WIDTH)
        self.attn = torch.nn.ModuleDict({"qkv": qkv, "proj": proj})
        gate, up = _linear(WIDTH, 2 * WIDTH), _linear(WIDTH, 2 * WIDTH)
        down = _linear(2 * WIDTH, WIDTH)
        self.mlp = torch.nn.ModuleDict({"fc1": gate, "fc2": down, "fc3": up})


class _Vision(torch.nn.Module):
    """Names and shapes of the authors' tower."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        proj, norm = torch.nn.Conv2d(3, WIDTH, PATCH, PATCH), torch.nn.RMSNorm(WIDTH)
        patchifier = torch.nn.ModuleDict({"proj": proj, "norm": norm})
        self.patch_embed = torch.nn.ModuleDict({"patchifier": patchifier})
        self.blocks = torch.nn.ModuleList(_Block() for _ in range(DEPTH))
        self.post_trunk_norm = torch.nn.RMSNorm(WIDTH)
        merged = WIDTH * MERGE**2
        mlp = torch.nn.Sequential(
            torch.nn.Linear(merged, merged), torch.nn.GELU(), torch.nn.Linear(merged, outputs)
        )
        self.merger = torch.nn.ModuleDict({"ln_q": torch.nn.LayerNorm(WIDTH), "mlp": mlp})


class _Model(Qwen2ForCausalLM):
    def __init__(self, config: Qwen2Config) -> None:
        super().__init__(config)
        self.vision_tower = _Vision(config.hidden_size)
