# SPDX-License-Identifier: Apache-2.0
"""The compression pass: score, split, select, pack. Once a request, right after its prefill.

Two implementations of one function, over the same pool and table: `TorchPass` a request at a time
in torch, `KernelPass` all requests of a prefill batch at once in Triton. Neither waits for the
device, but for a request with `min_visual_mass`, whose columns the host must know. The original
slots are only read: they may belong to the radix tree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from aircache_sglang.config import INSTRUCTION_LIMIT, MASS_LADDER
from aircache_sglang.policy import (
    Policy,
    States,
    columns,
    importance_batched,
    merge_dropped,
    select_padded,
    visual_mass,
)
from aircache_sglang.runtime.choice import policy_of
from aircache_sglang.runtime.packing import cells_of, pack
from aircache_sglang.runtime.record import CompressionRecord
from aircache_sglang.runtime.table import CompressionTable

# TorchPass gathers the keys of this many bytes from the pool at once while scoring.
GATHER_BYTES = 64 << 20


class HeadGroup(Protocol):
    """The ranks that hold the heads of one model between them."""

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean over ranks, the same on each."""

    def first(self, n_local: int) -> int:
        """Which of the model's KV heads is this rank's first, where a rank holds `n_local`."""

    def gather_heads(self, tensor: torch.Tensor) -> torch.Tensor:
        """Local [H_local, N] tensors to [H_kv, N], the same on each rank."""


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One request to compress.

    q: [L, N_t, H_q, D], its instruction's queries.
    q_visual: [L, W, H_q, D], those of its last visual tokens; accumulated: float32
        [L, H_kv, N_v]; only for a policy that looks at them.
    """

    record: CompressionRecord
    q: torch.Tensor
    q_visual: torch.Tensor | None = None
    accumulated: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class PassInputs:
    """What a pass works on.

    k_all, v_all: [L, rows, H_kv, D]; scale: the softmax scale.
    """

    k_all: torch.Tensor
    v_all: torch.Tensor
    table: CompressionTable
    heads: HeadGroup
    scale: float

    def visual_slots(self, record: CompressionRecord) -> torch.Tensor:
        """int64 [N_v], the slots of a request's visual tokens, in order."""
        return record.intent.prompt.visual_of(record.originals)

    def instruction_slots(self, record: CompressionRecord, n_text: int) -> torch.Tensor:
        """int32 [n_text], the slots of the last instruction tokens."""
        length = record.intent.prompt.length
        return self.table.req_to_token[record.row, length - n_text : length]

    def context_slots(self, record: CompressionRecord, n_text: int) -> torch.Tensor:
        """int32 [N_c], the slots of all text before the last n_text instruction tokens."""
        prompt, row = record.intent.prompt, self.table.req_to_token[record.row]
        last = row[prompt.end : prompt.length - n_text]
        return torch.cat([row[: prompt.start], prompt.between_of(row), last])

    def copy_text_between(self, record: CompressionRecord) -> list[torch.Tensor]:
        """Parts of int64 [n_between], the slots of the text between pictures.

        A replica outlives that text: it is copied, and the slots are those of the copies.
        """
        if not record.intent.n_copies:
            return record.intent.prompt.between_parts(record.originals)
        between = record.intent.prompt.between_of(record.originals)
        self.k_all[:, record.copies] = self.k_all[:, between]
        self.v_all[:, record.copies] = self.v_all[:, between]
        return [record.copies]

    def finish(
        self,
        record: CompressionRecord,
        budgets: torch.Tensor,
        selected: torch.Tensor,
        mass: torch.Tensor,
    ) -> None:
        """Lay out the row's gap, then `keep`; arguments on the device, as there."""
        prompt, between = record.intent.prompt, torch.cat(self.copy_text_between(record))
        row, m = self.table.req_to_token[record.row], record.intent.columns
        gap_end = prompt.start + prompt.n_visual
        row[prompt.start : prompt.start + m] = record.columns
        row[prompt.start + m : gap_end] = 0
        row[gap_end : prompt.end] = between
        self.keep(
            record,
            budgets.to("cpu", non_blocking=True),
            selected,
            mass.to("cpu", non_blocking=True),
        )

    def keep(
        self,
        record: CompressionRecord,
        budgets: torch.Tensor,
        selected: torch.Tensor,
        mass: torch.Tensor,
    ) -> None:
        """Keep what will be reported, once the forward's result is there.

        budgets: integers [L] and mass: float64 [] of `visual_mass`, the mean over the ranks, both
        on their way to pinned host memory; selected: integers [H_local, L * m] on the device.
        """
        record.budgets, record.mass = budgets, mass
        if record.intent.config.return_selection:
            record.selected = self.heads.gather_heads(selected)


class CompressionPass(Protocol):
    """Compresses the requests whose prefill has just been launched on the current stream."""

    def __call__(self, jobs: Sequence[Job]) -> None:
        """Fill columns, rows and table, and `budgets`, `mass` (and `selected`) of the records.

        A record without budgets afterwards keeps its picture whole: nothing reaches its
        `min_visual_mass`.
        """


@dataclasses.dataclass(frozen=True, slots=True)
class Judgement:
    """What the layers of one request make of its visual tokens.

    scores: float32 [L, H_kv, N_v] of the policy; statistics: float64 [S, L]; importance: float32
    [L, H_kv, N_v] of the elite window, by which `visual_mass` measures every policy.
    """

    scores: torch.Tensor
    statistics: torch.Tensor
    importance: torch.Tensor


