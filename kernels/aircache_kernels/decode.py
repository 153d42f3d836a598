# SPDX-License-Identifier: Apache-2.0
"""Decode attention over two streams: text tokens, and the packed cells of one layer.

`build_text_csr` runs once a step and serves every layer: the slots of all tokens outside the gaps.
`decode_attention` runs once a layer: stage 1 walks a share of text and cells (split KV), stage 2
merges the shares. Compressed and uncompressed requests go through the same launch; a request with
gap_len 0 has all its tokens in the text stream. All addresses are 64 bits wide.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from aircache_kernels import validation as check
from aircache_kernels.launch import dot_dtype, multiprocessors, power_of_2
from aircache_kernels.streams import attend_cells, attend_text, read_cells, read_request

_CSR_CHUNKS = 8
_MAX_SPLITS = 64


class DecodeConfig(NamedTuple):
    """Launch shape of stage 1; the default follows head_dim and the KV type."""

    block_n: int
    num_warps: int
    num_stages: int


@triton.jit
def _text_csr_kernel(  # type: ignore[no-untyped-def]
    req_to_token, req_pool_indices, seq_lens, gap_start, gap_len, indptr, indices,
    stride_r, capacity, batch, BLOCK_B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grid (B, chunks)"""
    b = tl.program_id(0)
    others = tl.arange(0, BLOCK_B)
    rows = tl.load(req_pool_indices + others, mask=others < batch, other=0).to(tl.int64)
    lengths = tl.load(seq_lens + others, mask=others < batch, other=0).to(tl.int32)
    lengths -= tl.load(gap_len + rows, mask=others < batch, other=0)
    begin = tl.sum(tl.where(others < b, lengths, 0), 0)
    row, gap_first, gap, n = read_request(b, req_pool_indices, seq_lens, gap_start, gap_len)
    if tl.program_id(1) == 0:
        tl.store(indptr + b + 1, begin + n)
        if b == 0:
            tl.store(indptr, 0)
    for start in range(tl.program_id(1) * BLOCK, n, BLOCK * tl.num_programs(1)):
        j = start + tl.arange(0, BLOCK)
        position = j + tl.where(j >= gap_first, gap, 0)
        slot = tl.load(req_to_token + row * stride_r + position, mask=j < n, other=0)
        tl.store(indices + begin + j, slot, mask=(j < n) & (begin + j < capacity))


@triton.jit
def _decode_stage1_kernel(  # type: ignore[no-untyped-def]
    q, k_all, v_all, req_to_token, req_pool_indices, seq_lens, gap_start, gap_len, cell_offset,
    text_indptr, text_indices, part_out, part_lse, layer,
    stride_qb, stride_qh, stride_kl, stride_kr, stride_kh, stride_vl, stride_vr, stride_vh,
    stride_r, scale, logit_cap,
    L: tl.constexpr, H_Q: tl.constexpr, GROUP: tl.constexpr, HEAD_TILES: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_CSR: tl.constexpr, HAS_CAP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """grid (B, H_kv * head tiles, splits)"""
    b = tl.program_id(0)
    kv_head = (tl.program_id(1) // HEAD_TILES).to(tl.int64)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    local = (tl.program_id(1) % HEAD_TILES) * BLOCK_H + tl.arange(0, BLOCK_H)
    heads = kv_head * GROUP + local
    row, gap_first, gap, n_text = read_request(b, req_pool_indices, seq_lens, gap_start, gap_len)
    layer = tl.cast(layer, tl.int64)
    first_cell, n_cells = read_cells(cell_offset, row, layer, gap, L)
    n = n_text + n_cells
    # shares are whole tiles; a share may hold the end of the text and the first cells
    share = tl.cdiv(tl.cdiv(n, splits), BLOCK_N) * BLOCK_N
    begin = split * share
    end = tl.minimum(begin + share, n)
    d = tl.arange(0, BLOCK_D)
    top = tl.full([BLOCK_H], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_H], dtype=tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], dtype=tl.float32)
    at = (b.to(tl.int64) * H_Q + heads) * splits + split
    if begin < end:
        q_tile = tl.load(
            q + b.to(tl.int64) * stride_qb + heads[:, None] * stride_qh + d[None, :],
            mask=(local[:, None] < GROUP) & (d[None, :] < HEAD_DIM),
            other=0.0,
        ).to(DOT)
        table = req_to_token + row * stride_r
        text, text_gap = table, gap
        if HAS_CSR:
            text, text_gap = text_indices + tl.load(text_indptr + b), 0
        k_base = kv_head * stride_kh
        v_base = kv_head * stride_vh
        top, total, acc = attend_text(
            q_tile, k_all, v_all, k_base + layer * stride_kl, v_base + layer * stride_vl,
            stride_kr, stride_vr, text, gap_first, text_gap, begin, tl.minimum(end, n_text),
            None, top, total, acc, scale, logit_cap,
            HEAD_DIM, BLOCK_N, BLOCK_D, HAS_CAP, DOT, False,
        )  # fmt: skip
        top, total, acc = attend_cells(
            q_tile, k_all, v_all, k_base, v_base, stride_kl, stride_kr, stride_vl, stride_vr,
            table + gap_first, first_cell + tl.maximum(begin - n_text, 0),
            first_cell + end - n_text, top, total, acc, scale, logit_cap,
            L, HEAD_DIM, BLOCK_N, BLOCK_D, HAS_CAP, DOT,
        )  # fmt: skip
        tl.store(
            part_out + at[:, None] * HEAD_DIM + d[None, :],
            acc / total[:, None],
            mask=(local[:, None] < GROUP) & (d[None, :] < HEAD_DIM),
        )
        tl.store(part_lse + at, top + tl.log(total), mask=local < GROUP)
    else:
        tl.store(part_lse + at, top, mask=local < GROUP)


