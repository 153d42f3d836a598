# SPDX-License-Identifier: Apache-2.0
"""StreamingLLM (Xiao et al., arXiv 2309.17453): attention sinks and the most recent tokens.

Taken: the first few tokens and a sliding window of the last ones, in every layer and head alike.
Different: both are visual tokens here, since text, which holds the prompt's own first tokens, is
never evicted; positions stay those of the prompt instead of being counted within the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from aircache_sglang.policy.base import Policy, States
from aircache_sglang.policy.registry import register_policy
from aircache_sglang.policy.validation import natural


@register_policy
@dataclass(frozen=True)
class Streaming(Policy):
    """The first `sinks` visual tokens, then the later the sooner kept.

    Args:
        sinks: at least 0; where fewer tokens are kept, the earliest of them.
    """

    name: ClassVar[str] = "streaming"

    sinks: int = 4

    def __post_init__(self) -> None:
        natural("sinks", self.sinks)

    def score(self, states: States) -> Tensor:
        n_layers, n_visual, n_kv, _ = states.k_visual.shape
        token = torch.arange(n_visual, device=states.k_visual.device)
        rank = torch.where(token < self.sinks, 2 * n_visual - token, token)
        return rank.to(torch.float32).expand(n_layers, n_kv, n_visual)
