# SPDX-License-Identifier: Apache-2.0
"""The compression pass: score, split, select, pack. Once a request, right after its prefill."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from aircache_sglang.policy import Policy
from aircache_sglang.runtime.packing import pack
from aircache_sglang.runtime.record import CompressionRecord
from aircache_sglang.runtime.table import CompressionTable

# The keys of this many bytes are gathered from the pool at once while scoring.
GATHER_BYTES = 64 << 20


class HeadGroup(Protocol):
    """The ranks that hold the heads of one model between them."""

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean over ranks, the same on each."""

    def gather_heads(self, tensor: torch.Tensor) -> torch.Tensor:
        """Local [L, H_local, N] tensors to [L, H_kv, N], the same on each rank."""


def layer_blocks(n_layers: int, bytes_per_layer: int) -> Iterator[slice]:
    """Slices over the layers, each of at most GATHER_BYTES, at least one layer."""
    step = max(1, GATHER_BYTES // max(1, bytes_per_layer))
    for start in range(0, n_layers, step):
        yield slice(start, min(start + step, n_layers))


def score(
    policy: Policy,
    q: torch.Tensor,
    k_all: torch.Tensor,
    instruction_slots: torch.Tensor,
    visual_slots: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Importance float32 [L, H_kv, N_v] of one request.

    q: [L, N_t, H_q, D] stashed queries; k_all: [L, rows, H_kv, D]; slots: int64 [N_t] and [N_v].
    """
    n_layers, _, n_heads, head_dim = k_all.shape
    per_layer = visual_slots.numel() * n_heads * head_dim * k_all.element_size()
    return torch.cat(
        [
            policy.score(
                q[block],
                k_all[block][:, instruction_slots],
                k_all[block][:, visual_slots],
                scale=scale,
            )
            for block in layer_blocks(n_layers, per_layer)
        ]
    )


def compress(
    record: CompressionRecord,
    policy: Policy,
    q: torch.Tensor,
    k_all: torch.Tensor,
    v_all: torch.Tensor,
    req_to_token: torch.Tensor,
    table: CompressionTable,
    group: HeadGroup,
    scale: float,
) -> None:
    """Compress one request on the current stream; no host synchronisation.

    Reads the full prompt from the pool, writes the packed columns and, for a replica, the copies of
    the text between pictures, rewrites the gap of the request's row, and enters it in the table.
    The original slots are only read: they may belong to the radix tree.
    """
    intent, prompt = record.intent, record.intent.prompt
    device = k_all.device
    visual_slots = record.originals[prompt.visual_positions().to(device)]
    lo, hi = prompt.instruction
    row = req_to_token[record.row]
    scores = score(policy, q, k_all, row[lo:hi].long(), visual_slots, scale)
    statistics = group.mean(policy.statistics(scores))
    budgets = policy.budgets(statistics, prompt.n_visual, intent.columns)
    order = policy.order(scores, budgets)
    pack(k_all, v_all, visual_slots, record.columns, order, budgets)
    if intent.n_copies:
        source = record.originals[prompt.between_positions().to(device)]
        k_all[:, record.copies] = k_all[:, source]
        v_all[:, record.copies] = v_all[:, source]
    write_gap(row, prompt.start, prompt.n_visual, record)
    table.set(record.row, prompt.start, prompt.n_visual, budgets)
    record.budgets = budgets.to("cpu", non_blocking=True)
    if intent.config.return_selection:
        record.order = group.gather_heads(order)


def write_gap(row: torch.Tensor, start: int, n_visual: int, record: CompressionRecord) -> None:
    """Lay out the compressed request's row: columns, padding, then the text between pictures."""
    intent, end = record.intent, start + n_visual
    row[start : start + intent.columns] = record.columns
    row[start + intent.columns : end] = 0
    if intent.prompt.n_between:
        between = record.copies
        if not intent.n_copies:
            between = record.originals[intent.prompt.between_positions().to(row.device)]
        row[end : intent.prompt.end] = between.to(row.dtype)