@triton.jit
def _decode_stage2_kernel(  # type: ignore[no-untyped-def]
    part_out, part_lse, out, lse, stride_ob, stride_oh, splits, v_scale,
    H_Q: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_LSE: tl.constexpr,
):  # fmt: skip
    """grid (B, H_q)"""
    b = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    at = (b * H_Q + head) * splits + s
    part = tl.load(part_lse + at, mask=s < splits, other=float("-inf"))
    some = part > float("-inf")
    top = tl.max(part, 0)
    top = tl.where(top > float("-inf"), top, 0.0)
    weight = tl.where(some, tl.exp(part - top), 0.0)
    total = tl.sum(weight, 0)
    # a split without keys has written no output: it is not read
    values = tl.load(
        part_out + at[:, None] * HEAD_DIM + d[None, :],
        mask=some[:, None] & (d[None, :] < HEAD_DIM),
        other=0.0,
    )
    seen = tl.where(total > 0.0, total, 1.0)
    merged = tl.sum(values * weight[:, None], 0) / seen * v_scale
    tl.store(out + b * stride_ob + head * stride_oh + d, merged, mask=d < HEAD_DIM)
    if HAS_LSE:
        value = tl.where(total > 0.0, top + tl.log(seen), float("-inf"))
        tl.store(lse + b * H_Q + head, value)


