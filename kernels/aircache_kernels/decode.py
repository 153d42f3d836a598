# SPDX-License-Identifier: Apache-2.0
"""Decode attention over two streams: text tokens, and the packed cells of one layer.

Stage 1 walks tiles of keys, text and cells alike; stage 2 merges the tiles of a request. How a
request is cut follows from its own number of keys, so that its result does not depend on what else
is in the batch, and no program has more than its share of all tiles: a long uncompressed request
among short packed ones keeps no multiprocessor busy alone. Lengths are read on the device, so that
a CUDA graph replays. A request with gap_len 0 has all its tokens in the text stream. All addresses
are 64 bits wide.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from aircache_kernels import validation as check
from aircache_kernels.launch import dot_dtype, multiprocessors, power_of_2
from aircache_kernels.streams import (
    attend_cells,
    attend_text,
    read_cells,
    read_lengths,
    read_request,
)
from aircache_kernels.tables import Tables

TILE = 256  # keys; a request of more than TILE * most keys has longer tiles
MOST_TILES = 64  # of a request: stage 2 holds them all in registers
# Partial results of one launch, where the batch may decide into how many tiles a request is cut.
_PARTS = 4096
_FEWEST = 8
_ROWS = 256  # of one launch, where the batch may not decide
_PROGRAMS = 4  # of stage 1, a multiprocessor


class DecodeConfig(NamedTuple):
    """Launch shape of stage 1; the default follows head_dim and the KV type."""

    block_n: int
    num_warps: int
    num_stages: int


@triton.jit
def _cut(n, most, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Keys of a tile, and tiles, of a request with n >= 1 keys."""
    length = tl.cdiv(n, TILE * most) * TILE
    return length, tl.cdiv(n, length)


