# SPDX-License-Identifier: Apache-2.0
"""Softmax attention as the prefill computed it, for the policies that accumulate it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from aircache_sglang.policy.base import States
from aircache_sglang.policy.importance import MAX_ELEMENTS, text_shape
from aircache_sglang.policy.validation import (
    compute_dtype,
    positive_int,
    tensor_of,
    validate_scale,
)


def causal_attention(
    q: Tensor, k: Tensor, positions: Tensor, key_positions: Tensor, scale: float
) -> Tensor:
    """Causal attention of one layer.

    Args:
        q: [n, H_q, D]; k: [T, H_kv, D], after RoPE.
        positions: int64 [n] of the queries; key_positions: int64 [T]. A query sees the keys at its
            own position and before.
        scale: softmax scale.
    Returns:
        [H_kv, G, n, T] probabilities, float32 (float64 for float64 inputs). No host sync.
    """
    n, n_q, head_dim = q.shape
    n_kv, dtype = k.shape[1], compute_dtype(q, k)
    grouped = q.to(dtype).reshape(n, n_kv, n_q // n_kv, head_dim).permute(1, 2, 0, 3)
    keys = k.to(dtype).permute(1, 2, 0).unsqueeze(1)  # [H_kv, 1, D, T]
    logits = torch.matmul(grouped, keys) * scale
    hidden = key_positions[None, :] > positions[:, None]
    return torch.softmax(logits.masked_fill(hidden, float("-inf")), dim=-1)


def instruction_attention(
    states: States, window: int | None = None
) -> Iterator[tuple[int, Tensor, slice]]:
    """Attention of the instruction's last `window` tokens (None: all) to the prompt before them.

    Yields:
        (layer, probabilities [H_kv, G, n, N_c + N_v + N_t], the visual tokens among the keys), a
        layer in blocks of rows that have at most MAX_ELEMENTS probabilities, at least one row.
        The order of context and visual tokens among the keys does not matter: all are visible.
    Raises:
        ValueError: a shape or dtype is not as `States` says.
    """
    n_layers, n_text, n_q, head_dim, n_kv = text_shape(states.q_text, states.k_text)
    tensor_of("k_visual", states.k_visual, (n_layers, "N_v", n_kv, head_dim))
    scale = validate_scale(states.scale, head_dim)
    n_rows = n_text if window is None else min(n_text, positive_int("window", window))
    n_context = 0 if states.k_context is None else states.k_context.shape[1]
    visual = slice(n_context, n_context + states.k_visual.shape[1])
    key_positions = torch.arange(visual.stop + n_text, device=states.k_visual.device)
    step = max(1, MAX_ELEMENTS // (n_q * (visual.stop + n_text)))
    for layer in range(n_layers):
        parts = [states.k_visual[layer], states.k_text[layer]]
        if states.k_context is not None:
            parts.insert(0, states.k_context[layer])
        keys = torch.cat(parts)
        for first in range(n_text - n_rows, n_text, step):
            rows = slice(first, min(first + step, n_text))
            positions = key_positions[visual.stop :][rows]
            q = states.q_text[layer, rows]
            yield layer, causal_attention(q, keys, positions, key_positions, scale), visual


def accumulated_attention(
    states: States, window: int | None = None, weights: Tensor | None = None
) -> Tensor:
    """Attention that each visual token gets from the instruction, summed over its tokens.

    Args:
        window: only the last `window` instruction tokens count; None for all.
        weights: [L, H_q, n], by which the rows of the n tokens that count are multiplied.
    Returns:
        float32 [L, H_q, N_v]. No host sync.
    """
    n_layers, n_q = states.q_text.shape[0], states.q_text.shape[2]
    total = torch.zeros(
        (n_layers, n_q, states.k_visual.shape[1]),
        dtype=compute_dtype(states.q_text, states.k_visual),
        device=states.k_visual.device,
    )
    seen = [0] * n_layers  # rows
    for layer, probabilities, visual in instruction_attention(states, window):
        rows = probabilities[..., visual].flatten(0, 1)  # [H_q, n, N_v]
        if weights is not None:
            block = slice(seen[layer], seen[layer] + rows.shape[1])
            rows = rows * weights[layer, :, block, None].to(rows.dtype)
            seen[layer] = block.stop
        total[layer] += rows.sum(dim=1)
    return total.to(torch.float32)


def group_mean(scores: Tensor, n_kv: int) -> Tensor:
    """Mean over the query heads of each KV group: [L, H_q, N] to [L, H_kv, N]."""
    n_layers, n_q, n = scores.shape
    return scores.reshape(n_layers, n_kv, n_q // n_kv, n).mean(dim=2)


def visual_window_attention(states: States) -> Tensor:
    """Mean attention of the last visual tokens to the visual tokens (AirCache, table 5).

    Causal; the softmax runs over the visual keys, since no instruction is visible to them.

    Returns:
        float32 [L, H_kv, N_v]. No host sync.
    """
    assert states.q_visual is not None, "the policy asked for the queries of visual tokens"
    n_layers, n_visual, _, head_dim = states.k_visual.shape
    scale = validate_scale(states.scale, head_dim)
    key_positions = torch.arange(n_visual, device=states.k_visual.device)
    positions = key_positions[-states.q_visual.shape[1] :]
    return torch.stack(
        [
            causal_attention(
                states.q_visual[layer], states.k_visual[layer], positions, key_positions, scale
            ).mean(dim=(1, 2))
            for layer in range(n_layers)
        ]
    ).to(torch.float32)


def accumulate(
    total: Tensor, q: Tensor, k: Tensor, first: int, visual: Tensor, scale: float
) -> None:
    """Add one layer's attention of a prefill chunk to what each visual token has got so far.

    Args:
        total: float32 [H_kv, N_v], is changed: the mean over the query heads of a KV group.
        q: [n, H_q, D] queries of the positions first..first + n - 1.
        k: [T, H_kv, D] keys of the positions 0..T - 1, T >= first + n.
        visual: int64 [N_v] positions of the visual tokens, ascending; those at or behind T have no
            key yet and get nothing.
        scale: softmax scale.
    Memory: blocks of rows, as in `instruction_attention`. No host sync.
    """
    key_positions = torch.arange(k.shape[0], device=k.device)
    step = max(1, MAX_ELEMENTS // (q.shape[1] * k.shape[0]))
    known = visual < k.shape[0]
    source = visual.clamp_max(k.shape[0] - 1)
    for start in range(0, q.shape[0], step):
        rows = q[start : start + step]
        positions = torch.arange(rows.shape[0], device=k.device) + (first + start)
        probabilities = causal_attention(rows, k, positions, key_positions, scale)
        got = probabilities.sum(dim=2).mean(dim=1)[:, source]  # [H_kv, N_v]
        total += torch.where(known, got, 0.0).to(total.dtype)
