# SPDX-License-Identifier: Apache-2.0
"""SGLang's own attention backend, which also stashes queries and decodes packed cells."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from aircache_sglang.runtime.decode import Bucket, CellCache, attend, make_bucket
from aircache_sglang.runtime.extend import PackedExtend, attend_extend, plan_extend
from aircache_sglang.runtime.kv_pool import LayerContiguousKVPool
from aircache_sglang.runtime.record import CompressionRecord
from aircache_sglang.runtime.stash import StashWork
from aircache_sglang.runtime.table import CompressionTable


@dataclasses.dataclass(slots=True)
class AttentionState:
    """What the backend shares with the compressor (runtime/engine.py)."""

    pool: LayerContiguousKVPool
    table: CompressionTable
    records: dict[int, CompressionRecord]
    # The queries to keep while this forward runs.
    stash_work: Sequence[StashWork] = ()
    # The step's requests, empty if none of them is compressed.
    buckets: list[Bucket] = dataclasses.field(default_factory=list)
    cell_cache: CellCache = dataclasses.field(default_factory=CellCache)
    # The requests of a prefill that extend a replica.
    extends: list[PackedExtend] = dataclasses.field(default_factory=list)

    def plan_extend(self, forward_batch: Any, req_to_token: torch.Tensor) -> None:
        """Find the requests of a prefill that extend a replica; no others have been packed yet."""
        self.extends = []
        first_row = 0
        for row, prefix_len, seq_len in zip(
            forward_batch.req_pool_indices.tolist(),
            forward_batch.extend_prefix_lens.tolist(),
            forward_batch.seq_lens.tolist(),
            strict=True,
        ):
            record = self.records.get(row)
            if record is not None and record.reused:
                self.extends.append(
                    plan_extend(
                        record,
                        req_to_token[row],
                        prefix_len,
                        seq_len,
                        first_row,
                        self.pool.layer_num,
                        self.pool.rows,
                    )
                )
            first_row += seq_len - prefix_len

    def extend(self, q: torch.Tensor, out: torch.Tensor, layer: Any) -> None:
        """Overwrite the rows of `out` [tokens, H_q * D] that extend a replica."""
        heads = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        results = out.view(-1, layer.tp_q_head_num, layer.v_head_dim)
        index = layer.layer_id - self.pool.start_layer
        for plan in self.extends:
            results[plan.source] = attend_extend(
                plan, heads[plan.source], self.pool.k_all, self.pool.v_all, index, layer.scaling
            )

    def plan_decode(self, forward_batch: Any, req_to_token: torch.Tensor) -> None:
        """Sort the requests of a decode step into buckets."""
        self.buckets = []
        rows = forward_batch.req_pool_indices
        records = [self.records.get(row) for row in rows.tolist()]
        compressed = [record for record in records if record is not None]
        if not compressed:
            return
        cells = self.cell_cache.cells(compressed, self.pool.layer_num, self.pool.rows)
        kept = torch.tensor([record is not None for record in records], device=rows.device)
        for chosen, bucket_cells in ((kept, cells), (~kept, [])):
            members = chosen.nonzero().view(-1)
            if members.numel():
                bucket = make_bucket(
                    members,
                    rows[members],
                    forward_batch.seq_lens[members],
                    req_to_token,
                    self.table.gap_start,
                    self.table.gap_len,
                    bucket_cells,
                )
                self.buckets.append(bucket)

    def stash(self, q: torch.Tensor, layer: Any) -> None:
        """Keep the queries that `stash_work` names; q: [tokens, H_q * D], after RoPE."""
        heads = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        for work in self.stash_work:
            work.stash.write(layer.layer_id - self.pool.start_layer, heads[work.source])

    def decode(self, q: torch.Tensor, layer: Any) -> torch.Tensor:
        """Attention of one decode step; q: [bs, H_q * D], returns the same shape."""
        heads = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = torch.empty_like(heads)
        index = layer.layer_id - self.pool.start_layer
        for bucket in self.buckets:
            part = heads[bucket.members]
            out[bucket.members] = attend(
                bucket, part, self.pool.k_all, self.pool.v_all, index, layer.scaling
            )
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)


@functools.cache
def compressing(stock: type) -> type:
    """The subclass of an attention backend that stashes queries and decodes compressed requests.

    Prefill is stock but for requests that extend a replica, and so is the decode of a batch with
    nothing compressed in it.
    """

    class CompressingBackend(stock):
        aircache: AttentionState

        def init_forward_metadata(self, forward_batch: Any) -> None:
            super().init_forward_metadata(forward_batch)
            self.aircache.buckets = []
            self.aircache.extends = []
            if forward_batch.forward_mode.is_decode():
                self.aircache.plan_decode(forward_batch, self.req_to_token_pool.req_to_token)
            elif forward_batch.forward_mode.is_extend():
                self.aircache.plan_extend(forward_batch, self.req_to_token_pool.req_to_token)

        def forward_extend(
            self, q: Any, k: Any, v: Any, layer: Any, *args: Any, **kwargs: Any
        ) -> Any:
            if self.aircache.stash_work:
                self.aircache.stash(q, layer)
            out = super().forward_extend(q, k, v, layer, *args, **kwargs)
            if self.aircache.extends:
                self.aircache.extend(q, out, layer)
            return out

        def forward_decode(
            self,
            q: Any,
            k: Any,
            v: Any,
            layer: Any,
            forward_batch: Any,
            save_kv_cache: bool = True,
            **kwargs: Any,
        ) -> Any:
            if not self.aircache.buckets:
                return super().forward_decode(
                    q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **kwargs
                )
            if save_kv_cache and k is not None:
                loc = KVWriteLoc(forward_batch.out_cache_loc, None)
                self.aircache.pool.set_kv_buffer(layer, loc, k, v)
            return self.aircache.decode(q, layer)

    CompressingBackend.__name__ = CompressingBackend.__qualname__ = f"AirCache{stock.__name__}"
    return CompressingBackend


def adopt(backend: AttentionBackend, state: AttentionState) -> None:
    """Make a constructed backend a compressing one.

    The object stays what it was, with all its state and an instance of its own class: a wrapper
    would have to forward every attribute that SGLang reads off a backend.
    """
    stock: type = type(backend)
    backend.__class__ = compressing(stock)
    backend.aircache = state
