# SPDX-License-Identifier: Apache-2.0
"""Tiny MiniCPM-V 2.6, 4.0 and 4.5: SigLIP, a resampler, a fixed number of tokens a slice.

Transformers has no class of them, so a checkpoint brings a configuration and a processor of its
own, as published ones do (`--trust-remote-code`).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from aircache_sglang.testing.checkpoints import minicpm_v_processor
from aircache_sglang.testing.checkpoints.checkpoint import Words, save_weights, write_json
from aircache_sglang.testing.checkpoints.minicpm_v_processor import (
    MARK,
    PATCH,
    QUERIES,
    SIDE,
    TOKEN,
)

# By the names that SGLang asks the tokenizer for, as `im_start_id`; it reloads the tokenizer, and
# knows of them only what tokenizer_config.json says.
NAMED = {
    "im_end": "</image>",
    "im_start": "<image>",
    "slice_end": "</slice>",
    "slice_start": "<slice>",
    "unk": TOKEN,
}
TOKENS = (*NAMED.values(), "<image_id>", "</image_id>")
DECODERS = {"2.6": Qwen2Config, "4.0": LlamaConfig, "4.5": Qwen3Config}

_CONFIGURATION = """\
from transformers import {base}, SiglipVisionConfig


class MiniCPMVConfig({base}):
    model_type = "minicpmv"

    def __init__(self, vision_config=None, **kwargs):
        if not isinstance(vision_config, SiglipVisionConfig):
            vision_config = SiglipVisionConfig(**(vision_config or {{}}))
        self.vision_config = vision_config
        super().__init__(**kwargs)
"""


def make_minicpm_v(path: str | Path, *, version: str = "2.6", seed: int = 0, **text: Any) -> Path:
    """Write a checkpoint of 16 visual tokens a slice; ``version`` is 2.6, 4.0 or 4.5.

    A picture of more than 112 x 112 pixels has an overview and 2 to 4 slices. ``text`` changes the
    decoder.
    """
    if version not in DECODERS:
        raise ValueError(f"version must be {', '.join(DECODERS)}, got {version!r}")
    folder, words, base = Path(path), Words(*TOKENS), DECODERS[version]
    # The resampler has one head for each 128 numbers.
    fields = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    config = base(**words.text_config(**(fields | text)))
    save_weights(folder, _Model, config, words, seed=seed, renamed=_renamed)
    write_json(
        folder / "config.json",
        config.to_dict()
        | {
            "architectures": ["MiniCPMV"],
            "auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMVConfig"},
            "drop_vision_last_layer": False,
            "image_size": SIDE,
            "model_type": "minicpmv",
            "query_num": QUERIES,
            "torch_dtype": "float32",
            "version": version,
            "vision_config": _vision_config().to_dict(),
        },
    )
    (folder / "configuration_minicpm.py").write_text(_CONFIGURATION.format(base=base.__name__))
    shutil.copyfile(minicpm_v_processor.__file__, folder / "processing_minicpm.py")
    name = "MiniCPMVProcessor"
    processor = {
        "auto_map": {"AutoProcessor": f"processing_minicpm.{name}"},
        "processor_class": name,
    }
    for file in ("preprocessor_config.json", "processor_config.json"):
        write_json(folder / file, processor)
    words.write(folder, image=MARK, video="", processor_class=name, extra_special_tokens=NAMED)
    return folder


def _vision_config() -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=32,
        image_size=SIDE,
        intermediate_size=64,
        num_attention_heads=2,
        num_hidden_layers=2,
        patch_size=PATCH,
        vision_use_head=False,
    )


def _renamed(name: str) -> str:
    """The authors' names; ours have "visual" in them, by which the tower's weights are drawn."""
    for old, new in (
        ("visual_resampler.", "resampler."),
        ("visual.vision_model.", "vpm."),
        ("visual.", "vpm."),
    ):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


class _Resampler(torch.nn.Module):
    """Names and shapes of the authors' resampler."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.query = torch.nn.Parameter(torch.empty(QUERIES, outputs))
        self.kv_proj = torch.nn.Linear(inputs, outputs, bias=False)
        self.attn = torch.nn.MultiheadAttention(outputs, outputs // 128)
        self.ln_q = torch.nn.LayerNorm(outputs)
        self.ln_kv = torch.nn.LayerNorm(outputs)
        self.ln_post = torch.nn.LayerNorm(outputs)
        self.proj = torch.nn.Parameter(torch.empty(outputs, outputs))


class _Model(torch.nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.llm = AutoModelForCausalLM.from_config(config)
        vision = _vision_config()
        self.visual = SiglipVisionModel(vision)
        self.visual_resampler = _Resampler(vision.hidden_size, config.hidden_size)

    def get_output_embeddings(self) -> Any:
        return self.llm.get_output_embeddings()
