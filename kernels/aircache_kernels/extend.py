# SPDX-License-Identifier: Apache-2.0
"""Extend attention over two streams: the new tokens of requests whose pictures are packed.

The new tokens stand behind the gap. Each sees the text up to itself and every packed cell. One
launch a layer; a request with gap_len 0 is plain causal attention.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aircache_kernels import validation as check
from aircache_kernels.decode import DecodeConfig, default_config
from aircache_kernels.launch import dot_dtype, power_of_2
from aircache_kernels.streams import attend_cells, attend_text, read_cells, read_request


@triton.jit
def _extend_fwd_kernel(  # type: ignore[no-untyped-def]
    q, qo_indptr, k_all, v_all, req_to_token, req_pool_indices, seq_lens, gap_start, gap_len,
    cell_offset, out, layer,
    stride_qt, stride_qh, stride_kl, stride_kr, stride_kh, stride_vl, stride_vr, stride_vh,
    stride_r, stride_ot, stride_oh, scale, logit_cap, v_scale,
    L: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HAS_CAP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """grid (query tiles, B, H_kv); a tile's rows are (token, head of the group), head fastest"""
    b = tl.program_id(1)
    kv_head = tl.program_id(2).to(tl.int64)
    first_token = tl.load(qo_indptr + b).to(tl.int64)
    n_new = (tl.load(qo_indptr + b + 1) - first_token).to(tl.int32)
    layer = tl.cast(layer, tl.int64)
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    if tl.program_id(0) * BLOCK_M < n_new * GROUP:
        row, gap_first, gap, n_text = read_request(
            b, req_pool_indices, seq_lens, gap_start, gap_len
        )
        first_cell, n_cells = read_cells(cell_offset, row, layer, gap, L)
        # rows past the end repeat the last token: every row sees a key
        token = tl.minimum(r // GROUP, n_new - 1)
        head = kv_head * GROUP + r % GROUP
        seen = n_text - n_new + token
        d = tl.arange(0, BLOCK_D)
        known = (r < n_new * GROUP)[:, None] & (d[None, :] < HEAD_DIM)
        q_tile = tl.load(
            q + (first_token + token)[:, None] * stride_qt + head[:, None] * stride_qh + d[None, :],
            mask=known,
            other=0.0,
        ).to(DOT)
        top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        table = req_to_token + row * stride_r
        k_base = kv_head * stride_kh
        v_base = kv_head * stride_vh
        top, total, acc = attend_text(
            q_tile, k_all, v_all, k_base + layer * stride_kl, v_base + layer * stride_vl,
            stride_kr, stride_vr, table, gap_first, gap, 0, tl.max(seen, 0) + 1,
            seen, top, total, acc, scale, logit_cap,
            HEAD_DIM, BLOCK_N, BLOCK_D, HAS_CAP, DOT, True,
        )  # fmt: skip
        top, total, acc = attend_cells(
            q_tile, k_all, v_all, k_base, v_base, stride_kl, stride_kr, stride_vl, stride_vr,
            table + gap_first, first_cell, first_cell + n_cells,
            top, total, acc, scale, logit_cap,
            L, HEAD_DIM, BLOCK_N, BLOCK_D, HAS_CAP, DOT,
        )  # fmt: skip
        at = (first_token + token)[:, None] * stride_ot + head[:, None] * stride_oh + d[None, :]
        tl.store(out + at, acc / total[:, None] * v_scale, mask=known)


def extend_attention(
    q: Tensor,
    qo_indptr: Tensor,
    k_all: Tensor,
    v_all: Tensor,
    layer: int,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    gap_start: Tensor,
    gap_len: Tensor,
    cell_offset: Tensor,
    *,
    max_qo_len: int,
    sm_scale: float,
    logit_cap: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out: Tensor | None = None,
    config: DecodeConfig | None = None,
) -> Tensor:
    """Attention of the last tokens of each request, whose K and V are in the pool, in one layer.

    One launch, no host sync. With B requests:

    Args:
        q: [total_qo, H_q, D]; float32, float16 or bfloat16; last dimension contiguous.
        qo_indptr: int32 [B + 1]; the rows qo_indptr[b]:qo_indptr[b + 1] of q are the last tokens
            of request b, all of them behind its gap.
        k_all, v_all ... cell_offset: as in `decode_attention`; seq_lens count the new tokens.
        max_qo_len: the most new tokens of a request (known on the host).
        sm_scale, logit_cap, k_scale, v_scale: as in `decode_attention`.
        out: [total_qo, H_q, D] of q's dtype to write to; last dimension contiguous.
        config: launch shape.
    Returns:
        out.
    Raises:
        ValueError: a shape, dtype, device or value is not as above.
    """
    out = check.attention_of(
        q, "total_qo", k_all, v_all, layer, req_to_token, req_pool_indices, seq_lens,
        gap_start, gap_len, cell_offset, out,
    )  # fmt: skip
    n_layers, n_kv = k_all.shape[0], k_all.shape[2]
    batch, (_, n_q, head_dim) = req_pool_indices.shape[0], q.shape
    group = n_q // n_kv
    check.tensor_of("qo_indptr", qo_indptr, (batch + 1,), torch.int32, q.device)
    check.contiguous("qo_indptr", qo_indptr)
    check.int_in("max_qo_len", max_qo_len, 1)
    scale, cap = check.logits_of(sm_scale, k_scale, logit_cap)

    block_m = min(64, power_of_2(max_qo_len * group, 16))
    block_d = power_of_2(head_dim, 16)
    config = config or default_config(block_m, block_d, q.element_size())
    _extend_fwd_kernel[(triton.cdiv(max_qo_len * group, block_m), batch, n_kv)](
        q, qo_indptr, k_all, v_all, req_to_token, req_pool_indices, seq_lens, gap_start, gap_len,
        cell_offset, out, layer,
        *q.stride()[:2], *k_all.stride()[:3], *v_all.stride()[:3], req_to_token.stride(0),
        *out.stride()[:2], scale, cap, float(v_scale),
        L=n_layers, GROUP=group, HEAD_DIM=head_dim, BLOCK_M=block_m, BLOCK_N=config.block_n,
        BLOCK_D=block_d, HAS_CAP=cap > 0.0, DOT=dot_dtype(q.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out
