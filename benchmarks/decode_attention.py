# SPDX-License-Identifier: Apache-2.0
"""Attention of one decode step alone: ours against SGLang's torch backend, at the same shapes.

Each measurement is one whole step, all layers, with what our backend prepares once a step.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.model_executor.runner_utils.capture_mode import get_capture_attention_variant
from torch.nn.functional import scaled_dot_product_attention

from aircache_sglang.config import AirCacheConfig
from aircache_sglang.engine.backend import AttentionState, compressing
from aircache_sglang.policy import columns
from aircache_sglang.runtime.decide import Intent
from aircache_sglang.runtime.decode import TorchDecoder
from aircache_sglang.runtime.kv_planes import absolute_rows
from aircache_sglang.runtime.record import CompressionRecord
from aircache_sglang.runtime.spans import VisualPrompt
from aircache_sglang.runtime.table import CompressionTable
from benchmarks.records import Results, Row

N_HEAD, N_TAIL = 8, 24  # text before the pictures; instruction and generated tokens


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """The attention of a model."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


# The first is the small model of the throughput benchmark; the second has the attention of
# Qwen2-VL-7B, in two layers.
SHAPES = (Shape("small", 6, 2, 2, 64), Shape("7b", 2, 28, 4, 128))


class Step:
    """A pool with `batch` prefilled requests of `n_visual` visual tokens, ready to decode."""

    def __init__(self, shape: Shape, batch: int, n_visual: int, retention: float) -> None:
        self.shape = shape
        n_columns = columns(retention, n_visual) if retention < 1 else 0
        length = N_HEAD + n_visual + N_TAIL
        generator = torch.Generator().manual_seed(0)
        rows = 1 + batch * (length + n_columns)
        cells = (2, shape.layers, rows, shape.kv_heads, shape.head_dim)
        kv = torch.randn(cells, generator=generator)
        self.k_all, self.v_all = kv[0], kv[1]
        self.q = torch.randn(batch, shape.heads * shape.head_dim, generator=generator)
        # Slots as a server hands them out: contiguous within a prefill.
        slots = torch.arange(1, rows)
        self.req_to_token = torch.zeros(batch, length, dtype=torch.int32)
        pool: Any = SimpleNamespace(
            k_all=self.k_all,
            v_all=self.v_all,
            layer_num=shape.layers,
            rows=rows,
            plane=lambda layer: layer.layer_id,
        )
        self.table = CompressionTable(self.req_to_token, shape.layers)
        self.records: list[CompressionRecord | None] = [None] * batch
        for row in range(batch):
            self.req_to_token[row] = slots[row * length : (row + 1) * length]
            if n_columns:
                extra = slots[batch * length + row * n_columns :][:n_columns]
                self.records[row] = self._compressed(row, n_visual, extra, retention)
        self.decoder = TorchDecoder(pool, self.table)
        self.batch: Any = SimpleNamespace(
            req_pool_indices=torch.arange(batch),
            seq_lens=torch.full((batch,), length),
        )
        self.layers = [
            SimpleNamespace(layer_id=layer, scaling=shape.head_dim**-0.5)
            for layer in range(shape.layers)
        ]

    def _compressed(
        self, row: int, n_visual: int, columns: torch.Tensor, retention: float
    ) -> CompressionRecord:
        """What the pass leaves behind, with budgets that differ by layer as on real pages."""
        layers, m = self.shape.layers, columns.numel()
        share = torch.linspace(0.5, 1.5, layers)
        budgets = (share / share.sum() * layers * m).long()
        budgets[-1] += layers * m - budgets.sum()
        end = N_HEAD + n_visual
        prompt = VisualPrompt(((N_HEAD, end),), end + N_TAIL, n_visual)
        intent = Intent(AirCacheConfig(retention=retention), prompt, m)
        originals = self.req_to_token[row, :end].long()
        self.req_to_token[row, N_HEAD:end] = 0
        self.req_to_token[row, N_HEAD : N_HEAD + m] = columns
        self.table.set(row, N_HEAD, n_visual, budgets)
        return CompressionRecord(intent, row, originals, columns, budgets=budgets)

    def heads(self) -> torch.Tensor:
        return self.q.view(-1, self.shape.heads, self.shape.head_dim)

    def stock(self) -> torch.Tensor:
        """SGLang's own step; the requests must not be compressed."""
        out = torch.empty_like(self.heads())
        for layer in self.layers:
            # The method uses no attribute of its backend without a sliding window.
            TorchNativeAttnBackend._run_sdpa_forward_decode(
                None,  # type: ignore[arg-type]
                self.heads(),
                out,
                self.k_all[layer.layer_id],
                self.v_all[layer.layer_id],
                self.req_to_token,
                self.batch.req_pool_indices,
                self.batch.seq_lens,
                scaling=layer.scaling,
                enable_gqa=self.shape.heads != self.shape.kv_heads,
            )
        return out

    def ours(self) -> torch.Tensor:
        """Our step over compressed requests, its planning included."""
        self.decoder.plan(self.batch, self.records)
        for layer in self.layers:
            out = self.decoder.attend(self.heads(), layer, self.batch)
        return out

    def verify(self) -> None:
        """Raise unless our step agrees with attention spelled out request by request."""
        out, last = self.ours(), self.shape.layers - 1
        for row, record in enumerate(self.records):
            assert record is not None and record.budgets is not None
            ends = record.budgets.cumsum(0)
            cells = torch.arange(int(ends[-1] - record.budgets[-1]), int(ends[-1]))
            text = self.req_to_token[row, [*range(N_HEAD), *range(-N_TAIL, 0)]].long()
            index = torch.cat(
                [
                    last * self.k_all.shape[1] + text,
                    absolute_rows(cells, record.columns, self.shape.layers, self.k_all.shape[1]),
                ]
            )
            k, v = (
                cache.reshape(-1, self.shape.kv_heads, self.shape.head_dim)[index].transpose(0, 1)
                for cache in (self.k_all, self.v_all)
            )
            q = self.heads()[row][:, None]
            wanted = scaled_dot_product_attention(q[None], k[None], v[None], enable_gqa=True)
            torch.testing.assert_close(out[row], wanted[0, :, 0], atol=1e-4, rtol=1e-4)


