# SPDX-License-Identifier: Apache-2.0
"""The compression pass of one request alone, in CPU seconds on one thread."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
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


def one_pass(
    shape: Shape, n_visual: int, n_text: int, config: AirCacheConfig
) -> Callable[[], None]:
    """Score, split, select and pack, of a request whose instruction has `n_text` tokens."""
    generator = torch.Generator().manual_seed(0)
    m, end = columns(config.retention, n_visual), N_HEAD + n_visual
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
    intent = Intent(config, prompt, m)

    def run() -> None:
        # The original slots are only read, so that the pass can run again.
        compress([Job(CompressionRecord(intent, 0, slots[:end], slots[length:]), q)])

    return run


def alone(run: Callable[[], None], budget: float) -> Row:
    median, calls = seconds(run, budget)
    return {"seconds": median, "calls": calls}


def in_turns(first: Callable[[], None], second: Callable[[], None], budget: float) -> Row:
    """Median CPU seconds of two passes that follow one another, there and back, and their ratio."""
    torch.set_num_threads(1)
    first(), second()
    times: tuple[list[float], list[float]] = ([], [])
    while len(times[0]) < 10 or sum(map(sum, times)) < budget:
        for which in (0, 1, 1, 0):
            started = time.thread_time()
            (first, second)[which]()
            times[which].append(time.thread_time() - started)
    medians = [statistics.median(of) for of in times]
    return {"seconds": medians, "ratio": medians[1] / medians[0], "calls": len(times[0])}


Case = tuple[Shape, int, int, float]  # shape, visual and instruction tokens, retention


def cases(
    benchmark: str,
    shapes: Iterable[Shape],
    visual: list[int],
    instructions: list[int],
    retentions: list[float],
) -> Iterator[tuple[Row, Case]]:
    """Each request of a benchmark, with the key of its row."""
    for case in itertools.product(shapes, visual, instructions, retentions):
        shape, n_visual, n_text, retention = case
        key = {
            "benchmark": benchmark,
            "shape": shape.name,
            "visual_tokens": n_visual,
            "instruction_tokens": n_text,
            "retention": retention,
        }
        yield key, case


def one_threshold(
    results: Results,
    visual: list[int],
    instructions: list[int],
    retentions: list[float],
    budget: float,
) -> None:
    """The pass with `--aircache-budget global` beside eq. 11's, on all shapes."""

    def run(shape: Shape, n_visual: int, n_text: int, retention: float) -> Row:
        both = [
            one_pass(shape, n_visual, n_text, AirCacheConfig(retention=retention, budget=name))
            for name in ("aircache", "global")
        ]
        return in_turns(*both, budget=budget)

    for key, case in cases("layer budgets", SHAPES, visual, instructions, retentions):
        results.measure(key, partial(run, *case))


def passes(
    results: Results,
    visual: list[int],
    instructions: list[int],
    retentions: list[float],
    budget: float,
) -> None:
    """The pass over the attention of the throughput benchmark's small model."""

    def run(shape: Shape, n_visual: int, n_text: int, retention: float) -> Row:
        return alone(one_pass(shape, n_visual, n_text, AirCacheConfig(retention=retention)), budget)

    for key, case in cases("compression pass", SHAPES[:1], visual, instructions, retentions):
        results.measure(key, partial(run, *case))
