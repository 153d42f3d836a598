# SPDX-License-Identifier: Apache-2.0
"""Merging what is dropped into what is kept (AirCache, table 11)."""

from __future__ import annotations

import torch
from torch import Tensor

from aircache_sglang.policy.importance import MAX_ELEMENTS


def merge_dropped(
    k: Tensor,
    v: Tensor,
    order: Tensor,
    budget: Tensor,
    share: float,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Average the best of the dropped tokens of one layer into kept ones.

    Of each KV head's dropped tokens the first round(share * dropped) in `order` are merged: each
    goes to one kept token, and a kept token becomes the mean of itself and what came to it.

    Args:
        k, v: [N_v, H_kv, D] keys, after RoPE, and values.
        order: int64 [H_kv, N_v], ordinals, the kept ones first.
        budget: integer [], how many are kept, at least 1.
        share: of the dropped tokens, between 0 and 1; half to even.
        positions: int64 [N_v] of the tokens in the prompt, ascending: each token goes to the
            nearest kept one, as in table 11 and Elastic Cache's code. None: to the kept one whose
            key has the highest cosine with its own. Ties: the earlier token.
    Returns:
        Keys and values in the order of `k` and its dtype; only the kept tokens' rows mean
        anything. No host sync.
    """
    n_visual, n_kv, head_dim = k.shape
    ranks = torch.arange(n_visual, device=k.device).expand(n_kv, -1)
    rank = torch.empty_like(order).scatter_(1, order, ranks)  # by ordinal, as all that follows
    kept = rank < budget
    merged = rank < budget + torch.round((n_visual - budget) * share)
    keys, values = (x.float().transpose(0, 1) for x in (k, v))  # [H_kv, N_v, D]
    target = _most_similar(kept, keys) if positions is None else _nearest(kept, positions)
    weight = merged.to(keys.dtype)
    count = torch.zeros_like(weight).scatter_add(1, target, weight).clamp_min(1.0).unsqueeze(-1)
    into = target.unsqueeze(-1).expand(-1, -1, head_dim)

    def mean(x: Tensor, like: Tensor) -> Tensor:
        total = torch.zeros_like(x).scatter_add(1, into, x * weight.unsqueeze(-1)) / count
        return total.transpose(0, 1).to(like.dtype)

    return mean(keys, k), mean(values, v)


def _nearest(kept: Tensor, positions: Tensor) -> Tensor:
    """Ordinal of the kept token at the nearest position, int64 [H_kv, N_v]; kept ones: their own.

    kept: bool [H_kv, N_v], at least one a head.
    """
    n = kept.shape[1]
    ordinals = torch.arange(n, device=kept.device)
    before = torch.where(kept, ordinals, -1).cummax(dim=1).values
    after = torch.where(kept, ordinals, n).flip(1).cummin(dim=1).values.flip(1)
    back = positions - positions[before.clamp_min(0)]
    ahead = positions[after.clamp_max(n - 1)] - positions
    earlier = (before >= 0) & ((back <= ahead) | (after == n))
    return torch.where(earlier, before, after)


def _most_similar(kept: Tensor, keys: Tensor) -> Tensor:
    """Ordinal of the kept token with the most similar key, as `_nearest`; keys: [H_kv, N_v, D]."""
    n_kv, n = kept.shape
    unit = torch.nn.functional.normalize(keys, dim=-1)
    target = torch.arange(n, device=kept.device).repeat(n_kv, 1)
    step = max(1, MAX_ELEMENTS // (n_kv * n))
    for first in range(0, n, step):
        similar = torch.matmul(unit[:, first : first + step], unit.transpose(1, 2))
        similar.masked_fill_(~kept.unsqueeze(1), float("-inf"))
        rows = slice(first, first + step)
        target[:, rows] = torch.where(kept[:, rows], target[:, rows], similar.argmax(dim=-1))
    return target
