# SPDX-License-Identifier: Apache-2.0
"""Decode attention over text slots and packed cells, by the Triton kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from aircache_kernels import decode_attention
from aircache_sglang.runtime.kv_planes import KVPlanes
from aircache_sglang.runtime.record import CompressionRecord
from aircache_sglang.runtime.table import CompressionTable, PoolReader


class KernelDecoder(PoolReader):
    """Reads rows, lengths and table on the device in each launch, and so needs no plan.

    That is what makes it replayable in a CUDA graph: the captured launches hold the addresses of
    SGLang's static batch buffers and of the table. A padded row has request 0, which is never
    compressed.

    batch_invariant: see `decode_attention`.
    """

    def __init__(
        self, pool: KVPlanes, table: CompressionTable, *, batch_invariant: bool = False
    ) -> None:
        super().__init__(pool, table)
        self.batch_invariant = batch_invariant

    def plan(self, forward_batch: Any, records: Sequence[CompressionRecord | None]) -> None:
        """Nothing to do."""

    def attend(self, q: torch.Tensor, layer: Any, forward_batch: Any) -> torch.Tensor:
        """Attention of one layer; q: [bs, H_q, D], returns the same shape."""
        return decode_attention(
            q,
            self.pool.k_all,
            self.pool.v_all,
            self.pool.plane(layer),
            self.table.tables,
            forward_batch.req_pool_indices,
            forward_batch.seq_lens,
            sm_scale=layer.scaling,
            batch_invariant=self.batch_invariant,
        )
