# SPDX-License-Identifier: Apache-2.0
"""Pool, table, pass and compressing backend around a stock backend in torch, without SGLang.

`World` plays what SGLang does around a model's attention layers: it writes prompts in a prefill,
has them compressed, and decodes them, with queries, keys and values drawn at random. It keeps every
key and value as it was computed, and so knows what a decode step must give.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from aircache_sglang.config import AirCacheConfig
from aircache_sglang.engine.backend import AttentionState, DecodeGraphVariants, Work, adopt
from aircache_sglang.policy import columns
from aircache_sglang.runtime.compress import PassInputs
from aircache_sglang.runtime.decide import Intent
from aircache_sglang.runtime.kernel_decode import KernelDecoder
from aircache_sglang.runtime.kernel_extend import KernelExtender
from aircache_sglang.runtime.kernel_pass import KernelPass
from aircache_sglang.runtime.kv_planes import KVPlanes
from aircache_sglang.runtime.record import CompressionRecord
from aircache_sglang.runtime.spans import Chunk, VisualPrompt
from aircache_sglang.runtime.stash import BatchStash, Job, QueryStash
from aircache_sglang.runtime.table import CompressionTable
from tests.support.one_rank import ONE_RANK
from tests.unit.kernels.cases import captured
from tests.unit.kernels.test_engine_twins import H_KV, H_Q, D, L


class Pool(KVPlanes):
    """The planes alone, and the plainest way to write them; float8 as raw bytes, as SGLang's."""

    def __init__(self, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.layer_num, self.model_layer_ids, self.dtype = L, tuple(range(L)), dtype
        store_dtype = torch.uint8 if dtype.itemsize == 1 else dtype
        self.create_planes((L, rows, H_KV, D), dtype, store_dtype, device)

    def write(self, layer: Any, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        for buffer, new in ((self.k_buffer, k), (self.v_buffer, v)):
            plane = buffer[layer.layer_id]
            plane[slots] = new.reshape(-1, *plane.shape[1:]).to(self.dtype).view(plane.dtype)

    def read(self, layer: Any, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of slots [...], [..., H_kv, D] each."""
        k, v = (half[layer.layer_id][slots] for half in (self.k_buffer, self.v_buffer))
        return k.view(self.dtype), v.view(self.dtype)

    def poison(self, slots: torch.Tensor) -> None:
        """NaN in all layers, K and V."""
        for layer in range(self.layer_num):
            nothing = torch.full_like(self.k_all[layer, : len(slots)], float("nan"))
            self.write(SimpleNamespace(layer_id=layer), slots, nothing, nothing)


class Mode(enum.Enum):
    EXTEND = enum.auto()
    DECODE = enum.auto()

    def is_decode(self) -> bool:
        return self is Mode.DECODE

    def is_target_verify(self) -> bool:
        return False


@dataclasses.dataclass(slots=True)
class Batch:
    """What the backends read of SGLang's forward batch, one row a token: int64 [n] tensors.

    seq_lens: of a prefill's tokens too, each up to itself.
    """

    forward_mode: Mode
    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor
    out_cache_loc: torch.Tensor


class Stock:
    """Attention over whole rows, of one shape whatever they hold, so that a graph can replay it."""

    def __init__(self, pool: Pool, req_to_token: torch.Tensor) -> None:
        self.pool = pool
        self.req_to_token = req_to_token
        self.forwards = 0

    def init_forward_metadata(self, batch: Batch) -> None:
        pass

    def init_forward_metadata_out_graph(self, batch: Batch, in_capture: bool = False) -> None:
        pass

    def init_forward_metadata_in_graph(self, batch: Batch) -> None:
        pass

    def forward(
        self, q: Any, k: Any, v: Any, layer: Any, batch: Batch, save_kv_cache: bool = True
    ) -> torch.Tensor:
        self.forwards += 1
        self.pool.write(layer, batch.out_cache_loc, k, v)
        slots = self.req_to_token[batch.req_pool_indices].long()
        positions = torch.arange(slots.shape[1], device=slots.device)
        hidden = positions[None, :] >= batch.seq_lens[:, None]
        heads = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        k, v = self.pool.read(layer, slots)
        return attention(heads, k, v, hidden[:, None, :], layer.scaling).view_as(q)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor, scale: float
) -> torch.Tensor:
    """q: [n, H_q, D]; k, v: [n, T, H_kv, D]; hidden: bool, broadcast to [n, H_q, T]."""
    group = q.shape[1] // k.shape[2]
    k, v = (x.to(q.dtype).nan_to_num(0.0).repeat_interleave(group, dim=2) for x in (k, v))
    logits = torch.einsum("nhd,nthd->nht", q, k) * scale
    weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("nht,nthd->nhd", weights, v)


@dataclasses.dataclass(slots=True)
class Request:
    """prompt: None without pictures. keys, values: [L, length, H_kv, D], as they were computed."""

    row: int
    length: int
    prompt: VisualPrompt | None
    keys: torch.Tensor
    values: torch.Tensor
    record: CompressionRecord | None = None
    # Per layer and KV head the visual tokens that were kept, by their ordinals.
    kept: list[list[list[int]]] | None = None

    def hidden(self, layer: int) -> torch.Tensor:
        """bool [H_kv, length], True where a compressed request's token was evicted."""
        hidden = torch.zeros(self.keys.shape[2], self.length, dtype=torch.bool)
        if self.prompt is not None and self.kept is not None:
            positions = self.prompt.visual_positions()
            hidden[:, positions] = True
            for head, ordinals in enumerate(self.kept[layer]):
                hidden[head, positions[ordinals]] = False
        return hidden


class World:
    """Requests in rows 1, 2, ...; row 0 is for padding."""

    def __init__(
        self,
        prompts: Sequence[VisualPrompt | int],
        *,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
        retention: float = 0.2,
        new_tokens: int = 8,
        device: torch.device,
    ) -> None:
        """prompts: with pictures, or the length of one without."""
        self.dtype, self.kv_dtype, self.device = dtype, kv_dtype or dtype, device
        self.random = torch.Generator().manual_seed(0)
        self.config = AirCacheConfig(retention=retention, return_selection=True)
        lengths = [p if isinstance(p, int) else p.length for p in prompts]
        extra = [0 if isinstance(p, int) else columns(retention, p.n_visual) for p in prompts]
        n_slots = sum(lengths) + sum(extra) + new_tokens * len(prompts)
        # Slot 0 is padding.
        self.free = (1 + torch.randperm(n_slots, generator=self.random)).to(device)
        self.pool = Pool(n_slots + 1, self.kv_dtype, device)
        n_rows, context = len(prompts) + 1, max(lengths) + new_tokens
        self.req_to_token = torch.zeros(n_rows, context, dtype=torch.int32, device=device)
        self.table = CompressionTable(self.req_to_token, L)
        self.capturing: str | None = None
        self.work = Work()  # of the next forward
        self.state = AttentionState(
            self.pool,
            KernelDecoder(self.pool, self.table),
            KernelExtender(self.pool, self.table),
            lambda: self.capturing,
        )
        self.backend: Any = Stock(self.pool, self.req_to_token)
        adopt(self.backend, self.state)
        self.variants = DecodeGraphVariants(self.state)
        self.layers = [
            SimpleNamespace(
                layer_id=layer,
                tp_q_head_num=H_Q,
                qk_head_dim=D,
                v_head_dim=D,
                scaling=D**-0.5,
            )
            for layer in range(L)
        ]
        nothing = torch.empty(L, 0, H_KV, D, dtype=dtype)
        self.requests = [
            Request(row, length, None if isinstance(p, int) else p, nothing, nothing)
            for row, (p, length) in enumerate(zip(prompts, lengths, strict=True), start=1)
        ]

    def take(self, n: int) -> torch.Tensor:
        """n free slots."""
        taken, self.free = self.free[:n], self.free[n:]
        return taken

    def draw(self, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [L, n, H_q * D] and k, v [L, n, H_kv * D] of n tokens, on the host."""
        q, k, v = (
            torch.randn(L, n, heads * D, generator=self.random).to(self.dtype)
            for heads in (H_Q, H_KV, H_KV)
        )
        return 2 * q, k, v

    def on_device(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def remember(self, request: Request, k: torch.Tensor, v: torch.Tensor) -> None:
        """Append computed keys and values [L, n, H_kv * D], as the pool rounds them."""
        k, v = (x.reshape(L, -1, H_KV, D).to(self.kv_dtype).to(self.dtype) for x in (k, v))
        request.keys = torch.cat([request.keys, k], dim=1)
        request.values = torch.cat([request.values, v], dim=1)

    def prefill(self) -> None:
        """One batch of all prompts; then the pass, and NaN in every slot that it gave back."""
        rows, lens, slots, jobs, first = [], [], [], [], 0
        kept = BatchStash(L)
        for request in self.requests:
            mine = self.take(request.length)
            self.req_to_token[request.row, : request.length] = mine.int()
            slots.append(mine)
            rows += [request.row] * request.length
            lens += range(1, request.length + 1)
            if request.prompt is not None:
                stash = QueryStash(request.prompt.instruction)
                stash.claim(Chunk(0, request.length, first), kept)
                jobs.append((request, stash))
            first += request.length
        batch = Batch(Mode.EXTEND, self.on_device(rows), self.on_device(lens), torch.cat(slots))
        q, k, v = self.draw(first)
        self.work = Work(queries=kept)
        self.run(batch, q.to(self.device), k.to(self.device), v.to(self.device))
        for request, part in zip(
            self.requests, torch.arange(first).split([r.length for r in self.requests]), strict=True
        ):
            self.remember(request, k[:, part], v[:, part])
        self.compress(jobs)

    def compress(self, jobs: Sequence[tuple[Request, QueryStash]]) -> None:
        scale = self.layers[0].scaling
        inputs = PassInputs(self.pool.k_all, self.pool.v_all, self.table, ONE_RANK, scale)
        work = []
        for request, stash in jobs:
            prompt = request.prompt
            assert prompt is not None
            m = columns(self.config.retention, prompt.n_visual)
            originals = self.req_to_token[request.row, : prompt.end].long()
            request.record = CompressionRecord(
                Intent(self.config, prompt, m), request.row, originals, self.take(m)
            )
            work.append(Job(request.record, stash.queries()))
        KernelPass(inputs)(work)
        for request, _ in jobs:
            assert request.record is not None and request.prompt is not None
            request.kept = request.record.report()["selection"]
            self.pool.poison(inputs.visual_slots(request.record))

    def step(self, requests: Sequence[Request]) -> tuple[Batch, Any, Any, Any]:
        """A decode batch with the next token of each request entered, and its q, k and v."""
        slots = self.take(len(requests))
        q, k, v = self.draw(len(requests))
        for i, request in enumerate(requests):
            self.req_to_token[request.row, request.length] = slots[i].int()
            request.length += 1
            self.remember(request, k[:, i : i + 1], v[:, i : i + 1])
        records = [request.record for request in requests]
        self.work = Work(records=records if any(records) else ())
        rows = self.on_device([request.row for request in requests])
        lens = self.on_device([request.length for request in requests])
        batch = Batch(Mode.DECODE, rows, lens, slots)
        return batch, q.to(self.device), k.to(self.device), v.to(self.device)

    def run(self, batch: Batch, q: Any, k: Any, v: Any) -> torch.Tensor:
        """One eager forward: [L, n, H_q * D]."""
        with self.state.during(self.work):
            self.backend.init_forward_metadata(batch)
            return self.forward(batch, q, k, v)

    def forward(self, batch: Batch, q: Any, k: Any, v: Any) -> torch.Tensor:
        """All layers: [L, n, H_q * D]."""
        outputs = [
            self.backend.forward(q[i], k[i], v[i], layer, batch)
            for i, layer in enumerate(self.layers)
        ]
        return torch.stack(outputs)

    def variant(self, batch: Batch) -> str:
        """Which decode graph the step would replay."""
        with self.state.during(self.work):
            return self.variants.select(batch)

    def capture(self, size: int) -> Callable[[Batch, Any, Any, Any], torch.Tensor]:
        """Decode graphs of one batch size, as SGLang captures them; the function replays the right.

        All rows are padding meanwhile, and so are those beyond the batch in a replay
        (decode_cuda_graph_runner.py). On a CPU a graph is the forward itself, run again.
        """
        rows = torch.zeros(size, dtype=torch.int64, device=self.device)
        static = Batch(Mode.DECODE, rows, torch.ones_like(rows), torch.zeros_like(rows))
        buffers = [x.to(self.device) for x in self.draw(size)]
        replays: dict[str, Callable[[], torch.Tensor]] = {}
        for label in self.variants.capture_labels:
            self.capturing = label
            self.backend.init_forward_metadata_out_graph(static, in_capture=True)
            replays[label] = self.record(label, lambda: self.forward(static, *buffers))
        self.capturing = None

        def replay(batch: Batch, q: Any, k: Any, v: Any) -> torch.Tensor:
            n = len(batch.seq_lens)
            for name, filler in (("req_pool_indices", 0), ("seq_lens", 1), ("out_cache_loc", 0)):
                getattr(static, name)[:n] = getattr(batch, name)
                getattr(static, name)[n:] = filler
            for buffer, new in zip(buffers, (q, k, v), strict=True):
                buffer[:, :n] = new
            with self.state.during(self.work):
                self.backend.init_forward_metadata_out_graph(static)
                return replays[self.variants.select(batch)]()[:, :n]

        return replay

    def record(self, label: str, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        if self.device.type == "cpu":

            def again() -> torch.Tensor:
                self.capturing = label
                try:
                    return run()
                finally:
                    self.capturing = None

            return again
        graph, out = captured(run)

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay

    def expected(self, requests: Sequence[Request], q: torch.Tensor) -> torch.Tensor:
        """What a decode step must give, in float64 from the keys and values as computed."""
        heads = q.cpu().double().view(L, -1, H_Q, D)
        out = torch.empty_like(heads)
        for layer in range(L):
            for i, request in enumerate(requests):
                out[layer, i] = attention(
                    heads[layer, i][None],
                    request.keys[layer][None],
                    request.values[layer][None],
                    request.hidden(layer).repeat_interleave(H_Q // H_KV, dim=0)[None],
                    self.layers[layer].scaling,
                )[0]
        return out.flatten(2)
