# SPDX-License-Identifier: Apache-2.0
"""The paper's functions as it writes them, checked: one layer, or one request, at a time.

What serves requests are the batched functions that these call (importance.py, budget.py), which do
not wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aircache_sglang.policy.budget import (
    columns,
    head_mean_statistics,
    head_skewness,
    head_strength,
    layer_budgets_from_statistics,
    select_padded,
)
from aircache_sglang.policy.importance import elite_mask_batched, importance_batched
from aircache_sglang.policy.threshold import global_counts
from aircache_sglang.policy.validation import tensor_of


def elite_mask(
    q_text: Tensor,
    k_text: Tensor,
    *,
    alpha: float = 0.9,
    scale: float | None = None,
    elite: str = "per-head",
) -> Tensor:
    """The elite instruction tokens of one layer (AirCache eq. 5).

    Token j is elite where A_tt[-1, j] >= alpha * max_j A_tt[-1, j]: alpha = 0 keeps all, alpha = 1
    the highest one and its exact ties. At least one token is elite in every head.

    Args:
        q_text: [N_t, H_q, D], after RoPE.
        k_text: [N_t, H_kv, D], after RoPE; H_q is a multiple of H_kv.
        alpha: relevance threshold in [0, 1].
        scale: softmax scale, `D ** -0.5` for None.
        elite: "per-head" judges every query head by its own row, "shared" all by their mean row.
    Returns:
        bool [H_q, N_t].
    Raises:
        ValueError: a shape, dtype or value is not as above.
    """
    tensor_of("q_text", q_text, ("N_t", "H_q", "D"))
    tensor_of("k_text", k_text, ("N_t", "H_kv", "D"))
    return elite_mask_batched(q_text[None], k_text[None], alpha=alpha, scale=scale, elite=elite)[0]


def importance(
    q_text: Tensor,
    k_text: Tensor,
    k_visual: Tensor,
    *,
    alpha: float = 0.9,
    scale: float | None = None,
    elite: str = "per-head",
    window: int | None = None,
    unified: bool = False,
) -> Tensor:
    """Importance I_v of the visual tokens in one layer (AirCache eqs. 6 to 8).

    Per query head: softmax of the elite queries over the visual keys and the elite text keys (no
    causal mask between the elite tokens, as the paper writes it), mean over the elite queries;
    then the mean over the query heads of each KV group. A row sums to at most 1.

    Args:
        q_text: [N_t, H_q, D], after RoPE.
        k_text: [N_t, H_kv, D], after RoPE; H_q is a multiple of H_kv.
        k_visual: [N_v, H_kv, D], after RoPE.
        alpha, scale, elite: see `elite_mask`.
        window: only the last `window` instruction tokens count; None for all.
        unified: see `importance_batched`.
    Returns:
        float32 [H_kv, N_v].
    Raises:
        ValueError: a shape, dtype or value is not as above, or an input holds NaN or infinity.
    """
    tensor_of("q_text", q_text, ("N_t", "H_q", "D"))
    tensor_of("k_text", k_text, ("N_t", "H_kv", "D"))
    tensor_of("k_visual", k_visual, ("N_v", "H_kv", "D"))
    for name, value in (("q_text", q_text), ("k_text", k_text), ("k_visual", k_visual)):
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    scores = importance_batched(
        q_text[None],
        k_text[None],
        k_visual[None],
        alpha=alpha,
        scale=scale,
        elite=elite,
        window=window,
        unified=unified,
    )[0]
    assert not bool(scores.isnan().any()), "importance of finite inputs is finite"
    return scores


def strength(importance: Tensor) -> Tensor:
    """Strength s_t of each layer: the sum of its scores, mean over KV heads (AirCache eq. 9).

    Args:
        importance: [L, H_kv, N_v].
    Returns:
        float32 [L].
    """
    return head_strength(importance).mean(dim=1).to(torch.float32)


def skewness(importance: Tensor) -> Tensor:
    """Skewness s_k of each layer (AirCache eq. 10, sample standard deviation), mean over KV heads.

    Each head's skewness counts as 0 where it is negative, where N_v < 3 and where the head's scores
    are equal (their range is below 8 float32 epsilons of the largest); the mean comes after.

    Args:
        importance: [L, H_kv, N_v].
    Returns:
        float32 [L], not negative.
    """
    return head_skewness(importance).mean(dim=1).to(torch.float32)


def layer_budgets(importance: Tensor, retention: float, *, budget: str = "aircache") -> Tensor:
    """Cells n_l that each layer keeps per KV head (AirCache eq. 11 in whole numbers).

    Args:
        importance: [L, H_kv, N_v].
        retention: share of the visual KV to keep, in (0, 1].
        budget: one of BUDGET_MODES; see `layer_shares`.
    Returns:
        int64 [L] on the same device: 1 <= n_l <= N_v, sum L * m with m = columns(retention, N_v).
        No host sync.
    Raises:
        ValueError: a shape, dtype or value is not as above.
    """
    n_layers, n_kv, n_visual = tensor_of("importance", importance, ("L", "H_kv", "N_v")).shape
    m = columns(retention, n_visual)
    if budget == "global":
        statistics = global_counts(importance, n_layers * n_kv * m)[None]
    else:
        statistics = head_mean_statistics(importance)
    return layer_budgets_from_statistics(statistics, n_visual, m, budget=budget)


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