@triton.jit(do_not_specialize=["layer", "batch", "most"])
def _decode_stage1_kernel(  # type: ignore[no-untyped-def]
    q, k_all, v_all, req_to_token, req_pool_indices, seq_lens, gap_start, gap_len, cell_offset,
    part_out, part_lse, layer, batch, most,
    stride_qb, stride_qh, stride_kl, stride_kr, stride_kh, stride_vl, stride_vr, stride_vh,
    stride_r, scale,
    L: tl.constexpr, H_Q: tl.constexpr, GROUP: tl.constexpr, HEAD_TILES: tl.constexpr,
    HEAD_DIM: tl.constexpr, TILE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """grid (programs,); an item is (tile of a request, KV head, tile of its heads)"""
    layer = tl.cast(layer, tl.int64)
    d = tl.arange(0, BLOCK_D)
    others = tl.arange(0, BLOCK_B)
    lengths = read_lengths(
        others, batch, layer, req_pool_indices, seq_lens, gap_len, cell_offset, L
    )
    tile_keys, tiles = _cut(tl.maximum(lengths, 1), most, TILE)
    tiles = tl.where(others < batch, tiles, 0)
    ends = tl.cumsum(tiles, 0)
    heads_of_all: tl.constexpr = (H_Q // GROUP) * HEAD_TILES
    items = tl.sum(tiles, 0) * heads_of_all
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        index = item // heads_of_all
        b = tl.sum((ends <= index).to(tl.int32), 0)
        here = others == b
        tile = index - tl.sum(tl.where(here, ends - tiles, 0), 0)
        keys = tl.sum(tl.where(here, tile_keys, 0), 0)
        kv_head = tl.cast(item % heads_of_all // HEAD_TILES, tl.int64)
        local = (item % HEAD_TILES) * BLOCK_H + tl.arange(0, BLOCK_H)
        heads = kv_head * GROUP + local
        row, gap_first, gap, n_text = read_request(
            b, req_pool_indices, seq_lens, gap_start, gap_len
        )
        first_cell, n_cells = read_cells(cell_offset, row, layer, gap, L)
        begin = tile * keys
        end = tl.minimum(begin + keys, n_text + n_cells)
        known = (local[:, None] < GROUP) & (d[None, :] < HEAD_DIM)
        q_tile = tl.load(
            q + b.to(tl.int64) * stride_qb + heads[:, None] * stride_qh + d[None, :],
            mask=known,
            other=0.0,
        ).to(DOT)
        top = tl.full([BLOCK_H], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_H], dtype=tl.float32)
        acc = tl.zeros([BLOCK_H, BLOCK_D], dtype=tl.float32)
        table = req_to_token + row * stride_r
        k_base = kv_head * stride_kh
        v_base = kv_head * stride_vh
        top, total, acc = attend_text(
            q_tile, k_all, v_all, k_base + layer * stride_kl, v_base + layer * stride_vl,
            stride_kr, stride_vr, table, gap_first, gap, begin, tl.minimum(end, n_text),
            None, top, total, acc, scale, HEAD_DIM, BLOCK_N, BLOCK_D, DOT, False,
        )  # fmt: skip
        top, total, acc = attend_cells(
            q_tile, k_all, v_all, k_base, v_base, stride_kl, stride_kr, stride_vl, stride_vr,
            table + gap_first, first_cell + tl.maximum(begin - n_text, 0),
            first_cell + end - n_text, top, total, acc, scale,
            L, HEAD_DIM, BLOCK_N, BLOCK_D, DOT,
        )  # fmt: skip
        at = (b.to(tl.int64) * most + tile) * H_Q + heads
        tl.store(part_out + at[:, None] * HEAD_DIM + d[None, :], acc / total[:, None], mask=known)
        tl.store(part_lse + at, top + tl.log(total), mask=local < GROUP)


@triton.jit(do_not_specialize=["layer", "most"])
def _decode_stage2_kernel(  # type: ignore[no-untyped-def]
    part_out, part_lse, out, req_pool_indices, seq_lens, gap_start, gap_len, cell_offset,
    layer, most, stride_ob, stride_oh,
    L: tl.constexpr, H_Q: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grid (B, H_q)"""
    b = tl.program_id(0)
    head = tl.program_id(1)
    row, _, gap, n_text = read_request(b, req_pool_indices, seq_lens, gap_start, gap_len)
    _, n_cells = read_cells(cell_offset, row, tl.cast(layer, tl.int64), gap, L)
    _, tiles = _cut(tl.maximum(n_text + n_cells, 1), most, TILE)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    at = (b.to(tl.int64) * most + s) * H_Q + head
    part = tl.load(part_lse + at, mask=s < tiles, other=float("-inf"))
    values = tl.load(
        part_out + at[:, None] * HEAD_DIM + d[None, :],
        mask=(s[:, None] < tiles) & (d[None, :] < HEAD_DIM),
        other=0.0,
    )
    weight = tl.exp(part - tl.max(part, 0))
    merged = tl.sum(values * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + b.to(tl.int64) * stride_ob + head * stride_oh + d, merged, mask=d < HEAD_DIM)


def default_config(
    block_h: int, block_d: int, q_item_size: int, *, key_bytes: int = 8192
) -> DecodeConfig:
    """`key_bytes` of keys a step in the type of q; twice the warps where a step would spill.

    8 KiB: with 16, stage 1 would spill on compute capability 8.0.
    """
    block_n = max(16, min(64, key_bytes // (block_d * q_item_size)))
    wide = q_item_size * block_d > 512
    num_warps = 8 if block_h * block_d >= 8192 or wide else 4
    # two stages of float32 with head_dim 256 are more than an Ada block's 99 KiB
    return DecodeConfig(block_n, num_warps, num_stages=1 if wide else 3 if block_d <= 128 else 2)


def most_tiles(batch: int, *, batch_invariant: bool) -> int:
    """Tiles that a request may be cut into; all the same number where batches must not matter."""
    if batch_invariant:
        return MOST_TILES
    return max(_FEWEST, min(MOST_TILES, _PARTS // batch))


def decode_attention(
    q: Tensor,
    k_all: Tensor,
    v_all: Tensor,
    layer: int,
    tables: Tables,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    *,
    sm_scale: float,
    batch_invariant: bool = False,
    config: DecodeConfig | None = None,
) -> Tensor:
    """Attention of one new query per request over its text and its packed cells in one layer.

    Two launches, with `batch_invariant` two for each 256 requests; no host sync. Row 0 of the
    tables is uncompressed, so padded rows of a CUDA graph (req_pool_idx 0, seq_len 1) read one slot
    and give a finite result. Scratch of a launch: 4 * bs * most * H_q * (D + 1) bytes of
    `most_tiles`.

    Args:
        q: [bs, H_q, D]; float32, float16 or bfloat16; last dimension contiguous.
        k_all, v_all: [L, rows, H_kv, D]: dtype of q, or float8_e4m3fn.
        layer: whose planes and cells are read, 0 <= layer < L.
        tables: of R requests.
        req_pool_indices: int32 or int64 [bs], rows of the tables.
        seq_lens: int32 or int64 [bs], logical lengths, the new token included.
        sm_scale: softmax scale.
        batch_invariant: a request's result is the same, bit for bit, in every batch. Without it,
            it is the same in every batch of up to 64 requests, and in all of one size.
        config: launch shape of stage 1.
    Returns:
        [bs, H_q, D] of q's dtype.
    Raises:
        ValueError: a shape, dtype, device or value is not as above.
    """
    check.attention_of(q, None, k_all, v_all, layer, tables, req_pool_indices, seq_lens)
    scale = check.finite("sm_scale", sm_scale)
    n_layers, _, n_kv, _ = k_all.shape
    batch, n_q, head_dim = q.shape
    group, device = n_q // n_kv, q.device
    block_h = min(64, power_of_2(group, 16))
    head_tiles = triton.cdiv(group, block_h)
    block_d = power_of_2(head_dim, 16)
    config = config or default_config(block_h, block_d, q.element_size())
    step = min(batch, _ROWS) if batch_invariant else batch
    most = most_tiles(step, batch_invariant=batch_invariant)
    part_out = torch.empty(step, most, n_q, head_dim, dtype=torch.float32, device=device)
    part_lse = torch.empty(step, most, n_q, dtype=torch.float32, device=device)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    programs = min(_PROGRAMS * multiprocessors(device), step * most * n_kv * head_tiles)
    req_to_token, gap_start, gap_len, cell_offset = tables
    whole = (q, req_pool_indices, seq_lens, out)
    parts = [whole] if step == batch else zip(*(x.split(step) for x in whole), strict=True)
    for queries, requests, lengths, target in parts:
        n = len(queries)
        _decode_stage1_kernel[(programs,)](
            queries, k_all, v_all, req_to_token, requests, lengths, gap_start, gap_len, cell_offset,
            part_out, part_lse, layer, n, most,
            *q.stride()[:2], *k_all.stride()[:3], *v_all.stride()[:3], req_to_token.stride(0),
            scale,
            L=n_layers, H_Q=n_q, GROUP=group, HEAD_TILES=head_tiles, HEAD_DIM=head_dim, TILE=TILE,
            BLOCK_B=power_of_2(n, 16), BLOCK_H=block_h, BLOCK_N=config.block_n, BLOCK_D=block_d,
            DOT=dot_dtype(q.dtype), num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        _decode_stage2_kernel[(n, n_q)](
            part_out, part_lse, target, requests, lengths, gap_start, gap_len, cell_offset,
            layer, most, *out.stride()[:2],
            L=n_layers, H_Q=n_q, HEAD_DIM=head_dim, TILE=TILE, BLOCK_S=power_of_2(most),
            BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return out
