# SPDX-License-Identifier: Apache-2.0
"""Random tokens: the control that every policy must beat.

No paper; the laboratory's lower bound. Uniform budgets, each layer and KV head its own tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from aircache_sglang.policy.base import Policy, States
from aircache_sglang.policy.registry import register_policy
from aircache_sglang.policy.validation import natural

_MASK = (1 << 32) - 1


def mix(value: Tensor) -> Tensor:
    """A bijective hash of int64 in [0, 2**32), the same on every device (Wellons' lowbias32)."""
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        value = ((value ^ (value >> shift)) * factor) & _MASK
    return value ^ (value >> 15)


@register_policy
@dataclass(frozen=True)
class Random(Policy):
    """Scores are a hash of prompt, layer, KV head, token and `seed`.

    Args:
        seed: another seed keeps other tokens; at least 0.
    """

    name: ClassVar[str] = "random"

    seed: int = 0

    def __post_init__(self) -> None:
        natural("seed", self.seed)

    def score(self, states: States) -> Tensor:
        n_layers, n_visual, n_kv, _ = states.k_visual.shape
        device = states.k_visual.device
        layer = torch.arange(n_layers, device=device)[:, None, None] + states.first_layer
        head = torch.arange(n_kv, device=device)[:, None] + states.first_head
        token = torch.arange(n_visual, device=device)
        value = torch.full_like(layer, (self.seed ^ states.salt) & _MASK)
        for part in (layer, head, token):
            value = mix((mix(value) + part) & _MASK)
        # 24 bits, which float32 holds exactly
        return (value >> 8).to(torch.float32)
