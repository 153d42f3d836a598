# SPDX-License-Identifier: Apache-2.0
"""Tiny LoRA adapters of a Qwen2-VL in the files of PEFT, and a model that has one merged."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from aircache_sglang.testing.oracle import Oracle
from aircache_sglang.testing.server import Server

PREFIX = "base_model.model."
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Of a weight's own size, on average: enough to change what is kept and what is said.
STRENGTH = 0.5


def make_adapter(
    path: Path, oracle: Oracle, *, seed: int, rank: int, targets: Sequence[str] = ALL_LINEAR
) -> Path:
    """Write an adapter of the decoder of the oracle's model, with an alpha of twice its rank."""
    weights = {}
    for name, module in oracle.model.named_modules():
        if "language_model.layers" not in name or name.rpartition(".")[2] not in targets:
            continue
        rows, columns = module.weight.shape
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        size = STRENGTH * float(module.weight.detach().std()) / (2 * rank**0.5)
        weights[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
        weights[f"{PREFIX}{name}.lora_B.weight"] = size * torch.randn(
            rows, rank, generator=generator
        )
    path.mkdir(parents=True)
    save_file(weights, path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "base_model_name_or_path": str(oracle.checkpoint),
        "bias": "none",
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": list(targets),
        "task_type": "CAUSAL_LM",
    }
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return path


@torch.no_grad()
def merged(checkpoint: Path, adapter: Path) -> Oracle:
    """The checkpoint in Transformers with an adapter added to its weights: W + (alpha / r) B A."""
    oracle = Oracle(checkpoint)
    config = json.loads((adapter / "adapter_config.json").read_text())
    weights = load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in weights if name.endswith("lora_A.weight")]:
        module: Any = oracle.model.get_submodule(
            name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        )
        product = weights[name.replace("lora_A", "lora_B")] @ weights[name]
        module.weight += config["lora_alpha"] / config["r"] * product
    return oracle


class Under:
    """A server that is asked under one adapter; None for its own weights."""

    def __init__(self, server: Server, adapter: str | None) -> None:
        self.server, self.adapter = server, adapter

    def generate(self, *args: Any, **fields: Any) -> Any:
        return self.server.generate(*args, lora_path=self.adapter, **fields)
