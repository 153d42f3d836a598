# SPDX-License-Identifier: Apache-2.0
"""SnapKV (Li et al., arXiv 2404.14469): the prompt's last tokens vote.

Taken: attention of the last `window` tokens to the prompt, summed over them, max-pooled along the
sequence so that neighbours of a hit stay, and the same budget in every layer; window and kernel are
those of its LongBench runs. Different: only visual tokens are evicted, so the pool slides over
these alone; votes are averaged over the query heads of a KV group, which share their keys here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from aircache_sglang.policy.base import Policy, States
from aircache_sglang.policy.prompt_attention import accumulated_attention, group_mean
from aircache_sglang.policy.registry import register_policy
from aircache_sglang.policy.validation import positive_int


@register_policy
@dataclass(frozen=True)
class SnapKV(Policy):
    """Pooled votes of the last instruction tokens.

    Args:
        window: how many of them vote.
        kernel: width of the pool, an odd number; 1 pools nothing.
    """

    name: ClassVar[str] = "snapkv"
    reads_context: ClassVar[bool] = True

    window: int = 32
    kernel: int = 7

    def __post_init__(self) -> None:
        positive_int("window", self.window)
        if positive_int("kernel", self.kernel) % 2 == 0:
            raise ValueError(f"kernel must be an odd number, got {self.kernel}")

    def score(self, states: States) -> Tensor:
        votes = accumulated_attention(states, self.window)
        pooled = torch.nn.functional.max_pool1d(
            votes, self.kernel, stride=1, padding=self.kernel // 2
        )
        return group_mean(pooled, states.k_text.shape[2])
