# SPDX-License-Identifier: Apache-2.0
"""PrefixKV (Wang et al., arXiv 2412.03409): every layer keeps the same share of its priority.

Taken, from the paper and `prefixkv.py` of github.com/THU-MIG/PrefixKV: tokens are ordered by the
attention that they get from every query of the prompt, visual ones too, summed over the queries and
averaged over all heads of a layer, which therefore keep the same tokens; a layer's size is the
shortest prefix of that order whose cumulated priority reaches p, and p is what makes the sizes add
up to the budget. Different: the sizes are those of the request at hand, where the authors average
them over sample requests beforehand; the text is left out of sizes and priorities, since it is
never evicted. The authors find p by binary search; here it is read off the sorted thresholds, which
gives the same sizes exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from aircache_sglang.policy.base import States
from aircache_sglang.policy.h2o import H2O
from aircache_sglang.policy.means import mean
from aircache_sglang.policy.registry import register_policy


@register_policy
@dataclass(frozen=True)
class PrefixKV(H2O):
    """The sums of `H2O` with one selection a layer, sizes by cumulated priority."""

    name: ClassVar[str] = "prefixkv"
    shares_selection: ClassVar[bool] = True

    def statistics(self, states: States, scores: Tensor) -> Tensor:
        """Row k: the priority that a layer's first k tokens carry, k = 0..N_v - 1."""
        ranked = scores.double().sort(dim=-1, descending=True).values
        total = ranked.sum(dim=-1, keepdim=True)
        n_visual = scores.shape[2]
        share = torch.where(total > 0, ranked / torch.where(total > 0, total, 1.0), 1.0 / n_visual)
        curve = mean(share, 1).cumsum(dim=-1)  # [L, N_v], the Lorenz curve
        return torch.cat((torch.zeros_like(curve[:, :1]), curve[:, :-1]), dim=1).transpose(0, 1)

    def budgets(self, statistics: Tensor, n_visual: int, m: int) -> Tensor:
        # a layer's token k + 1 is kept once p exceeds what its first k carry: the L * m lowest win
        before = torch.nan_to_num(statistics, nan=2.0).clone()
        before[0] = -1.0  # every layer keeps one
        n_layers = before.shape[1]
        # rows are ranks: equal thresholds go to the lower rank, then to the lower layer
        lowest = before.flatten().argsort(stable=True)[: n_layers * m]
        counts = torch.zeros(n_layers, dtype=torch.int64, device=before.device)
        return counts.scatter_add_(0, lowest % n_layers, torch.ones_like(lowest))
