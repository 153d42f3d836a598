# SPDX-License-Identifier: Apache-2.0
"""What share of the elite attention the kept tokens carry."""

from __future__ import annotations

import torch
from torch import Tensor

from aircache_sglang.policy.means import mean
from aircache_sglang.policy.validation import tensor_of


def visual_mass(importance: Tensor, selected: Tensor, budgets: Tensor) -> Tensor:
    """Importance of the kept visual tokens over that of all, mean over layers and KV heads.

    Args:
        importance: [L, H_kv, N_v] of eq. 8, whatever policy chose the tokens.
        selected: integers [H_kv, C], ordinals of the kept tokens, layer after layer.
        budgets: integers [L], kept tokens of each layer, sum C.
    Returns:
        float64 [], between 0 and 1; a layer and head without any importance counts as 1. Ranks that
        hold equally many KV heads average it. No host sync.
    """
    n_layers, n_kv, _ = tensor_of("importance", importance, ("L", "H_kv", "N_v")).shape
    cells = torch.arange(selected.shape[1], device=selected.device)
    layer = torch.searchsorted(budgets.cumsum(0), cells, right=True)
    head = torch.arange(n_kv, device=selected.device)
    kept = importance[layer[:, None], head, selected.transpose(0, 1).long()].double()  # [C, H_kv]
    carried = torch.zeros((n_layers, n_kv), dtype=torch.float64, device=importance.device)
    carried.index_add_(0, layer, kept)
    total = importance.sum(dim=-1, dtype=torch.float64)
    share = torch.where(total > 0, carried / torch.where(total > 0, total, 1.0), 1.0)
    return mean(share.clamp(0.0, 1.0).flatten(), 0)
