# SPDX-License-Identifier: Apache-2.0
"""Rows of `req_to_token` and the compression table: where decode finds a request's keys.

The row of a compressed request has one gap where its visual tokens were:

    entries                in stock SGLang           once packed
    [0, start)             text                      the same
    [start, start + m)     pictures, and the         the m columns
    [start + m, gap_end)   text between them         the padding slot 0
    [gap_end, end)                                   the text between the pictures, moved up
    [end, ...)             instruction and answer    the same

So text is what stands outside the gap [start, gap_end), gap_end = start + N_v, and needs no table
of its own. `lay_out_rows` of aircache_kernels writes the same.
"""

from __future__ import annotations

import torch

from aircache_kernels import Tables
from aircache_sglang.runtime.kv_planes import KVPlanes
from aircache_sglang.runtime.spans import VisualPrompt


def gap_end(prompt: VisualPrompt) -> int:
    """One past the gap of a packed row."""
    return prompt.start + prompt.n_visual


def gap_entries(prompt: VisualPrompt, columns: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
    """A packed row's entries from `start` on.

    columns: integers [m] slots; behind: of the text that follows the gap, as much as is wanted.
    """
    padding = columns.new_zeros(prompt.n_visual - len(columns))
    return torch.cat([columns, padding, behind])


def text_positions(prompt: VisualPrompt, length: int, device: torch.device) -> torch.Tensor:
    """Positions outside the gap of a packed row of `length` entries, int64."""
    head = torch.arange(prompt.start, device=device)
    return torch.cat([head, torch.arange(gap_end(prompt), length, device=device)])


class CompressionTable:
    """Device tensors keyed by `req_pool_idx`; a row with gap_len 0 is uncompressed.

    req_to_token: int32 [R, context], SGLang's own.
    gap_start, gap_len: int32 [R]; gap_len is the number of visual tokens.
    cell_offset: int32 [R, L + 1], prefix sums of the layer budgets: layer l owns the packed cells
        [cell_offset[r, l], cell_offset[r, l + 1]).
    tables: all of them, as the kernels take them.

    Written on the forward stream alone, so that it needs no barrier against running kernels.
    """

    def __init__(self, req_to_token: torch.Tensor, n_layers: int) -> None:
        n_rows, device = req_to_token.shape[0], req_to_token.device
        self.req_to_token = req_to_token
        self.gap_start = torch.zeros(n_rows, dtype=torch.int32, device=device)
        self.gap_len = torch.zeros(n_rows, dtype=torch.int32, device=device)
        self.cell_offset = torch.zeros((n_rows, n_layers + 1), dtype=torch.int32, device=device)
        self.tables = Tables(req_to_token, self.gap_start, self.gap_len, self.cell_offset)

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
