# SPDX-License-Identifier: Apache-2.0
"""Elastic Cache (Liu et al., arXiv 2407.18121): attention summed over the instruction.

Taken: the importance of a token is the attention it gets, summed over the queries of the
instruction, and the same budget in every layer. Different: the instruction is the text after the
last picture; what is not kept is dropped, as AirCache's authors ran it (appendix A), unless the
engine is told to merge, and then into the most similar kept key instead of the nearest position;
the fixed-point eviction while generating is left out, since generated tokens are never evicted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from aircache_sglang.policy.base import Policy, States
from aircache_sglang.policy.prompt_attention import accumulated_attention, group_mean
from aircache_sglang.policy.registry import register_policy


@register_policy
@dataclass(frozen=True)
class Elastic(Policy):
    """Attention from the whole instruction, uniform budgets."""

    name: ClassVar[str] = "elastic"
    reads_context: ClassVar[bool] = True

    def score(self, states: States) -> Tensor:
        return group_mean(accumulated_attention(states), states.k_text.shape[2])
