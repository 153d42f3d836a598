# SPDX-License-Identifier: Apache-2.0
"""The compression pass of one request alone, in CPU seconds on one thread."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from aircache_sglang.config import AirCacheConfig
from aircache_sglang.engine.heads import TensorParallelHeads
from aircache_sglang.policy import columns
from aircache_sglang.runtime.compress import Job, PassInputs, TorchPass
from aircache_sglang.runtime.decide import Intent
from aircache_sglang.runtime.record import CompressionRecord
from aircache_sglang.runtime.spans import VisualPrompt
from aircache_sglang.runtime.table import CompressionTable
from benchmarks.decode_attention import N_HEAD, SHAPES, Shape, seconds
from benchmarks.records import Results, Row


def one_pass(shape: Shape, n_visual: int, n_text: int, retention: float, budget: float) -> Row:
    """Score, split, select and pack, of a request whose instruction has `n_text` tokens."""
    generator = torch.Generator().manual_seed(0)
    m, end = columns(retention, n_visual), N_HEAD + n_visual
    length = end + n_text
    kv = torch.randn(
        (2, shape.layers, 1 + length + m, shape.kv_heads, shape.head_dim), generator=generator
    )
    q = torch.randn((shape.layers, n_text, shape.heads, shape.head_dim), generator=generator)
    slots = torch.arange(1, 1 + length + m)
    req_to_token = slots[None, :length].to(torch.int32)
    group: Any = SimpleNamespace(world_size=1)
    cells = PassInputs(
        kv[0],
        kv[1],
        CompressionTable(req_to_token, shape.layers),
        TensorParallelHeads(group, shape.kv_heads),
        shape.head_dim**-0.5,
    )
    compress = TorchPass(cells)
    prompt = VisualPrompt(((N_HEAD, end),), length, n_visual)
    intent = Intent(AirCacheConfig(retention=retention), prompt, m)

    def run() -> None:
        # The original slots are only read, so that the pass can run again.
        compress([Job(CompressionRecord(intent, 0, slots[:end], slots[length:]), q)])

    median, calls = seconds(run, budget)
    return {"seconds": median, "calls": calls}


def passes(
    results: Results,
    visual: list[int],
    instructions: list[int],
    retentions: list[float],
    budget: float,
) -> None:
    """The pass over the attention of the throughput benchmark's small model."""
    for n_visual in visual:
        for n_text in instructions:
            for retention in retentions:
                key = {
                    "benchmark": "compression pass",
                    "shape": SHAPES[0].name,
                    "visual_tokens": n_visual,
                    "instruction_tokens": n_text,
                    "retention": retention,
                }
                results.measure(
                    key,
                    lambda n=n_visual, t=n_text, r=retention: one_pass(SHAPES[0], n, t, r, budget),
                )
