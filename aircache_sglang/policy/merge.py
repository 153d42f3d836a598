# SPDX-License-Identifier: Apache-2.0
"""Merging what is dropped into what is kept (AirCache, table 11)."""

from __future__ import annotations

import torch
from torch import Tensor

from aircache_sglang.policy.importance import MAX_ELEMENTS


def merge_dropped(
    k: Tensor, v: Tensor, order: Tensor, budget: Tensor, share: float
) -> tuple[Tensor, Tensor]:
    """Average the best of the dropped tokens of one layer into the most similar kept ones.

    Of each KV head's dropped tokens the first round(share * dropped) in `order` are merged: each
    goes to the kept token whose key has the highest cosine with its own (ties: the one that is
    first in `order`), and a kept token becomes the mean of itself and what came to it.

    Args:
        k, v: [N_v, H_kv, D] keys, after RoPE, and values.
        order: int64 [H_kv, N_v], ordinals, the kept ones first.
        budget: integer [], how many are kept, at least 1.
        share: of the dropped tokens, between 0 and 1; half to even.
    Returns:
        Keys and values in the order of `k` and its dtype; only the kept tokens' rows mean
        anything. No host sync.
    """
    n_visual, n_kv, head_dim = k.shape
    rank = torch.arange(n_visual, device=k.device)
    merged = rank < budget + torch.round((n_visual - budget) * share)
    index = order.unsqueeze(-1).expand(-1, -1, head_dim)
    # by rank from here on, [H_kv, N_v, D]
    keys, values = (x.float().transpose(0, 1).gather(1, index) for x in (k, v))
    unit = torch.nn.functional.normalize(keys, dim=-1)
    target = rank.repeat(n_kv, 1)
    step = max(1, MAX_ELEMENTS // (n_kv * n_visual))
    for first in range(0, n_visual, step):
        similar = torch.matmul(unit[:, first : first + step], unit.transpose(1, 2))
        similar.masked_fill_(rank >= budget, float("-inf"))
        target[:, first : first + step] = similar.argmax(dim=-1)
    target = torch.where(rank < budget, rank, target)
    weight = merged.to(keys.dtype).expand(n_kv, -1)
    count = torch.zeros_like(weight).scatter_add(1, target, weight).clamp_min(1.0).unsqueeze(-1)
    into = target.unsqueeze(-1).expand(-1, -1, head_dim)

    def mean(x: Tensor, like: Tensor) -> Tensor:
        total = torch.zeros_like(x).scatter_add(1, into, x * weight.unsqueeze(-1)) / count
        back = torch.empty_like(total).scatter_(1, index, total)
        return back.transpose(0, 1).to(like.dtype)

    return mean(keys, k), mean(values, v)