class NoBackend:
    """An attention backend that does nothing, so that what ours adds to it can be timed."""

    def init_forward_metadata(self, forward_batch: Any) -> None:
        pass

    def forward(self, q: Any, k: Any, v: Any, layer: Any, batch: Any, **kwargs: Any) -> Any:
        return q


def seconds(run: Callable[[], object], budget: float) -> tuple[float, int]:
    """(median CPU seconds of one call on one thread, calls), in `budget` seconds, at least 5.

    On one thread they are the wall-clock seconds of an idle machine, and a busy one disturbs them
    little.
    """
    torch.set_num_threads(1)
    run()
    times: list[float] = []
    while len(times) < 5 or sum(times) < budget:
        started = time.thread_time()
        run()
        times.append(time.thread_time() - started)
    return statistics.median(times), len(times)


def attention(results: Results, batches: list[int], visual: list[int], budget: float) -> None:
    """Time of one step's attention at retention 0.5 and 0.1, and stock's."""
    for shape in SHAPES:
        for batch in batches:
            for n_visual in visual:
                if batch * n_visual > 32_768:
                    continue  # more than the memory of a small machine
                for retention in (None, 0.5, 0.1):
                    key = {
                        "benchmark": "decode attention",
                        "shape": shape.name,
                        "batch": batch,
                        "visual_tokens": n_visual,
                        "retention": retention,
                    }

                    def run(
                        s: Shape = shape, b: int = batch, n: int = n_visual, r: Any = retention
                    ) -> Row:
                        step = Step(s, b, n, 1.0 if r is None else r)
                        if r is not None:
                            step.verify()
                        median, calls = seconds(step.stock if r is None else step.ours, budget)
                        return {"seconds": median, "calls": calls}

                    results.measure(key, run)


def overhead(results: Results, layers: list[int], budget: float) -> None:
    """What our backend adds to a decode step in which nothing is compressed."""
    batch = SimpleNamespace(forward_mode=SimpleNamespace(is_decode=lambda: True))
    for n_layers in layers:
        for name, kind in (("none", NoBackend), ("aircache", compressing(NoBackend))):
            backend: Any = kind()
            unused: Any = None
            backend.aircache = AttentionState(unused, unused, unused, get_capture_attention_variant)

            def step(backend: Any = backend, n_layers: int = n_layers) -> None:
                backend.init_forward_metadata(batch)
                for _ in range(n_layers):
                    backend.forward(None, None, None, None, batch, save_kv_cache=True)

            def timed(step: Callable[[], None] = step) -> Row:
                median, calls = seconds(lambda: [step() for _ in range(100)], budget)
                return {"seconds": median / 100, "calls": calls * 100}

            key = {"benchmark": "step overhead", "layers": n_layers, "backend": name}
            results.measure(key, timed)
