# SPDX-License-Identifier: Apache-2.0
"""Decode attention over text slots and packed cells, in torch.

One padded gather and one scaled-dot-product call a layer and bucket. A batch has at most two
buckets, its compressed and its uncompressed requests, so that a long uncompressed request does not
pad the short compressed ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from aircache_sglang.runtime.kv_planes import KVPlanes, absolute_rows
from aircache_sglang.runtime.record import CompressionRecord
from aircache_sglang.runtime.table import CompressionTable, PoolReader


@dataclasses.dataclass(frozen=True, slots=True)
class Bucket:
    """Requests of one decode step that are gathered together.

    members: int64 [b], their places in the batch.
    text_slots: int64 [b, T], the same in every layer; text_valid: bool [b, T].
    cells: per layer (int64 [b, V_l] absolute rows, bool [b, V_l]); empty if nothing is compressed.
    """

    members: torch.Tensor
    text_slots: torch.Tensor
    text_valid: torch.Tensor
    cells: list[tuple[torch.Tensor, torch.Tensor]]


def pad_rows(parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack int64 [n_i] tensors to [b, max n_i], padded with row 0, and a bool mask of the real."""
    lengths = torch.tensor([part.numel() for part in parts])
    padded = torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
    valid = torch.arange(padded.shape[1])[None, :] < lengths[:, None]
    return padded, valid.to(padded.device)


def text_positions(
    seq_lens: torch.Tensor, gap_start: torch.Tensor, gap_len: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions outside the gaps, all inputs int64 [b]: (positions [b, T], valid bool [b, T])."""
    n_text = seq_lens - gap_len
    j = torch.arange(int(n_text.max()), device=seq_lens.device)[None, :]
    valid = j < n_text[:, None]
    position = j + torch.where(j >= gap_start[:, None], gap_len[:, None], 0)
    return torch.where(valid, position, 0), valid


class CellCache:
    """Padded cell rows of the last batch of compressed requests; they change with its members."""

    def __init__(self) -> None:
        self._records: list[CompressionRecord] = []
        self._cells: list[tuple[torch.Tensor, torch.Tensor]] = []

    def cells(
        self, records: list[CompressionRecord], n_layers: int, rows: int
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per layer, the absolute rows of the packed cells of `records`, padded."""
        same = len(records) == len(self._records) and all(
            a is b for a, b in zip(records, self._records, strict=True)
        )
        if not same:
            for record in records:
                if record.cell_rows is None:
                    record.cell_rows = layer_cell_rows(record, n_layers, rows)
            self._records = list(records)
            self._cells = [
                pad_rows([record.cell_rows[layer] for record in records if record.cell_rows])
                for layer in range(n_layers)
            ]
        return self._cells


def layer_cell_rows(record: CompressionRecord, n_layers: int, rows: int) -> list[torch.Tensor]:
    """Absolute rows of the cells of each layer, L tensors int64 [n_l]."""
    assert record.budgets is not None, "decode of a request whose pass has not run"
    cells = torch.arange(n_layers * record.columns.numel(), device=record.columns.device)
    flat = absolute_rows(cells, record.columns, n_layers, rows)
    return list(flat.split(record.budgets.tolist()))


def make_bucket(
    members: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    req_to_token: torch.Tensor,
    gap_start: torch.Tensor,
    gap_len: torch.Tensor,
    cells: list[tuple[torch.Tensor, torch.Tensor]],
) -> Bucket:
    """Read one step's text slots.

    members: int64 [b]; rows: int64 [b] of `req_to_token` [R, context]; seq_lens: int64 [b], logical
    lengths; gap_start, gap_len: int32 [R] of the compression table.
    """
    positions, valid = text_positions(seq_lens, gap_start[rows].long(), gap_len[rows].long())
    slots = torch.where(valid, req_to_token[rows[:, None], positions].long(), 0)
    return Bucket(members, slots, valid, cells)


def attend(
    bucket: Bucket,
    q: torch.Tensor,
    k_all: torch.Tensor,
    v_all: torch.Tensor,
    layer: int,
    scale: float,
) -> torch.Tensor:
    """Attention of one layer for a bucket.

    q: [b, H_q, D]; k_all, v_all: [L, rows, H_kv, D]. Returns [b, H_q, D].
    """
    n_layers, rows, n_heads, head_dim = k_all.shape
    index, valid = bucket.text_slots + layer * rows, bucket.text_valid
    if bucket.cells:
        cell_rows, cell_valid = bucket.cells[layer]
        index = torch.cat([index, cell_rows], dim=1)
        valid = torch.cat([valid, cell_valid], dim=1)
    size, length = index.shape

    def gather(cache: torch.Tensor) -> torch.Tensor:
        flat = cache.view(n_layers * rows, n_heads * head_dim)
        picked = flat.index_select(0, index.reshape(-1))
        return picked.view(size, length, n_heads, head_dim).transpose(1, 2).to(q.dtype)

    # The query heads of a KV group share its keys: they are the query rows of one call.
    grouped = q.view(size, n_heads, -1, head_dim)
    out = scaled_dot_product_attention(
        grouped, gather(k_all), gather(v_all), attn_mask=valid[:, None, None, :], scale=scale
    )
    return out.reshape(size, -1, head_dim)


class TorchDecoder(PoolReader):
    """Plans a decode step on the host and attends in torch; for the CPU."""

    def __init__(self, pool: KVPlanes, table: CompressionTable) -> None:
        super().__init__(pool, table)
        self._cell_cache = CellCache()
        self._buckets: list[Bucket] = []

    def plan(self, forward_batch: Any, records: Sequence[CompressionRecord | None]) -> None:
        """Sort the requests of a decode step into buckets; records: one a request."""
        rows = forward_batch.req_pool_indices
        compressed = [record for record in records if record is not None]
        cells = self._cell_cache.cells(compressed, self.pool.layer_num, self.pool.rows)
        kept = torch.tensor([record is not None for record in records], device=rows.device)
        self._buckets = [
            make_bucket(
                members,
                rows[members],
                forward_batch.seq_lens[members],
                self.table.req_to_token,
                self.table.gap_start,
                self.table.gap_len,
                bucket_cells,
            )
            for members, bucket_cells in (
                (kept.nonzero().view(-1), cells),
                ((~kept).nonzero().view(-1), []),
            )
            if members.numel()
        ]

    def attend(self, q: torch.Tensor, layer: Any, forward_batch: Any) -> torch.Tensor:
        """Attention of one layer; q: [bs, H_q, D], returns the same shape."""
        out = torch.empty_like(q)
        index = self.pool.plane(layer)
        for bucket in self._buckets:
            out[bucket.members] = attend(
                bucket,
                q[bucket.members],
                self.pool.k_all,
                self.pool.v_all,
                index,
                layer.scaling,
            )
        return out
