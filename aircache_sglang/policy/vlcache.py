# SPDX-License-Identifier: Apache-2.0
"""VL-Cache (Tu et al., arXiv 2410.23317): post-vision attention, budgets by sparsity.

Taken: the attention of all text after the picture is summed per token; a layer's density is the
part of this attention that reaches 1 % of its row's highest, and the budgets are in proportion to
density. Different: of the text after the picture the engine looks at the last 512 tokens; text is
never evicted, which includes the recent tokens that the paper keeps; its floor of 1 % of a layer is
one token here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from aircache_sglang.policy.base import Policy, States
from aircache_sglang.policy.budget import in_proportion
from aircache_sglang.policy.prompt_attention import (
    accumulated_attention,
    group_mean,
    instruction_attention,
)
from aircache_sglang.policy.registry import register_policy

THRESHOLD = 0.01


@register_policy
@dataclass(frozen=True)
class VLCache(Policy):
    """Attention from all text after the picture, more for layers that look widely."""

    name: ClassVar[str] = "vlcache"
    reads_context: ClassVar[bool] = True

    def score(self, states: States) -> Tensor:
        return group_mean(accumulated_attention(states), states.k_text.shape[2])

    def statistics(self, states: States, scores: Tensor) -> Tensor:
        """Density of each layer: visible probabilities of at least THRESHOLD of the row's top."""
        n_layers, n_text = states.q_text.shape[:2]
        counts = torch.zeros(n_layers, dtype=torch.float64, device=scores.device)
        n_keys = n_text
        for layer, probabilities, visual in instruction_attention(states):
            n_keys = visual.stop + n_text
            top = probabilities.amax(dim=-1, keepdim=True)
            # what a row cannot see has probability 0
            counts[layer] += ((probabilities >= THRESHOLD * top) & (probabilities > 0)).sum()
        # row i of n_text sees all keys but the n_text - 1 - i text tokens behind it
        visible = n_text * n_keys - n_text * (n_text - 1) // 2
        return (counts / (visible * states.q_text.shape[2]))[None]

    def budgets(self, statistics: Tensor, n_visual: int, m: int) -> Tensor:
        return in_proportion(statistics[0], n_visual, m)
