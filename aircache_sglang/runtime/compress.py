# SPDX-License-Identifier: Apache-2.0
"""The compression pass: score, split, select, pack. Once a request, right after its prefill.

Two implementations of one function, over the same pool and table: `TorchPass` a request at a time
in torch, `KernelPass` all requests of a prefill batch at once in Triton. Neither waits for the
device. The original slots are only read: they may belong to the radix tree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from aircache_sglang.config import AirCacheConfig
from aircache_sglang.policy import Policy, get_policy
from aircache_sglang.runtime.packing import cells_of, pack
from aircache_sglang.runtime.record import CompressionRecord
from aircache_sglang.runtime.table import CompressionTable

# TorchPass gathers the keys of this many bytes from the pool at once while scoring.
GATHER_BYTES = 64 << 20


class HeadGroup(Protocol):
    """The ranks that hold the heads of one model between them."""

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean over ranks, the same on each."""

    def gather_heads(self, tensor: torch.Tensor) -> torch.Tensor:
        """Local [H_local, N] tensors to [H_kv, N], the same on each rank."""


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One request to compress; q: [L, N_t, H_q, D], its instruction's queries."""

    record: CompressionRecord
    q: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Cells:
    """What a pass works on.

    k_all, v_all: [L, rows, H_kv, D]; req_to_token: int32 [R, context]; scale: the softmax scale.
    """

    k_all: torch.Tensor
    v_all: torch.Tensor
    req_to_token: torch.Tensor
    table: CompressionTable
    heads: HeadGroup
    scale: float

    def visual_slots(self, record: CompressionRecord) -> torch.Tensor:
        """int64 [N_v], the slots of a request's visual tokens, in order."""
        positions = record.intent.prompt.visual_positions()
        return record.originals[positions.to(record.originals.device)]

    def instruction_slots(self, record: CompressionRecord, n_text: int) -> torch.Tensor:
        """int32 [n_text], the slots of the last instruction tokens."""
        length = record.intent.prompt.length
        return self.req_to_token[record.row, length - n_text : length]

    def finish(
        self, record: CompressionRecord, budgets: torch.Tensor, selected: torch.Tensor
    ) -> None:
        """Lay out the row's gap, keep what will be reported; copy what a replica needs.

        budgets: integers [L]; selected: integers [H_local, L * m], on the device.
        """
        prompt = record.intent.prompt
        between = record.originals[prompt.between_positions().to(record.originals.device)]
        if record.intent.n_copies:
            self.k_all[:, record.copies] = self.k_all[:, between]
            self.v_all[:, record.copies] = self.v_all[:, between]
            between = record.copies
        row, m = self.req_to_token[record.row], record.intent.columns
        gap_end = prompt.start + prompt.n_visual
        row[prompt.start : prompt.start + m] = record.columns
        row[prompt.start + m : gap_end] = 0
        row[gap_end : prompt.end] = between.to(row.dtype)
        record.budgets = budgets.to("cpu", non_blocking=True)
        if record.intent.config.return_selection:
            record.selected = self.heads.gather_heads(selected)


class CompressionPass(Protocol):
    """Compresses the requests whose prefill has just been launched on the current stream."""

    def __call__(self, jobs: Sequence[Job]) -> None:
        """Fill columns, rows and table, and `budgets` (and `selected`) of the records."""


def policy_of(name: str, config: AirCacheConfig) -> Policy:
    """The policy object that a request's configuration asks for."""
    window, alpha = config.scoring_window()
    return get_policy(name, alpha=alpha, elite=config.elite, budget=config.budget, window=window)


class TorchPass:
    """The pass in torch, for any policy and device."""

    def __init__(self, cells: Cells, policy: str) -> None:
        self.cells = cells
        self.policy = policy

    def __call__(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._compress(job.record, job.q)

    def _compress(self, record: CompressionRecord, q: torch.Tensor) -> None:
        cells, intent = self.cells, record.intent
        policy = policy_of(self.policy, intent.config)
        visual = cells.visual_slots(record)
        text = cells.instruction_slots(record, q.shape[1]).long()
        scores = score(policy, q, cells.k_all, text, visual, cells.scale)
        statistics = cells.heads.mean(policy.statistics(scores))
        budgets = policy.budgets(statistics, intent.prompt.n_visual, intent.columns)
        order = policy.order(scores, budgets)
        selected = cells_of(order, budgets, order.shape[0] * intent.columns)
        pack(cells.k_all, cells.v_all, visual, record.columns, selected, budgets)
        cells.table.set(record.row, intent.prompt.start, intent.prompt.n_visual, budgets)
        cells.finish(record, budgets, selected)


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
                k_all[block].index_select(1, instruction_slots),
                k_all[block].index_select(1, visual_slots),
                scale=scale,
            )
            for block in layer_blocks(n_layers, per_layer)
        ]
    )
