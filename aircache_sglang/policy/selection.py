# SPDX-License-Identifier: Apache-2.0
"""Which visual tokens each layer and KV head keeps: the highest scores, the rest is dropped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aircache_sglang.policy.validation import tensor_of


def select_padded(importance: Tensor, budgets: Tensor) -> Tensor:
    """All visual tokens by falling score; the first `budgets[l]` of a row are the kept ones.

    Padded to N_v, so that no shape depends on the budgets. Ties: the earlier token first.

    Args:
        importance: [L, H_kv, N_v].
        budgets: integers [L], on the same device; only their shape is looked at here.
    Returns:
        int64 [L, H_kv, N_v], each row a permutation of 0..N_v-1. No host sync.
    """
    tensor_of("importance", importance, ("L", "H_kv", "N_v"))
    if list(budgets.shape) != [importance.shape[0]]:
        raise ValueError(
            f"budgets must have shape [{importance.shape[0]}], got {list(budgets.shape)}"
        )
    if budgets.is_floating_point() or budgets.is_complex() or budgets.dtype == torch.bool:
        raise ValueError(f"budgets must be an integer tensor, got {budgets.dtype}")
    return importance.argsort(dim=-1, descending=True, stable=True)


def select(importance: Tensor, budgets: Tensor | Sequence[int]) -> list[Tensor]:
    """The visual tokens that each layer keeps (AirCache algorithm 1; dropped, never merged).

    Args:
        importance: [L, H_kv, N_v].
        budgets: [L] integers, 1 <= n_l <= N_v.
    Returns:
        One int64 [H_kv, n_l] a layer: ascending ordinals of the n_l highest scores of each KV head;
        of equal scores the earlier token stays. Waits for the device.
    Raises:
        ValueError: a shape, dtype or value is not as above, or importance holds NaN.
    """
    tensor_of("importance", importance, ("L", "H_kv", "N_v"))
    if bool(importance.isnan().any()):
        raise ValueError("importance must not hold NaN")
    counts = torch.as_tensor(budgets)
    order = select_padded(importance, counts)
    n_visual = importance.shape[2]
    kept: list[Tensor] = []
    for layer, count in enumerate(counts.tolist()):
        if not 1 <= count <= n_visual:
            raise ValueError(f"budgets[{layer}] must be between 1 and N_v={n_visual}, got {count}")
        kept.append(order[layer, :, :count].sort(dim=-1).values)
    return kept
