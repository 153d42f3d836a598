# SPDX-License-Identifier: Apache-2.0
"""The compression table: what decode must know of a compressed request, on the device.

A compressed request's row of `req_to_token` has one gap, [gap_start, gap_start + gap_len), where
its visual tokens were. Its first m entries hold the slots of the m packed columns, the rest the
padding slot 0; text that stood between pictures has moved up behind the gap. So the text tokens are
the positions outside the gap, and no second table of slots is needed.
"""

from __future__ import annotations

import torch

from aircache_kernels import Tables
from aircache_sglang.runtime.kv_planes import KVPlanes


class CompressionTable:
    """Device tensors keyed by `req_pool_idx`; a row with gap_len 0 is uncompressed.

    req_to_token: int32 [R, context], SGLang's own.
    gap_start, gap_len: int32 [R]; gap_len is the number of visual tokens.
    cell_offset: int32 [R, L + 1], prefix sums of the layer budgets: layer l owns the packed cells
        [cell_offset[r, l], cell_offset[r, l + 1]).

    Written on the forward stream alone, so that it needs no barrier against running kernels.
    """

    def __init__(self, req_to_token: torch.Tensor, n_layers: int) -> None:
        n_rows, device = req_to_token.shape[0], req_to_token.device
        self.req_to_token = req_to_token
        self.gap_start = torch.zeros(n_rows, dtype=torch.int32, device=device)
        self.gap_len = torch.zeros(n_rows, dtype=torch.int32, device=device)
        self.cell_offset = torch.zeros((n_rows, n_layers + 1), dtype=torch.int32, device=device)

    @property
    def tables(self) -> Tables:
        """As the kernels take them."""
        return Tables(self.req_to_token, self.gap_start, self.gap_len, self.cell_offset)

    def clear(self, rows: torch.Tensor) -> None:
        """Mark rows (int64 [n]) as uncompressed; called for the rows of every prefill."""
        self.gap_len.index_fill_(0, rows, 0)

    def set(self, row: int, gap_start: int, gap_len: int, budgets: torch.Tensor) -> None:
        """Enter one compressed request; budgets int64 [L], on the table's device."""
        self.gap_start[row] = gap_start
        self.gap_len[row] = gap_len
        self.cell_offset[row, 1:] = budgets.cumsum(0)


class PoolReader:
    """What attends over a pool through its table: the decoders and extenders."""

    def __init__(self, pool: KVPlanes, table: CompressionTable) -> None:
        self.pool = pool
        self.table = table
