# SPDX-License-Identifier: Apache-2.0
"""Extend attention over two streams: the new tokens of requests whose pictures are packed.

The new tokens stand behind the gap. Each sees the text before them, every packed cell, and of the
new tokens those up to itself or, where they are the drafts of a tree, those that it follows. One
launch a layer; a request with gap_len 0 is plain attention.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aircache_kernels import validation as check
from aircache_kernels.decode import default_config
from aircache_kernels.launch import dot_dtype, power_of_2
from aircache_kernels.streams import (
    attend_cells,
    attend_text,
    attend_tree,
    read_cells,
    read_request,
)
from aircache_kernels.tables import Tables

# Rows of a tile, (token, head of the group); one number, so that no batch changes a result.
_BLOCK_M = 64


@triton.jit(do_not_specialize=["layer"])
def _extend_fwd_kernel(  # type: ignore[no-untyped-def]
    q, qo_indptr, k_all, v_all, req_to_token, req_pool_indices, seq_lens, gap_start, gap_len,
    cell_offset, tree, out, layer,
    stride_qt, stride_qh, stride_kl, stride_kr, stride_kh, stride_vl, stride_vr, stride_vh,
    stride_r, stride_ot, stride_oh, scale,
    L: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr, N_TREE: tl.constexpr,
):  # fmt: skip
    """grid (query tiles, B, H_kv); a tile's rows are (token, head of the group), head fastest

    N_TREE: nodes of a tree; 0 if the new tokens follow one another.
    """
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
        # with a tree no more than the text that all of its nodes follow
        end = n_text - n_new if N_TREE else tl.max(seen, 0) + 1
        top, total, acc = attend_text(
            q_tile, k_all, v_all, k_base + layer * stride_kl, v_base + layer * stride_vl,
            stride_kr, stride_vr, table, gap_first, gap, 0, end,
            seen, top, total, acc, scale, HEAD_DIM, BLOCK_N, BLOCK_D, DOT, N_TREE == 0,
        )  # fmt: skip
        if N_TREE:
            top, total, acc = attend_tree(
                q_tile, k_all, v_all, k_base + layer * stride_kl, v_base + layer * stride_vl,
                stride_kr, stride_vr, table + gap + end, tree + b.to(tl.int64) * N_TREE * N_TREE,
                token, n_new, top, total, acc, scale, HEAD_DIM, BLOCK_N, BLOCK_D, DOT, N_TREE,
            )  # fmt: skip
        top, total, acc = attend_cells(
            q_tile, k_all, v_all, k_base, v_base, stride_kl, stride_kr, stride_vl, stride_vr,
            table + gap_first, first_cell, first_cell + n_cells,
            top, total, acc, scale, L, HEAD_DIM, BLOCK_N, BLOCK_D, DOT,
        )  # fmt: skip
        at = (first_token + token)[:, None] * stride_ot + head[:, None] * stride_oh + d[None, :]
        tl.store(out + at, acc / total[:, None], mask=known)


def extend_attention(
    q: Tensor,
    qo_indptr: Tensor,
    k_all: Tensor,
    v_all: Tensor,
    layer: int,
    tables: Tables,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    *,
    max_qo_len: int,
    sm_scale: float,
    tree: Tensor | None = None,
) -> Tensor:
    """Attention of the last tokens of each request, whose K and V are in the pool, in one layer.

    One launch, no host sync; a request's result is the same, bit for bit, in every batch. With B
    requests:

    Args:
        q: [total_qo, H_q, D]; float32, float16 or bfloat16; last dimension contiguous.
        qo_indptr: int32 [B + 1]; the rows qo_indptr[b]:qo_indptr[b + 1] of q are the last tokens
            of request b, all of them behind its gap.
        k_all, v_all ... sm_scale: as in `decode_attention`; seq_lens count the new tokens.
        max_qo_len: the most new tokens of a request (known on the host).
        tree: bool [B, max_qo_len, max_qo_len], contiguous: whether new token i of a request follows
            its new token j, itself and the first one included; None if they follow one another.
    Returns:
        [total_qo, H_q, D] of q's dtype.
    Raises:
        ValueError: a shape, dtype, device or value is not as above.
    """
    check.attention_of(q, "total_qo", k_all, v_all, layer, tables, req_pool_indices, seq_lens)
    scale = check.finite("sm_scale", sm_scale)
    n_layers, _, n_kv, _ = k_all.shape
    batch, (_, n_q, head_dim) = req_pool_indices.shape[0], q.shape
    group = n_q // n_kv
    check.tensor_of("qo_indptr", qo_indptr, (batch + 1,), torch.int32, q.device)
    check.contiguous("qo_indptr", qo_indptr)
    check.int_in("max_qo_len", max_qo_len, 1)
    if tree is not None:
        check.tensor_of("tree", tree, (batch, max_qo_len, max_qo_len), torch.bool, q.device)
        check.contiguous("tree", tree)
    block_d = power_of_2(head_dim, 16)
    config = default_config(_BLOCK_M, block_d, q.element_size(), key_bytes=16384)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    req_to_token, gap_start, gap_len, cell_offset = tables
    _extend_fwd_kernel[(triton.cdiv(max_qo_len * group, _BLOCK_M), batch, n_kv)](
        q, qo_indptr, k_all, v_all, req_to_token, req_pool_indices, seq_lens, gap_start, gap_len,
        cell_offset, qo_indptr if tree is None else tree.view(torch.uint8), out, layer,
        *q.stride()[:2], *k_all.stride()[:3], *v_all.stride()[:3], req_to_token.stride(0),
        *out.stride()[:2], scale,
        L=n_layers, GROUP=group, HEAD_DIM=head_dim, BLOCK_M=_BLOCK_M, BLOCK_N=config.block_n,
        BLOCK_D=block_d, DOT=dot_dtype(q.dtype), N_TREE=0 if tree is None else max_qo_len,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out