class TorchPass:
    """The pass in torch, for any policy and device."""

    def __init__(self, cells: PassInputs) -> None:
        self.cells = cells

    def __call__(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._compress(job)

    def _compress(self, job: Job) -> None:
        cells, record, intent = self.cells, job.record, job.record.intent
        config, n_visual = intent.config, intent.prompt.n_visual
        policy = policy_of(config)
        visual = cells.visual_slots(record)
        found = judge(policy, job, cells, visual)
        statistics, scores = cells.heads.mean(found.statistics), found.scores
        if config.ablation.selection == "shared":
            scores = shared(scores, cells.heads)
        # (m, retention) of each size that may be chosen
        sizes = [(intent.columns, config.retention)]
        if config.min_visual_mass is not None:
            sizes = [(columns(share, n_visual), share) for share in MASS_LADDER]
        all_budgets = [policy.budgets(statistics, n_visual, m) for m, _ in sizes]
        order = select_padded(scores, all_budgets[0]).roll(-config.ablation.rank, dims=-1)
        n_layers = order.shape[0]
        selections = [
            cells_of(order, budgets, n_layers * m)
            for budgets, (m, _) in zip(all_budgets, sizes, strict=True)
        ]
        masses = cells.heads.mean(
            torch.stack(
                [
                    visual_mass(found.importance, selected, budgets)
                    for selected, budgets in zip(selections, all_budgets, strict=True)
                ]
            )
        )
        choice = 0
        if config.min_visual_mass is not None:
            # The one wait: columns are freed, and rows laid out, by the host.
            reached = [mass >= config.min_visual_mass for mass in masses.tolist()]
            if not any(reached):
                record.settle(0, 1.0)
                return
            choice = reached.index(True)
            record.settle(*sizes[choice])
        budgets, selected = all_budgets[choice], selections[choice]
        source = merged(cells, record, visual, order, budgets) if config.ablation.merge else None
        pack(cells.k_all, cells.v_all, visual, record.columns, selected, budgets, source)
        cells.table.set(record.row, intent.prompt.start, n_visual, budgets)
        cells.finish(record, budgets, selected, masses[choice])


def merged(
    cells: PassInputs,
    record: CompressionRecord,
    visual: torch.Tensor,
    order: torch.Tensor,
    budgets: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of the visual tokens in all layers, [L, N_v, H_kv, D], after `merge_dropped`."""
    knobs, positions = record.intent.config.ablation, None
    if knobs.merge_by == "position":
        positions = record.intent.prompt.visual_positions().to(visual.device)
    layers = [
        merge_dropped(k[visual], v[visual], order[layer], budgets[layer], knobs.merge, positions)
        for layer, (k, v) in enumerate(zip(cells.k_all, cells.v_all, strict=True))
    ]
    return torch.stack([k for k, _ in layers]), torch.stack([v for _, v in layers])


def shared(scores: torch.Tensor, heads: HeadGroup) -> torch.Tensor:
    """The mean over all KV heads in the place of each head's scores, float32 [L, H_kv, N_v]."""
    return heads.mean(scores.mean(dim=1, keepdim=True)).expand_as(scores).contiguous()


def layer_blocks(n_layers: int, bytes_per_layer: int) -> Iterator[slice]:
    """Slices over the layers, each of at most GATHER_BYTES, at least one layer."""
    step = max(1, GATHER_BYTES // max(1, bytes_per_layer))
    for start in range(0, n_layers, step):
        yield slice(start, min(start + step, n_layers))


def judge(policy: Policy, job: Job, cells: PassInputs, visual_slots: torch.Tensor) -> Judgement:
    """Score one request, a block of layers at a time; visual_slots: int64 [N_v]."""
    q, record, k_all = job.q, job.record, cells.k_all
    config = record.intent.config
    n_layers, _, n_heads, head_dim = k_all.shape
    text = cells.instruction_slots(record, q.shape[1]).long()
    context = cells.context_slots(record, q.shape[1]).long() if policy.reads_context else text[:0]
    per_layer = (visual_slots.numel() + context.numel()) * n_heads * head_dim * k_all.element_size()
    scores, statistics, importance = [], [], []
    for block in layer_blocks(n_layers, per_layer):
        states = States(
            q_text=q[block],
            k_text=k_all[block].index_select(1, text),
            k_visual=k_all[block].index_select(1, visual_slots),
            k_context=k_all[block].index_select(1, context) if policy.reads_context else None,
            q_visual=None if job.q_visual is None else job.q_visual[block],
            accumulated=None if job.accumulated is None else job.accumulated[block],
            unified=record.intent.prompt.is_unified,
            scale=cells.scale,
            first_layer=block.start,
            first_head=cells.heads.first(n_heads),
            salt=record.intent.salt,
        )
        score = policy.score(states)
        scores.append(shared(score, cells.heads) if policy.shares_selection else score)
        statistics.append(policy.statistics(states, scores[-1]))
        if config.scores_are_importance():
            importance.append(scores[-1])
        else:
            importance.append(
                importance_batched(
                    states.q_text,
                    states.k_text,
                    states.k_visual,
                    alpha=config.alpha,
                    scale=cells.scale,
                    elite=config.elite,
                    window=INSTRUCTION_LIMIT,
                    unified=states.unified,
                )
            )
    return Judgement(torch.cat(scores), torch.cat(statistics, dim=1), torch.cat(importance))
