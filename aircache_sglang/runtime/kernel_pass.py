# SPDX-License-Identifier: Apache-2.0
"""The compression pass in Triton: all requests of a prefill batch in one sequence of launches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch

from aircache_kernels import (
    global_budgets,
    importance_statistics,
    lay_out_rows,
    layer_budgets,
    pack,
    score,
    select,
)
from aircache_kernels.validation import MAX_VISUAL
from aircache_sglang.config import INSTRUCTION_LIMIT, Ablation
from aircache_sglang.policy.means import mean
from aircache_sglang.runtime.compress import Judgement, PassInputs, TorchPass, ladder
from aircache_sglang.runtime.decide import Intent
from aircache_sglang.runtime.stash import Job, joined
from aircache_sglang.runtime.transfer import indptr, vectors_to_device

# window, alpha, elite, budget
Setting = tuple[str, float, str, str]


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


class Group:
    """Requests of one setting, and what the host knows of them on the device, in one transfer.

    All int32: rows, starts (of the gaps), columns (m), each [B]; kv_indptr over visual tokens,
    column_indptr and between_indptr, each [B + 1]. kv_indices: int64 [sum N_v], visual slots.
    windows: for each scoring how many last instruction tokens of each request it looks at, and
    their indptr; the second scoring is there only where the report needs one of its own.
    """

    def __init__(self, jobs: Sequence[Job], device: torch.device) -> None:
        self.jobs, self.records = jobs, [job.record for job in jobs]
        self.config = self.records[0].intent.config
        prompts = [record.intent.prompt for record in self.records]
        self.kv_lens = kv_lens = [prompt.n_visual for prompt in prompts]
        self.m = [record.intent.columns for record in self.records]
        self.most = max(kv_lens)
        looks = [self.config.scoring_window()[0]]
        if not self.config.scores_are_importance():
            looks.append(INSTRUCTION_LIMIT)
        qo_lens = [[min(look, job.q.shape[1]) for job in jobs] for look in looks]
        found = vectors_to_device(
            [
                [record.row for record in self.records],
                [prompt.start for prompt in prompts],
                self.m,
                indptr(kv_lens),
                indptr(self.m),
                indptr([prompt.n_between for prompt in prompts]),
                *[indptr(lengths) for lengths in qo_lens],
            ],
            device,
        )
        self.rows, self.starts, self.columns = found[:3]
        self.kv_indptr, self.column_indptr, self.between_indptr, *qo_indptrs = found[3:]
        self.windows = list(zip(qo_lens, qo_indptrs, strict=True))
        self.kv_indices = torch.cat(
            [
                part
                for record, prompt in zip(self.records, prompts, strict=True)
                for part in prompt.visual_parts(record.originals)
            ]
        )
        self.column_indices = torch.cat([record.columns for record in self.records])


class KernelPass:
    """The pass of the `aircache` policy by `aircache_kernels`, FlashInfer's ragged layouts.

    Requests that differ in window, alpha, elite or budget mode are compressed in groups, one
    sequence of launches each; in practice there is one group. What the kernels do not have, that
    is the other policies, the knobs for experiments and more than MAX_VISUAL visual tokens, goes to
    `TorchPass`.
    """

    def __init__(self, inputs: PassInputs) -> None:
        self.inputs = inputs
        self.torch_pass = TorchPass(inputs)

    def __call__(self, jobs: Sequence[Job]) -> None:
        for group in self._groups(jobs, self.torch_pass):
            self._compress(group)

    def rank(self, jobs: Sequence[Job]) -> None:
        """Scores in Triton; the order and the rungs' budgets, request by request, in torch."""
        for group in self._groups(jobs, self.torch_pass.rank):
            found = self._judge(group)
            statistics = self._statistics(group, found[0])
            for i, (first, last) in enumerate(itertools.pairwise(indptr(group.kv_lens))):
                record = group.records[i]
                scores, weights = (part[:, :, first:last].contiguous() for part in found)
                judgement = Judgement(scores, statistics[i], weights)
                record.ladder = ladder(judgement, record, self.inputs.heads)

    def _groups(
        self, jobs: Sequence[Job], elsewhere: Callable[[Sequence[Job]], None]
    ) -> Iterator[Group]:
        """Jobs of one setting together; `elsewhere` does what the kernels do not have."""
        groups: dict[Setting, list[Job]] = {}
        for job in jobs:
            config = job.record.intent.config
            if in_kernels(job.record.intent):
                setting = (config.window, config.alpha, config.elite, config.budget)
                groups.setdefault(setting, []).append(job)
            else:
                elsewhere([job])
        for members in groups.values():
            yield Group(members, self.inputs.k_all.device)

    def _judge(self, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
        """Importance, and that of `visual_mass`, each float32 [L, H_kv, sum N_v]."""
        importance = self._score(group, 0, group.config.scoring_window()[1])
        weights = importance
        if len(group.windows) > 1:
            weights = self._score(group, 1, group.config.alpha)
        return importance, weights

    def _statistics(self, group: Group, importance: torch.Tensor) -> torch.Tensor:
        """float64 [B, 2, L], or [B, 0, L] where budgets need none."""
        if group.config.budget == "global":
            size = (len(group.jobs), 0, len(importance))
            return torch.empty(size, dtype=torch.float64, device=importance.device)
        return importance_statistics(importance, group.kv_indptr, max_kv_len=group.most)

    def _budgets(self, group: Group, importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Budgets int32 [B, L] and their prefix sums, which go to the table too."""
        heads, offsets = self.inputs.heads, self.inputs.table.cell_offset
        if group.config.budget == "global":
            return global_budgets(
                importance,
                group.kv_indptr,
                group.columns,
                max_kv_len=group.most,
                ranks=heads.ranks,
                total=heads.total,
                cell_offset=offsets,
                req_pool_indices=group.rows,
            )
        return layer_budgets(
            heads.mean(self._statistics(group, importance)),
            group.kv_indptr,
            group.columns,
            budget=group.config.budget,
            cell_offset=offsets,
            req_pool_indices=group.rows,
        )

    def _compress(self, group: Group) -> None:
        inputs = self.inputs
        importance, weights = self._judge(group)
        budgets, cell_offset = self._budgets(group, importance)
        masses = importance.new_empty((len(group.jobs), *importance.shape[:2]), dtype=torch.float64)
        selected = select(
            importance,
            group.kv_indptr,
            cell_offset,
            group.column_indptr,
            total_columns=sum(group.m),
            max_kv_len=group.most,
            weights=weights,
            mass=masses,
        )
        pack(
            inputs.k_all,
            inputs.v_all,
            selected,
            group.kv_indptr,
            group.kv_indices,
            cell_offset,
            group.column_indptr,
            group.column_indices,
            max_columns=max(group.m),
        )
        between = [part for record in group.records for part in inputs.copy_text(record)]
        lay_out_rows(
            inputs.table.tables,
            group.rows,
            group.starts,
            group.kv_indptr,
            group.column_indptr,
            group.column_indices,
            group.between_indptr,
            torch.cat(between),
        )
        for record in group.records:
            inputs.enter_head(record)
        self._finish(group, budgets, masses, selected)

    def _score(self, group: Group, window: int, alpha: float) -> torch.Tensor:
        """Importance float32 [L, H_kv, sum N_v] by one of the group's windows."""
        inputs, (lengths, qo_indptr) = self.inputs, group.windows[window]
        looked = list(zip(group.jobs, lengths, strict=True))
        return score(
            joined([job.q[:, -n:] for job, n in looked]),
            qo_indptr,
            inputs.k_all,
            torch.cat([inputs.instruction_slots(job.record, n) for job, n in looked]),
            group.kv_indptr,
            group.kv_indices,
            max_qo_len=max(lengths),
            max_kv_len=group.most,
            sm_scale=inputs.scale,
            alpha=alpha,
            elite=group.config.elite,
        )

    def _finish(
        self, group: Group, budgets: torch.Tensor, masses: torch.Tensor, selected: torch.Tensor
    ) -> None:
        """Send what will be reported to the host."""
        host_budgets = budgets.to("cpu", non_blocking=True)
        mass = self.inputs.heads.mean(mean(masses.flatten(1), 1)).to("cpu", non_blocking=True)
        n_layers, bounds = budgets.shape[1], itertools.pairwise(indptr(group.m))
        for i, (first, last) in enumerate(bounds):
            mine = selected[:, n_layers * first : n_layers * last]
            self.inputs.finish(group.records[i], host_budgets[i], mass[i], mine)
