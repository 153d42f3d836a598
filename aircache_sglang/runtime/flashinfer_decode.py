# SPDX-License-Identifier: Apache-2.0
"""Decode attention over text slots and packed cells, by FlashInfer's paged decode.

Never run on a GPU: tested against a stand-in for FlashInfer that reads its tables on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from aircache_kernels import OnePlanDecode, build_flashinfer_tables
from aircache_sglang.runtime.kv_planes import KVPlanes
from aircache_sglang.runtime.record import CompressionRecord
from aircache_sglang.runtime.table import CompressionTable, PoolReader

WORKSPACE_BYTES = 128 << 20


def most_keys(
    seq_lens: torch.Tensor, records: Sequence[CompressionRecord | None], n_layers: int
) -> torch.Tensor:
    """The most keys that any layer reads of each request; int32 [bs], on the host.

    seq_lens: integers [bs] on the host, logical lengths. records: one a request, None for the
    uncompressed. The split over layers lives on the device, but no layer holds more than all
    visual tokens, or than all cells.
    """
    evicted = [
        0
        if record is None
        else max(0, record.intent.prompt.n_visual - n_layers * record.intent.columns)
        for record in records
    ]
    return (seq_lens - torch.tensor(evicted)).to(torch.int32)


class FlashInferDecoder(PoolReader):
    """Plans once a step on the host, for all layers, and writes every layer's page table.

    A CUDA graph cannot replay the plan: decode runs eagerly (patches, support.py).
    """

    def __init__(
        self,
        pool: KVPlanes,
        table: CompressionTable,
        *,
        n_q: int,
        q_dtype: torch.dtype,
        scale: float,
    ) -> None:
        """n_q: query heads of this rank; scale: the softmax scale of all layers."""
        super().__init__(pool, table)
        device, (_, _, n_kv, head_dim) = pool.k_all.device, pool.k_all.shape
        self._decode = OnePlanDecode(
            torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device),
            n_layers=pool.layer_num,
            rows=pool.rows,
            n_q=n_q,
            n_kv=n_kv,
            head_dim=head_dim,
            q_dtype=q_dtype,
            kv_dtype=pool.k_all.dtype,
            sm_scale=scale,
        )
        self._indices = torch.empty((pool.layer_num, 0), dtype=torch.int32, device=device)

    def plan(self, forward_batch: Any, records: Sequence[CompressionRecord | None]) -> None:
        """Write the page tables of one step and plan it; records: one a request."""
        n_layers, device = self.pool.layer_num, self._indices.device
        most = most_keys(forward_batch.seq_lens_cpu, records, n_layers)
        total, batch = int(most.sum()), len(records)
        if total > self._indices.shape[1]:
            # Doubled, so that growing batches seldom allocate.
            self._indices = torch.empty((n_layers, 2 * total), dtype=torch.int32, device=device)
        kv_indptr = torch.empty((n_layers, batch + 1), dtype=torch.int32, device=device)
        last_page_len = torch.empty(batch, dtype=torch.int32, device=device)
        build_flashinfer_tables(
            self.table.tables,
            forward_batch.req_pool_indices,
            forward_batch.seq_lens,
            rows=self.pool.rows,
            kv_indptr=kv_indptr,
            kv_indices=self._indices,
            last_page_len=last_page_len,
        )
        self._decode.plan(most, kv_indptr, self._indices, last_page_len)

    def attend(self, q: torch.Tensor, layer: Any, forward_batch: Any) -> torch.Tensor:
        """Attention of one layer; q: [bs, H_q, D], returns the same shape."""
        index = self.pool.plane(layer)
        # FlashInfer reads q densely; a model's q may be a slice of its fused projection.
        return self._decode.run(q.contiguous(), self.pool.k_all, self.pool.v_all, index)
