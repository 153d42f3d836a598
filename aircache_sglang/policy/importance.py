# SPDX-License-Identifier: Apache-2.0
"""The elite window (eqs. 4, 5) and how much it attends to each visual token (eqs. 6 to 8)."""

from __future__ import annotations

import torch
from torch import Tensor

from aircache_sglang.policy.validation import (
    compute_dtype,
    one_of,
    positive_int,
    tensor_of,
    validate_alpha,
    validate_scale,
)

ELITE_MODES: tuple[str, ...] = ("per-head", "shared")
DEFAULT_WINDOW = 512
# one block: at most 128 MiB of float32 logits, and of keys widened to float32
MAX_ELEMENTS = 1 << 25


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


def importance_batched(
    q_text: Tensor,
    k_text: Tensor,
    k_visual: Tensor,
    *,
    alpha: float = 0.9,
    scale: float | None = None,
    elite: str = "per-head",
    window: int | None = DEFAULT_WINDOW,
    unified: bool = False,
    max_elements: int = MAX_ELEMENTS,
) -> Tensor:
    """`importance` for all layers of one request at once, without a host sync.

    How many tokens are elite is known on the device only, so every row is computed and the
    others get weight 0. The work is cut into blocks of KV heads, layers and rows; how many follows
    from the shapes.

    Args:
        q_text: [L, N_t, H_q, D], after RoPE.
        k_text: [L, N_t, H_kv, D], after RoPE; H_q is a multiple of H_kv.
        k_visual: [L, N_v, H_kv, D], after RoPE.
        alpha, scale, elite: see `elite_mask`.
        window: only the last `window` instruction tokens count; None for all.
        unified: k_visual are the keys of the whole prompt, its instruction's last. The softmax of
            eq. 6 then runs over them alone, and each elite query sees those up to itself.
        max_elements: a block has at most so many logits and so many key elements; the least block
            is one row of one KV group.
    Returns:
        float32 [L, H_kv, N_v] on the inputs' device; float32 arithmetic inside (float64 for
        float64 inputs).
    Raises:
        ValueError: a shape, dtype or value is not as above.
    """
    if window is not None:
        window = positive_int("window", window)
        q_text, k_text = q_text[:, -window:], k_text[:, -window:]
    positive_int("max_elements", max_elements)
    n_layers, n_text, n_q, head_dim, n_kv = text_shape(q_text, k_text)
    tensor_of("k_visual", k_visual, (n_layers, "N_v", n_kv, head_dim))
    n_visual, group = k_visual.shape[1], n_q // n_kv
    if unified and n_visual < n_text:
        raise ValueError(
            f"k_visual must hold the instruction of {n_text} tokens too, got {n_visual}"
        )
    scale = validate_scale(scale, head_dim)
    dtype = compute_dtype(q_text, k_text, k_visual)

    elite_tokens = elite_mask_batched(q_text, k_text, alpha=alpha, scale=scale, elite=elite)
    weight = elite_tokens.to(dtype)
    weight /= weight.sum(dim=-1, keepdim=True) * group  # eq. 8 and the mean over the KV group
    elite_tokens = elite_tokens.view(n_layers, n_kv, group, 1, n_text)
    if unified:  # the text keys are among the visual ones
        elite_tokens = torch.zeros_like(elite_tokens)
    weight = weight.view(n_layers, n_kv, group, n_text)
    queries = q_text.reshape(n_layers, n_text, n_kv, group, head_dim).permute(0, 2, 3, 1, 4)
    text_keys, visual_keys = k_text.permute(0, 2, 3, 1), k_visual.permute(0, 2, 3, 1)

    # the next axis is cut only where the one before fits whole
    n_keys = n_visual + n_text
    rows = min(n_text, max(1, max_elements // (group * n_keys)))
    per_head = n_keys * max(group * n_text, head_dim)
    heads = min(n_kv, max(1, max_elements // per_head))
    layers = max(1, max_elements // (per_head * n_kv))
    scores = torch.zeros(n_layers, n_kv, n_visual, dtype=dtype, device=k_visual.device)
    key_positions = torch.arange(n_visual, device=k_visual.device)
    row_positions = key_positions[-n_text:, None]  # of a unified prompt
    for l0 in range(0, n_layers, layers):
        for h0 in range(0, n_kv, heads):
            part = (slice(l0, l0 + layers), slice(h0, h0 + heads))
            k_t, k_v = text_keys[part].to(dtype), visual_keys[part].to(dtype)
            for t0 in range(0, n_text, rows):
                q = queries[part][:, :, :, t0 : t0 + rows].to(dtype)
                l_, h_, g_, t_, _ = q.shape
                q = q.reshape(l_, h_, g_ * t_, head_dim)
                # Scaled behind the product, whose 16-bit factors are exact in TF32 as well.
                on_visual = torch.matmul(q, k_v).mul_(scale)  # [l, h, g * t, N_v]
                on_text = torch.matmul(q, k_t).mul_(scale).view(l_, h_, g_, t_, n_text)
                # eq. 6: only elite text keys share the softmax with the visual ones
                on_text.masked_fill_(~elite_tokens[part], float("-inf"))
                if unified:
                    hidden = key_positions > row_positions[t0 : t0 + t_]
                    on_visual.view(l_, h_, g_, t_, n_visual).masked_fill_(hidden, float("-inf"))
                on_text = on_text.view(l_, h_, g_ * t_, n_text)
                top = torch.maximum(on_visual.amax(-1, True), on_text.amax(-1, True))
                on_visual.sub_(top).exp_()
                on_text.sub_(top).exp_()
                total = on_visual.sum(-1) + on_text.sum(-1)  # [l, h, g * t], eq. 7
                share = weight[part][..., t0 : t0 + rows].reshape(l_, h_, g_ * t_) / total
                scores[part].add_(torch.matmul(share.unsqueeze(-2), on_visual).squeeze(-2))
    return scores.to(torch.float32)


def text_shape(q_text: Tensor, k_text: Tensor) -> tuple[int, int, int, int, int]:
    """Validated (L, N_t, H_q, D, H_kv) of batched instruction tensors."""
    tensor_of("q_text", q_text, ("L", "N_t", "H_q", "D"))
    n_layers, n_text, n_q, head_dim = q_text.shape
    tensor_of("k_text", k_text, (n_layers, n_text, "H_kv", head_dim))
    n_kv = k_text.shape[2]
    if n_q % n_kv:
        raise ValueError(f"H_q must be a multiple of H_kv, got H_q={n_q}, H_kv={n_kv}")
    return n_layers, n_text, n_q, head_dim, n_kv
