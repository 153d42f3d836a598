# SPDX-License-Identifier: Apache-2.0
"""The compression pass: score, split, select, pack. Once a request, right after its prefill.

Two implementations of one function, over the same pool and table: `TorchPass` a request at a time
in torch, `KernelPass` all requests of a prefill batch at once in Triton. Neither waits for the
device, but for a request with `min_visual_mass`, whose columns the host must know. The original
slots are only read: they may belong to the radix tree.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from aircache_sglang.config import INSTRUCTION_LIMIT, MASS_LADDER
from aircache_sglang.policy import (
    Policy,
    States,
    columns,
    global_counts,
    importance_batched,
    merge_dropped,
    select_padded,
    visual_mass,
)
from aircache_sglang.runtime.choice import policy_of
from aircache_sglang.runtime.kv_planes import absolute_rows
from aircache_sglang.runtime.record import CompressionRecord, Selected
from aircache_sglang.runtime.rungs import Ladder, cells_of, layers_of, make_ladder
from aircache_sglang.runtime.stash import Job
from aircache_sglang.runtime.table import CompressionTable, gap_entries

# TorchPass gathers the keys of this many bytes from the pool at once while scoring.
GATHER_BYTES = 64 << 20


class HeadGroup(Protocol):
    """The ranks that hold the heads of one model between them, as many each."""

    ranks: int

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean over ranks, the same on each."""

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, the same on each."""

    def first(self, n_local: int) -> int:
        """Which of the model's KV heads is this rank's first, where a rank holds `n_local`."""

    def gather_heads(self, tensor: torch.Tensor) -> torch.Tensor:
        """Local [H_local, N] tensors to [H_kv, N], the same on each rank."""


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

    def copy_text(self, record: CompressionRecord) -> list[torch.Tensor]:
        """Parts of int64 [n_between], the slots of the text between pictures.

        A replica outlives the text in its region: it is copied, and the slots are the copies'.
        """
        intent, prompt = record.intent, record.intent.prompt
        if not intent.n_copies:
            return prompt.between_parts(record.originals)
        head = record.originals[intent.replica_start : prompt.start]
        source = torch.cat([head, *prompt.between_parts(record.originals)])
        self.k_all[:, record.copies] = self.k_all[:, source]
        self.v_all[:, record.copies] = self.v_all[:, source]
        return [record.copies[intent.n_head_copies :]]

    def enter_head(self, record: CompressionRecord) -> None:
        """Let the row name the copies of the text in front of its gap."""
        if record.intent.n_head_copies:
            row, intent = self.table.req_to_token[record.row], record.intent
            row[intent.replica_start : intent.prompt.start] = record.head_copies

    def enter(self, record: CompressionRecord, budgets: torch.Tensor) -> None:
        """Lay out the row's gap and enter it in the table; budgets: int64 [L] on the device."""
        prompt, between = record.intent.prompt, torch.cat(self.copy_text(record))
        self.enter_head(record)
        row = self.table.req_to_token[record.row]
        row[prompt.start : prompt.end] = gap_entries(prompt, record.columns, between)
        self.table.set(record.row, prompt.start, prompt.n_visual, budgets)

    def finish(
        self,
        record: CompressionRecord,
        budgets: torch.Tensor,
        mass: torch.Tensor,
        selected: torch.Tensor,
    ) -> None:
        """Note what will be reported, once the forward's result is there.

        budgets: integers [L] and mass: float64 [] of `visual_mass`, the mean over the ranks, both
        on their way to pinned host memory; selected: integers [H_local, L * m] on the device.
        """
        wanted = record.intent.config.return_selection
        chosen = Selected.of(self.heads.gather_heads(selected)) if wanted else None
        record.packed(budgets, mass, chosen)


class CompressionPass(Protocol):
    """Compresses the requests whose prefill has just been launched on the current stream."""

    def __call__(self, jobs: Sequence[Job]) -> None:
        """Fill columns, rows and table, and `budgets`, `mass` (and `selected`) of the records.

        A record without budgets afterwards keeps its picture whole: nothing reaches its
        `min_visual_mass`.
        """

    def rank(self, jobs: Sequence[Job]) -> None:
        """Score what may be packed later, and set `ladder` of the records; the pool stays."""


