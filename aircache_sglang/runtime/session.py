# SPDX-License-Identifier: Apache-2.0
"""Conversations in bounded memory: a new picture is packed beside the older ones, which give way.

A turn that brings pictures extends the replica of the turn before. Its own pictures are prefilled
beside the packed ones, scored by its instruction and packed; the older ones keep what the bound
leaves them, the oldest least, and nothing is scored twice.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from aircache_sglang.policy import columns, largest_remainder
from aircache_sglang.runtime.choice import policy_of
from aircache_sglang.runtime.compress import PassInputs, copy_cells, judge, keep
from aircache_sglang.runtime.decide import Intent
from aircache_sglang.runtime.kv_planes import absolute_rows
from aircache_sglang.runtime.record import Replica, Segment, Selected
from aircache_sglang.runtime.rungs import layers_of, nested
from aircache_sglang.runtime.spans import VisualPrompt
from aircache_sglang.runtime.stash import Job
from aircache_sglang.runtime.table import gap_end
from aircache_sglang.runtime.transfer import to_device


@dataclasses.dataclass(frozen=True, slots=True)
class Chain:
    """What becomes of a replica when a turn with further pictures extends it.

    base: the replica. kept: its segments as they will be, without those that keep nothing, each
        with its place in `base.segments`. gone: visual tokens of those that keep nothing.
    fresh: the layout of the new pictures alone. columns: m of the new pictures.
    """

    base: Replica
    gone: int
    kept: tuple[tuple[int, Segment], ...]
    fresh: VisualPrompt
    columns: int

    @property
    def total(self) -> int:
        """Columns of the whole conversation."""
        return self.columns + sum(segment.columns for _, segment in self.kept)


def chain(base: Replica, intent: Intent) -> Chain:
    """Who keeps how much; intent: of the prompt that goes on behind the replica.

    All older pictures go to one rung before any goes to the next, the oldest first, and at last to
    none; the new ones give way when nothing else is left.
    """
    bound, rungs = intent.config.session_columns, intent.config.session_rungs()
    assert bound is not None, "only bounded conversations are chained"
    prompt, done = intent.prompt, base.intent.prompt
    spans = tuple(span for span in prompt.spans if span[0] >= done.end)
    n_fresh = sum(end - start for start, end in spans)
    fresh = VisualPrompt(spans, prompt.length, n_fresh)
    m = min(bound, columns(rungs[0], n_fresh))
    older = list(base.segments)
    while m + sum(segment.columns for segment in older) > bound:
        holding = [place for place, segment in enumerate(older) if segment.columns]
        if not holding:
            break
        place = min(holding, key=lambda place: older[place].rung)
        older[place] = shrunk(older[place], rungs)
    kept = tuple((place, segment) for place, segment in enumerate(older) if segment.columns)
    gone = sum(segment.n_visual for segment in older if not segment.columns)
    return Chain(base, gone, kept, fresh, m)


def shrunk(segment: Segment, rungs: Sequence[float]) -> Segment:
    """A segment on the next rung with fewer columns, or with none."""
    n_layers = len(segment.budgets)
    for rung in range(segment.rung + 1, len(rungs)):
        m = columns(rungs[rung], segment.n_visual)
        if m < segment.columns:
            wanted = largest_remainder(segment.budgets.double(), n_layers * m, segment.n_visual)
            return Segment(segment.n_visual, rung, m, nested(wanted, segment.budgets.long()))
    return Segment(segment.n_visual, len(rungs), 0, torch.zeros_like(segment.budgets))


def originals_of(base: Replica, intent: Intent, row: Tensor) -> Tensor:
    """int64 [prompt.end], the slots of a prompt's tokens by their positions; 0 for packed ones.

    row: the entries of a request that has been prefilled behind the replica.
    """
    prompt, done = intent.prompt, base.intent.prompt
    originals = row[: prompt.end].to(torch.int64, copy=True)
    # Behind the gap stand the texts between the replica's pictures, in order.
    behind = gap_end(done)
    between = originals[behind : done.end].clone()
    originals[done.start : done.end] = 0
    for (_, left), (right, _) in itertools.pairwise(done.spans):
        originals[left:right], between = between[: right - left], between[right - left :]
    return originals


def pack_chain(inputs: PassInputs, job: Job, chain: Chain) -> None:
    """Score the new pictures and pack them beside the older cells; no host synchronisation.

    job.record: of the whole conversation, with `Chain.total` columns that are nobody else's.
    """
    record, base = job.record, chain.base
    config = record.intent.config
    intent = dataclasses.replace(record.intent, prompt=chain.fresh, columns=chain.columns)
    alone = Job(dataclasses.replace(record, intent=intent), job.q)
    visual = chain.fresh.visual_of(record.originals)
    found = judge(policy_of(config), alone, inputs, visual)
    kept = keep(found, alone.record, inputs.heads, [chain.columns])[0]

    k_all = inputs.k_all
    n_layers, rows = k_all.shape[:2]
    device, n_cells = k_all.device, n_layers * chain.total
    sources, older = older_cells(chain, n_layers)
    source = to_device(sources, device, torch.int64)
    old = to_device(older, device, torch.int64)
    budgets = old + kept.budgets
    layer, j = layers_of(budgets, n_cells)
    is_old = j < old[layer]
    # Clamped where a cell is of the other kind, whose row is not taken.
    cell = (old.cumsum(0) - old)[layer] + torch.minimum(j, old[layer] - 1)
    cell = source.index_select(0, cell.clamp_min(0)) if sources else torch.zeros_like(cell)
    new = (kept.budgets.cumsum(0) - kept.budgets)[layer] + (j - old[layer]).clamp_min(0)
    ordinal = kept.selected.index_select(1, new.clamp_max(kept.selected.shape[1] - 1))
    packed = absolute_rows(cell, base.slots[: base.intent.columns], n_layers, rows)
    fresh = layer * rows + visual[ordinal]  # [H_kv, C]
    origin = torch.where(is_old, packed, fresh).transpose(0, 1)
    target = absolute_rows(torch.arange(n_cells, device=device), record.columns, n_layers, rows)
    caches = (k_all, inputs.v_all)
    copy_cells(caches, caches, origin, target)
    inputs.enter(record, budgets)

    selected = None
    if config.return_selection:
        assert base.selected is not None, "a replica without its selection was extended"
        theirs = base.selected.on_device.long().index_select(1, cell)
        mine = inputs.heads.gather_heads(ordinal) + base.intent.prompt.n_visual
        selected = Selected.of(torch.where(is_old, theirs, mine))
    on_host = kept.budgets.to("cpu", non_blocking=True)
    nothing = Segment(
        chain.gone, len(config.session_rungs()), 0, torch.zeros(n_layers, dtype=torch.int64)
    )
    record.segments = (
        *([nothing] if chain.gone else []),
        *(segment for _, segment in chain.kept),
        Segment(chain.fresh.n_visual, 0, chain.columns, on_host),
    )
    record.packed(
        budgets.to("cpu", non_blocking=True), kept.mass.to("cpu", non_blocking=True), selected
    )


def older_cells(chain: Chain, n_layers: int) -> tuple[list[int], list[int]]:
    """The cells of a replica that stay, by their numbers in it, layer after layer; how many of each
    layer."""
    segments = [segment.budgets.tolist() for segment in chain.base.segments]
    keeps = {place: segment.budgets.tolist() for place, segment in chain.kept}
    cells: list[int] = []
    counts = []
    first = 0
    for layer in range(n_layers):
        before = len(cells)
        for place, budgets in enumerate(segments):
            if place in keeps:
                cells += range(first, first + keeps[place][layer])
            first += budgets[layer]
        counts.append(len(cells) - before)
    return cells, counts
