# SPDX-License-Identifier: Apache-2.0
"""The compression pass in Triton: all requests of a prefill batch in one sequence of launches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from aircache_kernels import importance_statistics, layer_budgets, pack, score, select
from aircache_sglang.config import INSTRUCTION_LIMIT, Ablation, AirCacheConfig
from aircache_sglang.policy import visual_mass
from aircache_sglang.runtime.compress import Cells, Job, TorchPass
from aircache_sglang.runtime.transfer import prefix_sums, to_device

# window, alpha, elite, budget
Group = tuple[str, float, str, str]


def in_kernels(config: AirCacheConfig) -> bool:
    """Whether the kernels have all that a request asks for."""
    return (
        config.policy == "aircache"
        and config.budget != "pyramid"
        and not config.observed()[1]
        and config.min_visual_mass is None
        and config.ablation == Ablation()
    )


class KernelPass:
    """The pass of the `aircache` policy by `aircache_kernels`, FlashInfer's ragged layouts.

    Requests that differ in window, alpha, elite or budget mode are compressed in groups, one
    sequence of launches each; in practice there is one group. What the kernels do not have, that
    is the other policies and the knobs for experiments, goes to `TorchPass`.
    """

    def __init__(self, cells: Cells) -> None:
        self.cells = cells
        self.torch_pass = TorchPass(cells)

    def __call__(self, jobs: Sequence[Job]) -> None:
        groups: dict[Group, list[Job]] = {}
        for job in jobs:
            config = job.record.intent.config
            if in_kernels(config):
                key = (config.window, config.alpha, config.elite, config.budget)
                groups.setdefault(key, []).append(job)
            else:
                self.torch_pass([job])
        for members in groups.values():
            self._compress(members)

    def _compress(self, jobs: list[Job]) -> None:
        cells, device = self.cells, self.cells.k_all.device
        records = [job.record for job in jobs]
        config = records[0].intent.config
        window, alpha = config.scoring_window()
        kv_lens = [record.intent.prompt.n_visual for record in records]
        columns = [record.intent.columns for record in records]
        kv_indptr = prefix_sums(kv_lens, device)
        column_indptr = prefix_sums(columns, device)
        kv_indices = torch.cat([cells.visual_slots(record) for record in records])

        def scored(window: int, alpha: float) -> torch.Tensor:
            """Importance float32 [L, H_kv, sum N_v] by the last `window` instruction tokens."""
            queries = [job.q[:, -window:] for job in jobs]
            qo_lens = [q.shape[1] for q in queries]
            slots = [cells.instruction_slots(r, n) for r, n in zip(records, qo_lens, strict=True)]
            return score(
                torch.cat(queries, dim=1),
                prefix_sums(qo_lens, device),
                cells.k_all,
                torch.cat(slots),
                kv_indptr,
                kv_indices,
                max_qo_len=max(qo_lens),
                max_kv_len=max(kv_lens),
                sm_scale=cells.scale,
                alpha=alpha,
                elite=config.elite,
            )

        importance = scored(window, alpha)
        elite_importance = importance
        if not config.scores_are_importance():
            elite_importance = scored(INSTRUCTION_LIMIT, config.alpha)
        statistics = importance_statistics(importance, kv_indptr, max_kv_len=max(kv_lens))
        rows = to_device([record.row for record in records], device, torch.int64)
        budgets, cell_offset = layer_budgets(
            cells.heads.mean(statistics),
            kv_indptr,
            to_device(columns, device, torch.int32),
            budget=config.budget,
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
        bounds = list(itertools.pairwise(itertools.accumulate(columns, initial=0)))
        kept = [selected[:, n_layers * first : n_layers * last] for first, last in bounds]
        masses = cells.heads.mean(
            torch.stack(
                [
                    visual_mass(part, chosen, layers)
                    for part, chosen, layers in zip(
                        elite_importance.split(kv_lens, dim=2), kept, budgets, strict=True
                    )
                ]
            )
        )
        for record, layers, chosen, mass in zip(records, budgets, kept, masses, strict=True):
            cells.finish(record, layers, chosen, mass)
