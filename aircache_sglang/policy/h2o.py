# SPDX-License-Identifier: Apache-2.0
"""H2O (Zhang et al., arXiv 2306.14048): heavy hitters of all queries, visual ones too.

Taken: a token's score is the attention it got from every query of the prompt so far. Different: it
is applied once, after the prefill, and to visual tokens alone; the recent tokens that the paper
keeps beside the heavy hitters are text here, which stays; the mean over the query heads of a KV
group, which share their keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from aircache_sglang.policy.base import Policy, States
from aircache_sglang.policy.registry import register_policy


@register_policy
@dataclass(frozen=True)
class H2O(Policy):
    """What `accumulate` has summed up during the prefill, uniform budgets; per KV head."""

    name: ClassVar[str] = "h2o"
    accumulates: ClassVar[bool] = True

    def score(self, states: States) -> Tensor:
        assert states.accumulated is not None, "the policy asked for accumulated attention"
        return states.accumulated
