# SPDX-License-Identifier: Apache-2.0
"""The elite observation window: which instruction tokens may judge the visual ones (eqs. 4, 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from aircache_sglang.policy.validation import (
    compute_dtype,
    one_of,
    tensor_of,
    validate_alpha,
    validate_scale,
)

ELITE_MODES: tuple[str, ...] = ("per-head", "shared")


def reference_rows(q_text: Tensor, k_text: Tensor, *, scale: float | None = None) -> Tensor:
    """Attention of the last instruction token to the instruction (last row of A_tt, eq. 4).

    The last token sees every other one, so the causal mask of A_tt does not show here.

    Args:
        q_text: [L, N_t, H_q, D], after RoPE.
        k_text: [L, N_t, H_kv, D], after RoPE; query head h reads KV head h // (H_q / H_kv).
        scale: softmax scale, `D ** -0.5` for None.
    Returns:
        [L, H_q, N_t] probabilities, float32 (float64 for float64 inputs). No host sync.
    """
    n_layers, n_text, n_q, head_dim, n_kv = text_shape(q_text, k_text)
    dtype = compute_dtype(q_text, k_text)
    q_last = q_text[:, -1].reshape(n_layers, n_kv, n_q // n_kv, head_dim).to(dtype)
    keys = k_text.permute(0, 2, 3, 1).to(dtype)  # [L, H_kv, D, N_t]
    logits = torch.matmul(q_last, keys) * validate_scale(scale, head_dim)
    return torch.softmax(logits, dim=-1).reshape(n_layers, n_q, n_text)


def elite_mask_batched(
    q_text: Tensor,
    k_text: Tensor,
    *,
    alpha: float = 0.9,
    scale: float | None = None,
    elite: str = "per-head",
) -> Tensor:
    """`elite_mask` for all layers at once: bool [L, H_q, N_t], without a host sync.

    With `elite="shared"` the mean runs over the heads given, that is over one rank's heads.
    """
    one_of("elite", elite, ELITE_MODES)
    alpha = validate_alpha(alpha)
    rows = reference_rows(q_text, k_text, scale=scale)
    if elite == "shared":
        rows = rows.mean(dim=1, keepdim=True).expand_as(rows)
    return rows >= alpha * rows.amax(dim=-1, keepdim=True)


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


def text_shape(q_text: Tensor, k_text: Tensor) -> tuple[int, int, int, int, int]:
    """Validated (L, N_t, H_q, D, H_kv) of batched instruction tensors."""
    tensor_of("q_text", q_text, ("L", "N_t", "H_q", "D"))
    n_layers, n_text, n_q, head_dim = q_text.shape
    tensor_of("k_text", k_text, (n_layers, n_text, "H_kv", head_dim))
    n_kv = k_text.shape[2]
    if n_q % n_kv:
        raise ValueError(f"H_q must be a multiple of H_kv, got H_q={n_q}, H_kv={n_kv}")
    return n_layers, n_text, n_q, head_dim, n_kv
