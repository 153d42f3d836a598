# SPDX-License-Identifier: Apache-2.0
"""The compression pass in Triton: all requests of a prefill batch in one sequence of launches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from aircache_kernels import importance_statistics, layer_budgets, pack, score, select
from aircache_sglang.runtime.compress import Cells, Job
from aircache_sglang.runtime.transfer import prefix_sums, to_device


class KernelPass:
    """The pass of the `aircache` policy by `aircache_kernels`, FlashInfer's ragged layouts.

    Requests that differ in window, alpha, elite or budget mode are compressed in groups, one
    sequence of launches each; in practice there is one group.
    """

    def __init__(self, cells: Cells) -> None:
        self.cells = cells

    def __call__(self, jobs: Sequence[Job]) -> None:
        groups: dict[tuple[int, float, str, str], list[Job]] = {}
        for job in jobs:
            config = job.record.intent.config
            key = (*config.scoring_window(), config.elite, config.budget)
            groups.setdefault(key, []).append(job)
        for (window, alpha, elite, budget), members in groups.items():
            self._compress(members, window, alpha, elite, budget)

    def _compress(
        self, jobs: list[Job], window: int, alpha: float, elite: str, budget: str
    ) -> None:
        cells, device = self.cells, self.cells.k_all.device
        records = [job.record for job in jobs]
        queries = [job.q[:, -window:] for job in jobs]
        qo_lens = [q.shape[1] for q in queries]
        kv_lens = [record.intent.prompt.n_visual for record in records]
        columns = [record.intent.columns for record in records]
        qo_indptr = prefix_sums(qo_lens, device)
        kv_indptr = prefix_sums(kv_lens, device)
        column_indptr = prefix_sums(columns, device)
        kv_indices = torch.cat([cells.visual_slots(record) for record in records])
        text_indices = torch.cat(
            [cells.instruction_slots(record, n) for record, n in zip(records, qo_lens, strict=True)]
        )
        importance = score(
            torch.cat(queries, dim=1),
            qo_indptr,
            cells.k_all,
            text_indices,
            kv_indptr,
            kv_indices,
            max_qo_len=max(qo_lens),
            max_kv_len=max(kv_lens),
            sm_scale=cells.scale,
            alpha=alpha,
            elite=elite,
        )
        statistics = importance_statistics(importance, kv_indptr, max_kv_len=max(kv_lens))
        rows = to_device([record.row for record in records], device, torch.int64)
        budgets, cell_offset = layer_budgets(
            cells.heads.mean(statistics),
            kv_indptr,
            to_device(columns, device, torch.int32),
            budget=budget,
            cell_offset=cells.table.cell_offset,
            req_pool_indices=rows,
        )
        selected = select(
            importance,
            kv_indptr,
            cell_offset,
            column_indptr,
            total_columns=sum(columns),
            max_kv_len=max(kv_lens),
        )
        pack(
            cells.k_all,
            cells.v_all,
            selected,
            kv_indptr,
            kv_indices,
            cell_offset,
            column_indptr,
            torch.cat([record.columns for record in records]),
            max_columns=max(columns),
        )
        starts = [record.intent.prompt.start for record in records]
        cells.table.enter(rows, to_device(starts, device, torch.int32), kv_indptr.diff())
        n_layers = cells.k_all.shape[0]
        bounds = itertools.pairwise(itertools.accumulate(columns, initial=0))
        for i, (record, (first, last)) in enumerate(zip(records, bounds, strict=True)):
            cells.finish(record, budgets[i], selected[:, n_layers * first : n_layers * last])
