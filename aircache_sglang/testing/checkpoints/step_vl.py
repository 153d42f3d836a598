# SPDX-License-Identifier: Apache-2.0
"""Tiny Step3-VL-10B: a Qwen3 decoder and a perception encoder, an overview and square patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from aircache_sglang.testing.checkpoints.checkpoint import Words, save_weights, write_json

# SGLang's processor makes no other sizes: an overview of 728 pixels, patches of 504
# (multimodal/processors/step3_vl.py).
SIDE, PATCH, WIDTH, DEPTH = 728, 14, 32, 1
TOKENS = (
    "<im_patch>",
    "<im_start>",
    "<im_end>",
    "<patch_start>",
    "<patch_end>",
    "<patch_newline>",
)


def make_step_vl(path: str | Path, *, seed: int = 0, **text: Any) -> Path:
    """Write a checkpoint of 169 visual tokens a picture, after 81 for each of its patches.

    A picture has patches if it is larger than 728 pixels or longer than 3:2. ``text`` changes the
    decoder. Transformers has no class of it.
    """
    folder, words = Path(path), Words(*TOKENS)
    config = Qwen3Config(**words.text_config(**({"head_dim": 16} | text)))
    save_weights(folder, _Model, config, words, seed=seed)
    text_config = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    write_json(
        folder / "config.json",
        {
            "architectures": ["StepVLForConditionalGeneration"],
            "image_token_id": words.id(TOKENS[0]),
            "model_type": "step3_vl",
            "projector_bias": True,
            "text_config": text_config | {"num_attention_groups": config.num_key_value_heads},
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "vision_config": {
                "heads": 2,
                "hidden_act": "quick_gelu",
                "image_size": SIDE,
                "layers": DEPTH,
                "ls_init_value": 0.1,
                "mlp_ratio": 2,
                "output_dim": None,
                "patch_size": PATCH,
                "use_abs_posemb": True,
                "use_cls_token": False,
                "use_ln_post": False,
                "use_ln_pre": True,
                "use_rope2d": True,
                "width": WIDTH,
            },
        },
    )
    words.write(folder, image=TOKENS[0], video="", processor_class="")
    return folder


class _Scale(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = torch.nn.Parameter(torch.empty(WIDTH))


class _Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(WIDTH, 2)
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
        self.ls_1, self.ls_2 = _Scale(), _Scale()
        up, down = torch.nn.Linear(WIDTH, 2 * WIDTH), torch.nn.Linear(2 * WIDTH, WIDTH)
        self.mlp = torch.nn.ModuleDict({"c_fc": up, "c_proj": down})


class _Vision(torch.nn.Module):
    """Names and shapes of the authors' tower."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.ln_pre = torch.nn.LayerNorm(WIDTH)
        self.positional_embedding = torch.nn.Parameter(torch.empty((SIDE // PATCH) ** 2, WIDTH))
        blocks = torch.nn.ModuleList(_Block() for _ in range(DEPTH))
        self.transformer = torch.nn.ModuleDict({"resblocks": blocks})
        self.vit_downsampler1 = torch.nn.Conv2d(WIDTH, 2 * WIDTH, 3, 2, 1)
        self.vit_downsampler2 = torch.nn.Conv2d(2 * WIDTH, 4 * WIDTH, 3, 2, 1)


class _Model(Qwen3ForCausalLM):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config)
        self.vision_model = _Vision()
        self.vit_large_projector = torch.nn.Linear(4 * WIDTH, config.hidden_size)
