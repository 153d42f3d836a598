# SPDX-License-Identifier: Apache-2.0
"""Prefill attention of requests that extend a compressed replica, in torch.

The new tokens see the text before them and every packed cell, which lies before them all.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.nn.functional import scaled_dot_product_attention

from aircache_sglang.runtime.decode import layer_cell_rows
from aircache_sglang.runtime.record import CompressionRecord


@dataclasses.dataclass(frozen=True, slots=True)
class PackedExtend:
    """One request of a prefill batch.

    source: its rows in the batch, n of them. text_slots: int64 [T], new tokens included.
    visible: bool [n, T]. cells: per layer int64 [n_l] absolute rows.
    """

    source: slice
    text_slots: torch.Tensor
    visible: torch.Tensor
    cells: list[torch.Tensor]


def plan_extend(
    record: CompressionRecord,
    row: torch.Tensor,
    prefix_len: int,
    seq_len: int,
    first_row: int,
    n_layers: int,
    pool_rows: int,
) -> PackedExtend:
    """Read one request's slots; row: its entries in `req_to_token`; lengths are logical."""
    prompt = record.intent.prompt
    assert prefix_len >= prompt.length, "a replica is extended behind its instruction"
    device = row.device
    text = torch.cat(
        [
            torch.arange(prompt.start, device=device),
            torch.arange(prompt.start + prompt.n_visual, seq_len, device=device),
        ]
    )
    new = torch.arange(prefix_len, seq_len, device=device)
    if record.cell_rows is None:
        record.cell_rows = layer_cell_rows(record, n_layers, pool_rows)
    return PackedExtend(
        source=slice(first_row, first_row + seq_len - prefix_len),
        text_slots=row[text].long(),
        visible=text[None, :] <= new[:, None],
        cells=record.cell_rows,
    )


def attend_extend(
    plan: PackedExtend,
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