def build_text_csr(
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    gap_start: Tensor,
    gap_len: Tensor,
    *,
    text_indptr: Tensor,
    text_indices: Tensor,
) -> tuple[Tensor, Tensor]:
    """Slots of the tokens outside the gaps, shared by all layers. One launch, no host sync.

    Args:
        req_to_token: int32 [R, max_context].
        req_pool_indices: int32 or int64 [bs], rows of the tables.
        seq_lens: int32 or int64 [bs], logical lengths.
        gap_start, gap_len: int32 [R]; gap_len 0 is uncompressed.
        text_indptr: int32 [bs + 1], written.
        text_indices: int32 [capacity], written from 0; never past its end.
    Returns:
        text_indptr, text_indices.
    """
    batch = check.requests_of(req_to_token, req_pool_indices, seq_lens, gap_start, gap_len)
    device = req_to_token.device
    check.tensor_of("text_indptr", text_indptr, (batch + 1,), torch.int32, device)
    check.contiguous("text_indptr", text_indptr)
    check.tensor_of("text_indices", text_indices, ("capacity",), torch.int32, device)
    check.contiguous("text_indices", text_indices)
    _text_csr_kernel[(batch, _CSR_CHUNKS)](
        req_to_token, req_pool_indices, seq_lens, gap_start, gap_len, text_indptr, text_indices,
        req_to_token.stride(0), text_indices.shape[0], batch,
        BLOCK_B=power_of_2(batch, 16), BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return text_indptr, text_indices


def default_config(block_h: int, block_d: int, q_item_size: int) -> DecodeConfig:
    """16 KiB of keys a tile in the type of q; twice the warps where a tile would spill."""
    block_n = max(16, min(64, 16384 // (block_d * q_item_size)))
    wide = q_item_size * block_d > 512
    num_warps = 8 if block_h * block_d > 8192 or wide else 4
    # two stages of float32 with head_dim 256 are more than an Ada block's 99 KiB
    return DecodeConfig(block_n, num_warps, num_stages=1 if wide else 3 if block_d <= 128 else 2)


def default_kv_splits(batch: int, head_tiles: int, device: torch.device) -> int:
    """Splits that give each multiprocessor about four programs, at most 64."""
    return max(1, min(_MAX_SPLITS, 4 * multiprocessors(device) // (batch * head_tiles)))


def decode_attention(
    q: Tensor,
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
    sm_scale: float,
    logit_cap: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    text_indptr: Tensor | None = None,
    text_indices: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    num_kv_splits: int | None = None,
    config: DecodeConfig | None = None,
) -> Tensor:
    """Attention of one new query per request over its text and its packed cells in one layer.

    Two launches, no host sync. Row 0 of the tables is uncompressed, so padded rows of a CUDA graph
    (req_pool_idx 0, seq_len 1) read one slot and give a finite result.

    Args:
        q: [bs, H_q, D]; float32, float16 or bfloat16.
        k_all, v_all: [L, rows, H_kv, D]: dtype of q, or float8_e4m3fn.
        layer: whose planes and cells are read, 0 <= layer < L.
        req_to_token: int32 [R, max_context].
        req_pool_indices: int32 or int64 [bs], rows of the tables.
        seq_lens: int32 or int64 [bs], logical lengths, the new token included.
        gap_start, gap_len: int32 [R], the visual span of a compressed request; gap_len 0 is
            uncompressed. Columns are the slots req_to_token[r, gap_start + c].
        cell_offset: int32 [R, L + 1], prefix sums of the layer budgets.
        sm_scale: softmax scale.
        logit_cap: cap of cap * tanh(logit / cap); 0 for none.
        k_scale, v_scale: what fp8 keys and values are multiplied by.
        text_indptr, text_indices: from `build_text_csr` of this step; None reads req_to_token.
        out: [bs, H_q, D] of q's dtype to write to; last dimension contiguous.
        lse: float32 [bs, H_q], the natural log-sum-exp, written if given.
        num_kv_splits: how many programs share a request's keys, at most 64; None chooses by bs.
        config: launch shape of stage 1.
    Returns:
        out.
    Raises:
        ValueError: a shape, dtype, device or value is not as above.
    """
    out = check.attention_of(
        q, None, k_all, v_all, layer, req_to_token, req_pool_indices, seq_lens,
        gap_start, gap_len, cell_offset, out,
    )  # fmt: skip
    n_layers, n_kv = k_all.shape[0], k_all.shape[2]
    batch, n_q, head_dim = q.shape
    group, device = n_q // n_kv, q.device
    if (text_indptr is None) != (text_indices is None):
        raise ValueError("text_indptr and text_indices must be given together")
    if text_indptr is not None and text_indices is not None:
        check.tensor_of("text_indptr", text_indptr, (batch + 1,), torch.int32, device)
        check.tensor_of("text_indices", text_indices, ("capacity",), torch.int32, device)
        check.contiguous("text_indices", text_indices)
    scale, cap = check.logits_of(sm_scale, k_scale, logit_cap)
    if lse is not None:
        check.tensor_of("lse", lse, (batch, n_q), torch.float32, device)
        check.contiguous("lse", lse)

    block_h = min(64, power_of_2(group, 16))
    head_tiles = triton.cdiv(group, block_h)
    splits = num_kv_splits
    if splits is None:
        splits = default_kv_splits(batch, n_kv * head_tiles, device)
    check.int_in("num_kv_splits", splits, 1, _MAX_SPLITS)
    block_d = power_of_2(head_dim, 16)
    config = config or default_config(block_h, block_d, q.element_size())
    part_out = torch.empty(batch, n_q, splits, head_dim, dtype=torch.float32, device=device)
    part_lse = torch.empty(batch, n_q, splits, dtype=torch.float32, device=device)
    _decode_stage1_kernel[(batch, n_kv * head_tiles, splits)](
        q, k_all, v_all, req_to_token, req_pool_indices, seq_lens, gap_start, gap_len, cell_offset,
        text_indptr, text_indices, part_out, part_lse, layer,
        *q.stride()[:2], *k_all.stride()[:3], *v_all.stride()[:3], req_to_token.stride(0),
        scale, cap,
        L=n_layers, H_Q=n_q, GROUP=group, HEAD_TILES=head_tiles, HEAD_DIM=head_dim,
        BLOCK_H=block_h, BLOCK_N=config.block_n, BLOCK_D=block_d,
        HAS_CSR=text_indptr is not None, HAS_CAP=cap > 0.0, DOT=dot_dtype(q.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    _decode_stage2_kernel[(batch, n_q)](
        part_out, part_lse, out, lse, *out.stride()[:2], splits, float(v_scale),
        H_Q=n_q, HEAD_DIM=head_dim, BLOCK_S=power_of_2(splits), BLOCK_D=block_d,
        HAS_LSE=lse is not None, num_warps=4,
    )  # fmt: skip
    return out
