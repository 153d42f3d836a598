# SPDX-License-Identifier: Apache-2.0
"""Gated delta net in plain torch, for SGLang's hybrid models on a CPU, where it has only Triton.

For small tests: the prefill is a loop over tokens, in float32. What is left of SGLang's Triton
kernels runs in Triton's interpreter.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.nn import functional


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    query_start_loc: torch.Tensor,
    cache_indices: torch.Tensor,
    has_initial_state: torch.Tensor,
    conv_states: torch.Tensor,
    activation: str | None = "silu",
    **_: Any,
) -> torch.Tensor:
    """x: [channels, tokens] of all requests; conv_states: [slots, channels, width - 1]."""
    out = torch.empty_like(x)
    width = weight.shape[1]
    bounds = query_start_loc.tolist()
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        slot = int(cache_indices[i])
        if end == start or slot < 0:
            continue
        state = conv_states[slot]
        past = state if bool(has_initial_state[i]) else torch.zeros_like(state)
        row = torch.cat([past.to(x.dtype), x[:, start:end]], dim=1)
        y = functional.conv1d(row[None], weight[:, None], bias, groups=len(weight))[0]
        out[:, start:end] = functional.silu(y) if activation in ("silu", "swish") else y
        state.copy_(row[:, -(width - 1) :])
    return out


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = "silu",
    conv_state_indices: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """x: [batch, channels], one token a request."""
    assert conv_state_indices is not None
    slots = conv_state_indices.long()
    valid = slots >= 0
    row = torch.cat([conv_state[slots.clamp_min(0)].to(x.dtype), x[:, :, None]], dim=2)
    y = (row * weight).sum(dim=2)
    if bias is not None:
        y = y + bias
    conv_state[slots[valid]] = row[valid, :, 1:].to(conv_state.dtype)
    return functional.silu(y) if activation in ("silu", "swish") else y


def gating(
    a_log: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dt_bias: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log decay and write strength, [1, tokens, value heads]."""
    g = -a_log.float().exp() * functional.softplus(a.float() + dt_bias.float())
    return g[None], b.float().sigmoid()[None]


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
) -> torch.Tensor:
    """One request: q, k [T, H, K], v [T, HV, V]; `state` [HV, V, K] is updated. Returns as v."""
    group = v.shape[1] // q.shape[1]
    q, k = (_normalized(x.float()).repeat_interleave(group, dim=1) for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    s = state.float()
    outputs = []
    for t in range(len(v)):
        s = s * g[t].exp()[:, None, None]
        error = v[t].float() - (s @ k[t][..., None])[..., 0]
        s = s + (beta[t][:, None] * error)[..., None] * k[t][:, None]
        outputs.append((s @ q[t][..., None])[..., 0])
    state.copy_(s)
    return torch.stack(outputs).to(v.dtype)


def _normalized(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6)


def _extend(
    _: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    ssm_states: torch.Tensor,
    cache_indices: torch.Tensor,
    query_start_loc: torch.Tensor,
    **__: Any,
) -> tuple[torch.Tensor, None, None]:
    out = torch.zeros_like(v)
    bounds = query_start_loc.tolist()
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        slot, part = int(cache_indices[i]), slice(start, end)
        if end > start and slot >= 0:
            state = ssm_states[slot]
            out[0, part] = delta_rule(
                q[0, part], k[0, part], v[0, part], g[0, part], beta[0, part], state
            )
    return out, None, None


def _decode(
    _: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    ssm_states: torch.Tensor,
    cache_indices: torch.Tensor,
    query_start_loc: torch.Tensor,
    **__: Any,
) -> torch.Tensor:
    g, beta = gating(A_log, a, b, dt_bias)
    out, _, _ = _extend(
        None,
        *(q, k, v, g, beta),
        ssm_states=ssm_states,
        cache_indices=cache_indices,
        query_start_loc=query_start_loc,
    )
    return out


def _gated_norm(self: Any, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
    """RMSNorm, then the gate; of kernels/ops/attention/fla/layernorm_gated.py."""
    assert self.norm_before_gate and self.group_size is None
    y = x.float() * torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + self.eps)
    y = y * self.weight.float()
    return (y if z is None else y * functional.silu(z.float())).to(x.dtype)


def split_projections(
    mixed_qkvz: torch.Tensor,
    mixed_ba: torch.Tensor,
    num_heads_qk: int,
    num_heads_v: int,
    head_qk: int,
    head_v: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(qkv, z, b, a) of fused projections; all q, all k, all v, all z stand side by side."""
    qkv, z = mixed_qkvz.split(
        [2 * num_heads_qk * head_qk + num_heads_v * head_v, num_heads_v * head_v], dim=1
    )
    b, a = mixed_ba.split([num_heads_v, num_heads_v], dim=1)
    return qkv.contiguous(), z.reshape(-1, num_heads_v, head_v), b.contiguous(), a.contiguous()


def gate_outputs(
    attention: torch.Tensor, gate: torch.Tensor, inplace: bool = False, quant: bool = False
) -> torch.Tensor:
    """attention * sigmoid(gate); attention: [tokens, H * D], gate: that or [tokens, H, D]."""
    assert not quant, "a plain CPU has no quantized output"
    return attention.mul_(gate.reshape(attention.shape).sigmoid())


def add_gated(
    hidden: torch.Tensor, gate: torch.Tensor, shared: torch.Tensor, total: torch.Tensor
) -> None:
    """total += shared * sigmoid(hidden @ gate); of a shared expert; gate: [hidden size]."""
    total.add_(shared * (hidden @ gate)[:, None].sigmoid())


def serve_hybrids() -> None:
    """Put these functions in the places of SGLang's kernels, in this process.

    Before the attention backend is built, which takes them up.
    """
    from sglang.kernels.ops.attention.fla import layernorm_gated
    from sglang.srt.layers.attention.linear import gdn_backend
    from sglang.srt.models import qwen2_moe, qwen3_5

    gdn_backend.causal_conv1d_fn = causal_conv1d_fn
    gdn_backend.causal_conv1d_update = causal_conv1d_update
    gdn_backend.fused_gdn_gating = gating
    kernel = gdn_backend.TritonGDNKernel
    kernel.supports_packed_decode = False
    kernel.extend = _extend
    kernel.decode = _decode
    layernorm_gated.RMSNorm.forward = _gated_norm
    qwen2_moe.fused_gate_sigmoid_mul_add = add_gated
    qwen3_5.fused_sigmoid_mul = gate_outputs
    qwen3_5.fused_qkvzba_split_reshape_cat_contiguous = split_projections