class TorchPass:
    """The pass in torch, for any policy and device."""

    def __init__(self, inputs: PassInputs) -> None:
        self.inputs = inputs

    def __call__(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._compress(job)

    def rank(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            record = job.record
            found = judge(
                policy_of(record.intent.config),
                *(job, self.inputs, self.inputs.visual_slots(record)),
            )
            record.ladder = ladder(found, record, self.inputs.heads)

    def _compress(self, job: Job) -> None:
        inputs, record, config = self.inputs, job.record, job.record.intent.config
        visual = inputs.visual_slots(record)
        found = judge(policy_of(config), job, inputs, visual)
        if config.min_visual_mass is None:
            kept = keep(found, record, inputs.heads, [record.intent.columns])[0]
        else:
            sizes = [columns(share, record.intent.prompt.n_visual) for share in MASS_LADDER]
            choices = keep(found, record, inputs.heads, sizes)
            # The one wait: columns are freed, and rows laid out, by the host. Every rank reads the
            # same masses, and so settles for the same size.
            masses = torch.stack([choice.mass for choice in choices]).tolist()
            reached = [mass >= config.min_visual_mass for mass in masses]
            if not any(reached):
                record.settle(0, 1.0)
                return
            rung = reached.index(True)
            kept = choices[rung]
            record.settle(sizes[rung], MASS_LADDER[rung])
        source = merged(inputs, record, visual, kept) if config.ablation.merge else None
        k_all, v_all = inputs.k_all, inputs.v_all
        pack(k_all, v_all, visual, record.columns, kept.selected, kept.budgets, source)
        inputs.enter(record, kept.budgets)
        budgets, mass = (found.to("cpu", non_blocking=True) for found in (kept.budgets, kept.mass))
        inputs.finish(record, budgets, mass, kept.selected)


@dataclasses.dataclass(frozen=True, slots=True)
class Judgement:
    """What the layers of one request make of its visual tokens.

    scores: float32 [L, H_kv, N_v] of the policy; statistics: float64 [S, L]; importance: float32
    [L, H_kv, N_v] of the elite window, by which `visual_mass` measures every policy.
    """

    scores: torch.Tensor
    statistics: torch.Tensor
    importance: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
    """The tokens that stay.

    order: int64 [L, H_kv, N_v], ordinals, the kept ones first; budgets: int64 [L];
    selected: int64 [H_kv, L * m] of `cells_of`; mass: float64 [] of `visual_mass`, over all ranks.
    """

    order: torch.Tensor
    budgets: torch.Tensor
    selected: torch.Tensor
    mass: torch.Tensor


def keep(
    found: Judgement, record: CompressionRecord, heads: HeadGroup, sizes: Sequence[int]
) -> list[Kept]:
    """Split and select for each number of columns in `sizes`, without waiting for the device."""
    order, budgets_of = ranked(found, record, heads)
    budgets = [budgets_of(m) for m in sizes]
    selected = [cells_of(order, n, len(n) * m) for n, m in zip(budgets, sizes, strict=True)]
    masses = [
        visual_mass(found.importance, chosen, n)
        for chosen, n in zip(selected, budgets, strict=True)
    ]
    return [
        Kept(order, *choice)
        for choice in zip(budgets, selected, heads.mean(torch.stack(masses)), strict=True)
    ]


def ladder(found: Judgement, record: CompressionRecord, heads: HeadGroup) -> Ladder:
    """What packing a request later will need."""
    order, budgets_of = ranked(found, record, heads)
    return make_ladder(record.intent.rungs, order, budgets_of, found.importance, heads.mean)


def ranked(
    found: Judgement, record: CompressionRecord, heads: HeadGroup
) -> tuple[torch.Tensor, Callable[[int], torch.Tensor]]:
    """The tokens by rank, int64 [L, H_kv, N_v], and the budgets, int64 [L], of m columns."""
    config, n_visual = record.intent.config, record.intent.prompt.n_visual
    policy = policy_of(config)
    statistics = found.statistics if policy.global_budgets else heads.mean(found.statistics)
    scores = shared(found.scores, heads) if config.ablation.selection == "shared" else found.scores

    @functools.cache
    def budgets_of(m: int) -> torch.Tensor:
        if not policy.global_budgets:
            return policy.budgets(statistics, n_visual, m)
        n_layers, n_kv, _ = found.scores.shape
        cells = n_layers * n_kv * heads.ranks * m
        counts = global_counts(found.scores, cells, heads.total)
        return policy.budgets(counts[None], n_visual, m)

    order = select_padded(scores, budgets_of(record.intent.columns))
    return order.roll(-config.ablation.rank, dims=-1), budgets_of


def merged(
    inputs: PassInputs, record: CompressionRecord, visual: torch.Tensor, kept: Kept
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of the visual tokens in all layers, [L, N_v, H_kv, D], after `merge_dropped`."""
    knobs, positions = record.intent.config.ablation, None
    if knobs.merge_by == "position":
        positions = record.intent.prompt.visual_positions().to(visual.device)
    layers = [
        merge_dropped(k[visual], v[visual], order, budget, knobs.merge, positions)
        for k, v, order, budget in zip(
            inputs.k_all, inputs.v_all, kept.order, kept.budgets, strict=True
        )
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


def judge(policy: Policy, job: Job, inputs: PassInputs, visual_slots: torch.Tensor) -> Judgement:
    """Score one request, a block of layers at a time; visual_slots: int64 [N_v]."""
    q, record, k_all, v_all = job.q, job.record, inputs.k_all, inputs.v_all
    config = record.intent.config
    n_layers, _, n_heads, head_dim = k_all.shape
    text = inputs.instruction_slots(record, q.shape[1]).long()
    context = inputs.context_slots(record, q.shape[1]).long() if policy.reads_context else text[:0]
    n_gathered = visual_slots.numel() * (1 + policy.reads_values) + context.numel()
    per_layer = n_gathered * n_heads * head_dim * k_all.element_size()
    scores, statistics, importance = [], [], []
    for block in layer_blocks(n_layers, per_layer):
        states = States(
            q_text=q[block],
            k_text=k_all[block].index_select(1, text),
            k_visual=k_all[block].index_select(1, visual_slots),
            k_context=k_all[block].index_select(1, context) if policy.reads_context else None,
            v_visual=v_all[block].index_select(1, visual_slots) if policy.reads_values else None,
            q_visual=None if job.q_visual is None else job.q_visual[block],
            accumulated=None if job.accumulated is None else job.accumulated[block],
            unified=record.intent.prompt.is_unified,
            scale=inputs.scale,
            first_layer=block.start,
            first_head=inputs.heads.first(n_heads),
            salt=record.intent.salt,
        )
        score = policy.score(states)
        scores.append(shared(score, inputs.heads) if policy.shares_selection else score)
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
                    scale=inputs.scale,
                    elite=config.elite,
                    window=INSTRUCTION_LIMIT,
                    unified=states.unified,
                )
            )
    return Judgement(torch.cat(scores), torch.cat(statistics, dim=1), torch.cat(importance))


def pack(
    k_all: torch.Tensor,
    v_all: torch.Tensor,
    visual_slots: torch.Tensor,
    columns: torch.Tensor,
    selected: torch.Tensor,
    budgets: torch.Tensor,
    source: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Copy the kept cells of one request into its columns, without a host synchronisation.

    k_all, v_all: [L, rows, H_kv, D].
    visual_slots: int64 [N_v], in the order of the visual tokens; columns: int64 [m], disjoint from
        visual_slots, so that no survivor is overwritten.
    selected: int64 [H_kv, L * m] of `cells_of`; budgets: int64 [L], sum L * m.
    source: K and V to copy in place of the visual slots' own, [L, N_v, H_kv, D] each.
    """
    n_layers, rows = k_all.shape[:2]
    n_source, source_slots = rows, visual_slots
    if source is not None:
        n_source = source[0].shape[1]
        source_slots = torch.arange(n_source, device=k_all.device)
    n_cells = n_layers * columns.numel()
    cells, layer = torch.arange(n_cells, device=k_all.device), layers_of(budgets, n_cells)[0]
    origin = layer[:, None] * n_source + source_slots[selected.transpose(0, 1)]
    copy_cells(
        (k_all, v_all),
        source or (k_all, v_all),
        origin,
        absolute_rows(cells, columns, n_layers, rows),
    )


def copy_cells(
    caches: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    origin: torch.Tensor,
    target: torch.Tensor,
) -> None:
    """Copy cells, each KV head's from a row of its own, without a host synchronisation.

    caches, sources: [L, rows, H_kv, D] each, the latter with rows of their own number.
    origin: int64 [C, H_kv] absolute rows of the sources; target: int64 [C], of the caches.
    """
    n_heads, head_dim = caches[0].shape[2:]
    head = torch.arange(n_heads, device=origin.device)
    origin = (origin * n_heads + head).reshape(-1)
    for cache, original in zip(caches, sources, strict=True):
        if cache.itemsize == 1:
            # torch copies no float8 by index on a CPU
            cache, original = cache.view(torch.uint8), original.view(torch.uint8)
        # index_select copies whole rows; indexing with tensors goes element by element on a CPU.
        picked = original.view(-1, head_dim).index_select(0, origin)
        flat = cache.view(-1, n_heads * head_dim)
        flat.index_copy_(0, target, picked.view(-1, n_heads * head_dim))
