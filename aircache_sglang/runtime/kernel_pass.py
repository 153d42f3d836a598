# SPDX-License-Identifier: Apache-2.0
"""The compression pass in Triton: all requests of a prefill batch in one sequence of launches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from aircache_kernels import (
    importance_statistics,
    lay_out_rows,
    layer_budgets,
    pack,
    score,
    select,
)
from aircache_kernels.validation import MAX_VISUAL
from aircache_sglang.config import INSTRUCTION_LIMIT, Ablation
from aircache_sglang.runtime.compress import Job, PassInputs, TorchPass
from aircache_sglang.runtime.record import Intent
from aircache_sglang.runtime.stash import joined
from aircache_sglang.runtime.transfer import indptr, vectors_to_device

# window, alpha, elite, budget
Group = tuple[str, float, str, str]


def in_kernels(intent: Intent) -> bool:
    """Whether the kernels have all that a request asks for."""
    config = intent.config
    return (
        intent.prompt.n_visual <= MAX_VISUAL
        and config.policy == "aircache"
        and config.budget != "pyramid"
        and not config.observed()[1]
        and config.min_visual_mass is None
        and config.ablation == Ablation()
    )


class KernelPass:
    """The pass of the `aircache` policy by `aircache_kernels`, FlashInfer's ragged layouts.

    Requests that differ in window, alpha, elite or budget mode are compressed in groups, one
    sequence of launches each; in practice there is one group. What the kernels do not have, that
    is the other policies, the knobs for experiments and more than MAX_VISUAL visual tokens, goes to
    `TorchPass`.
    """

    def __init__(self, cells: PassInputs) -> None:
        self.cells = cells
        self.torch_pass = TorchPass(cells)

    def __call__(self, jobs: Sequence[Job]) -> None:
        groups: dict[Group, list[Job]] = {}
        for job in jobs:
            config = job.record.intent.config
            if in_kernels(job.record.intent):
                key = (config.window, config.alpha, config.elite, config.budget)
                groups.setdefault(key, []).append(job)
            else:
                self.torch_pass([job])
        for members in groups.values():
            self._compress(members)

    def _compress(self, jobs: list[Job]) -> None:
        cells, device = self.cells, self.cells.k_all.device
        records = [job.record for job in jobs]
        prompts = [record.intent.prompt for record in records]
        config = records[0].intent.config
        window, alpha = config.scoring_window()
        kv_lens = [prompt.n_visual for prompt in prompts]
        columns = [record.intent.columns for record in records]
        most = max(kv_lens)
        # The windows of both scorings, the second one only where the report needs it.
        windows = [window] if config.scores_are_importance() else [window, INSTRUCTION_LIMIT]
        qo_lens = [[min(n, job.q.shape[1]) for job in jobs] for n in windows]
        # All that the host knows in one transfer.
        rows, starts, m, kv_indptr, column_indptr, between_indptr, *qo_indptrs = vectors_to_device(
            [
                [record.row for record in records],
                [prompt.start for prompt in prompts],
                columns,
                indptr(kv_lens),
                indptr(columns),
                indptr([prompt.n_between for prompt in prompts]),
                *[indptr(lengths) for lengths in qo_lens],
            ],
            device,
        )
        kv_indices = torch.cat(
            [
                part
                for record, prompt in zip(records, prompts, strict=True)
                for part in prompt.visual_parts(record.originals)
            ]
        )

        def scored(lengths: list[int], qo_indptr: torch.Tensor, alpha: float) -> torch.Tensor:
            """Importance float32 [L, H_kv, sum N_v] by the last instruction tokens of each."""
            slots = [cells.instruction_slots(r, n) for r, n in zip(records, lengths, strict=True)]
            return score(
                joined([job.q[:, -n:] for job, n in zip(jobs, lengths, strict=True)]),
                qo_indptr,
                cells.k_all,
                torch.cat(slots),
                kv_indptr,
                kv_indices,
                max_qo_len=max(lengths),
                max_kv_len=most,
                sm_scale=cells.scale,
                alpha=alpha,
                elite=config.elite,
            )

        importance = scored(qo_lens[0], qo_indptrs[0], alpha)
        weights = importance
        if not config.scores_are_importance():
            weights = scored(qo_lens[1], qo_indptrs[1], config.alpha)
        statistics = importance_statistics(importance, kv_indptr, max_kv_len=most)
        budgets, cell_offset = layer_budgets(
            cells.heads.mean(statistics),
            kv_indptr,
            m,
            budget=config.budget,
            cell_offset=cells.table.cell_offset,
            req_pool_indices=rows,
        )
        n_layers, _, n_kv, _ = cells.k_all.shape
        masses = statistics.new_empty(len(jobs), n_layers, n_kv)
        selected = select(
            importance,
            kv_indptr,
            cell_offset,
            column_indptr,
            total_columns=sum(columns),
            max_kv_len=most,
            weights=weights,
            mass=masses,
        )
        column_indices = torch.cat([record.columns for record in records])
        pack(
            cells.k_all,
            cells.v_all,
            selected,
            kv_indptr,
            kv_indices,
            cell_offset,
            column_indptr,
            column_indices,
            max_columns=max(columns),
        )
        lay_out_rows(
            cells.table.req_to_token,
            rows,
            starts,
            kv_indptr,
            column_indptr,
            column_indices,
            between_indptr,
            torch.cat([part for record in records for part in cells.copy_text_between(record)]),
            cells.table.gap_start,
            cells.table.gap_len,
        )
        bounds = itertools.pairwise(indptr(columns))
        kept = [selected[:, n_layers * first : n_layers * last] for first, last in bounds]
        host_budgets = budgets.to("cpu", non_blocking=True)
        host_masses = cells.heads.mean(masses.mean(dim=(1, 2))).to("cpu", non_blocking=True)
        for record, layers, chosen, mass in zip(
            records, host_budgets, kept, host_masses, strict=True
        ):
            cells.keep(record, layers, chosen, mass)
