# SPDX-License-Identifier: Apache-2.0
"""TGV-KV (Liu et al., arXiv 2606.03075): text that is looked at says which visual tokens matter.

Taken, from the paper and `kv_caches/tgv_kv.py` of github.com/Danielement321/TGV-KV: a token of the
instruction weighs as much as the attention that it gets from the instruction, over the number of
tokens that see it (text-weighted ranking); a visual token scores the attention of the instruction,
so weighted; all heads of a layer keep the same tokens; a layer's budget is in proportion to the
attention that its instruction gives to the picture (text-vision budgeting). Different: the authors
weigh the mean attention of a layer by the mean weights of its heads, here each head weighs its
own, since a tensor-parallel rank sees its own heads alone; of the text after the picture the engine
looks at the last 512 tokens; text between pictures is no visual token; no text is ever evicted,
however small the budget, nor is any token while decoding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from aircache_sglang.policy.base import Policy, States
from aircache_sglang.policy.budget import in_proportion
from aircache_sglang.policy.means import mean
from aircache_sglang.policy.prompt_attention import (
    accumulated_attention,
    group_mean,
    instruction_attention,
)
from aircache_sglang.policy.registry import register_policy
from aircache_sglang.policy.validation import compute_dtype


@register_policy
@dataclass(frozen=True)
class TGVKV(Policy):
    """Attention from the text that text looks at, more for layers that look at the picture."""

    name: ClassVar[str] = "tgvkv"
    reads_context: ClassVar[bool] = True
    shares_selection: ClassVar[bool] = True

    def score(self, states: States) -> Tensor:
        weighted = accumulated_attention(states, weights=text_weights(states))
        return group_mean(weighted, states.k_text.shape[2])

    def statistics(self, states: States, scores: Tensor) -> Tensor:
        """What the instruction gives to the picture, in each layer."""
        return mean(accumulated_attention(states).double().sum(dim=-1), -1)[None]

    def budgets(self, statistics: Tensor, n_visual: int, m: int) -> Tensor:
        return in_proportion(statistics[0], n_visual, m)


def text_weights(states: States) -> Tensor:
    """[L, H_q, N_t], the mean attention that an instruction token gets from those that see it."""
    n_layers, n_text, n_q = states.q_text.shape[:3]
    dtype = compute_dtype(states.q_text, states.k_text)
    received = torch.zeros((n_layers, n_q, n_text), dtype=dtype, device=states.q_text.device)
    for layer, probabilities, visual in instruction_attention(states):
        received[layer] += probabilities[..., visual.stop :].sum(dim=2).flatten(0, 1)
    return received / torch.arange(n_text, 0, -1, device=received.device)
