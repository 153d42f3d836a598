# SPDX-License-Identifier: Apache-2.0
"""The least time of a decode step: the bytes it must read over this machine's bandwidth."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import Row

COPY_BYTES = 2**28
COPIES = 12


def read_config(checkpoint: str) -> dict[str, Any] | None:
    """The text decoder's part of a local checkpoint's config.json; None if it is not at hand."""
    path = Path(checkpoint) / "config.json"
    if not path.is_file():
        return None
    config = json.loads(path.read_text())
    return {**config, **config.get("text_config", {})}


def kv_bytes(config: dict[str, Any], itemsize: int) -> int:
    """Bytes of one token's KV in all layers."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    kv_heads = config["num_key_value_heads"]
    return int(2 * config["num_hidden_layers"] * kv_heads * head_dim * itemsize)


def weight_bytes(config: dict[str, Any], itemsize: int) -> int:
    """Bytes of the decoder's matrices that a step reads whole: attention, MLP and the head.

    For decoders of Llama's shape; the embedding is looked up, norms and biases are left out.
    """
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    attention = 2 * hidden * head_dim * (heads + config["num_key_value_heads"])
    layer = attention + 3 * hidden * inner
    return int((config["num_hidden_layers"] * layer + config["vocab_size"] * hidden) * itemsize)


def copy_bandwidth() -> Row:
    """Bytes a second, read and written, of a large copy on the servers' device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(COPIES):
        started = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    # The first copies meet fresh pages and a cold clock.
    return {"bytes_per_second": 2 * COPY_BYTES / statistics.median(times[COPIES // 3 :])}
