# SPDX-License-Identifier: Apache-2.0
"""Attention of several new tokens of a request whose picture is packed, in torch.

They extend a compressed replica, or are drafts. They see the text before them and every packed
cell, which lies before them all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from aircache_sglang.runtime.decode import layer_cell_rows
from aircache_sglang.runtime.drafts import Drafts
from aircache_sglang.runtime.kv_planes import KVPlanes
from aircache_sglang.runtime.record import CompressionRecord
from aircache_sglang.runtime.table import CompressionTable, PoolReader, text_positions


@dataclasses.dataclass(frozen=True, slots=True)
class ExtendJob:
    """One request of a prefill batch that extends a replica.

    start, end: the positions computed now. source: their rows in the batch.
    """

    record: CompressionRecord
    start: int
    end: int
    source: slice


@dataclasses.dataclass(frozen=True, slots=True)
class ExtendPlan:
    """The slots that one request reads.

    source: its rows in the batch, n of them. text_slots: int64 [T], new tokens included.
    visible: bool [n, T]. cells: per layer int64 [n_l] absolute rows.
    """

    source: slice
    text_slots: torch.Tensor
    visible: torch.Tensor
    cells: list[torch.Tensor]


def plan_extend(job: ExtendJob, row: torch.Tensor, n_layers: int, pool_rows: int) -> ExtendPlan:
    """Read one request's slots; row: its entries in `req_to_token`."""
    text = text_positions(job.record.intent.prompt, job.end, row.device)
    new = torch.arange(job.start, job.end, device=row.device)
    return ExtendPlan(
        source=job.source,
        text_slots=row[text].long(),
        visible=text[None, :] <= new[:, None],
        cells=cells_of(job.record, n_layers, pool_rows),
    )


def plan_drafts(
    drafts: Drafts, b: int, req_to_token: torch.Tensor, n_layers: int, pool_rows: int
) -> ExtendPlan:
    """Read the slots of request b of a verify step."""
    record, tree, length = drafts.records[b], drafts.tree[b], int(drafts.seq_lens[b])
    if record is None:
        text = torch.arange(length, device=tree.device)
        cells = [text[:0]] * n_layers
    else:
        text = text_positions(record.intent.prompt, length, tree.device)
        cells = cells_of(record, n_layers, pool_rows)
    n = len(tree)
    return ExtendPlan(
        source=slice(b * n, (b + 1) * n),
        text_slots=req_to_token[drafts.rows[b], text].long(),
        visible=torch.cat([tree.new_ones(n, len(text) - n), tree], dim=1),
        cells=cells,
    )


def cells_of(record: CompressionRecord, n_layers: int, pool_rows: int) -> list[torch.Tensor]:
    """Absolute rows of the packed cells of a request, one int64 [n_l] a layer."""
    if record.cell_rows is None:
        record.cell_rows = layer_cell_rows(record, n_layers, pool_rows)
    return record.cell_rows


def attend_extend(
    plan: ExtendPlan,
    q: torch.Tensor,
    k_all: torch.Tensor,
    v_all: torch.Tensor,
    layer: int,
    scale: float,
) -> torch.Tensor:
    """Attention of one layer; q: [n, H_q, D]; k_all, v_all: [L, rows, H_kv, D]. [n, H_q, D]."""
    n_layers, rows, n_heads, head_dim = k_all.shape
    cells = plan.cells[layer]
    index = torch.cat([plan.text_slots + layer * rows, cells])
    mask = torch.cat([plan.visible, plan.visible.new_ones(len(q), len(cells))], dim=1)

    def gather(cache: torch.Tensor) -> torch.Tensor:
        return cache.view(n_layers * rows, n_heads, head_dim)[index].transpose(0, 1).to(q.dtype)

    out = scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        gather(k_all)[None],
        gather(v_all)[None],
        attn_mask=mask,
        scale=scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


class TorchExtender(PoolReader):
    """Plans on the host and attends in torch, a request at a time."""

    def __init__(self, pool: KVPlanes, table: CompressionTable) -> None:
        super().__init__(pool, table)
        self._plans: list[ExtendPlan] = []

    def plan(self, jobs: Sequence[ExtendJob]) -> None:
        """Read the slots of the requests of one prefill."""
        self._plans = [
            plan_extend(
                job, self.table.req_to_token[job.record.row], self.pool.layer_num, self.pool.rows
            )
            for job in jobs
        ]

    def plan_drafts(self, drafts: Drafts) -> None:
        """Read the slots of all requests of one verify step."""
        self._plans = [
            plan_drafts(drafts, b, self.table.req_to_token, self.pool.layer_num, self.pool.rows)
            for b in range(len(drafts.records))
        ]

    def attend(self, q: torch.Tensor, out: torch.Tensor, layer: Any) -> None:
        """Overwrite the planned rows of one layer's output; q, out: [tokens, H_q, D]."""
        index = self.pool.plane(layer)
        for plan in self._plans:
            out[plan.source] = attend_extend(
                plan, q[plan.source], self.pool.k_all, self.pool.v_all, index, layer.scaling
            )
