# SPDX-License-Identifier: Apache-2.0
"""The two streams of keys that decode and extend attention walk: text, then packed cells.

All addresses are 64 bits wide. Running state of a tile of queries: `top` and `total`, the maximum
and the sum of exponentials of the logits so far, and `acc`, the weighted values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aircache_kernels.launch import cell_address


@triton.jit
def read_request(  # type: ignore[no-untyped-def]
    b, req_pool_indices, seq_lens, gap_start, gap_len
):
    """Row of the tables, first token of the gap, its length, tokens outside it."""
    row = tl.load(req_pool_indices + b).to(tl.int64)
    gap = tl.load(gap_len + row)
    return row, tl.load(gap_start + row), gap, tl.load(seq_lens + b).to(tl.int32) - gap


@triton.jit
def read_cells(cell_offset, row, layer, gap, L: tl.constexpr):  # type: ignore[no-untyped-def]
    """First packed cell of a request in one layer, and their number."""
    first_cell = tl.load(cell_offset + row * (L + 1) + layer)
    n_cells = tl.load(cell_offset + row * (L + 1) + layer + 1) - first_cell
    return first_cell, tl.where(gap > 0, n_cells, 0)


@triton.jit
def read_lengths(  # type: ignore[no-untyped-def]
    b, batch, layer, req_pool_indices, seq_lens, gap_len, cell_offset, L: tl.constexpr
):
    """Keys of requests b [BLOCK_B] in one layer, text and cells; 0 from `batch` on."""
    known = b < batch
    rows = tl.load(req_pool_indices + b, mask=known, other=0).to(tl.int64)
    gap = tl.load(gap_len + rows, mask=known, other=0)
    text = tl.load(seq_lens + b, mask=known, other=0).to(tl.int32) - gap
    offsets = cell_offset + rows * (L + 1) + layer
    cells = tl.load(offsets + 1, mask=known, other=0) - tl.load(offsets, mask=known, other=0)
    return text + tl.where(gap > 0, cells, 0)


@triton.jit
def _attend_tile(  # type: ignore[no-untyped-def]
    q_tile, k_all, v_all, k_at, v_at, inside, visible, top, total, acc, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One online-softmax step over a tile of keys at row offsets k_at, v_at [BLOCK_N].

    inside: bool [BLOCK_N], keys that exist; visible: bool [1 or BLOCK_M, BLOCK_N], to each query.
    """
    d = tl.arange(0, BLOCK_D)
    k_tile = tl.load(
        k_all + k_at[None, :] + d[:, None],
        mask=inside[None, :] & (d[:, None] < HEAD_DIM),
        other=0.0,
    )
    logits = tl.dot(q_tile, k_tile.to(DOT), input_precision="ieee") * scale
    logits = tl.where(visible, logits, float("-inf"))
    v_tile = tl.load(
        v_all + v_at[:, None] + d[None, :],
        mask=inside[:, None] & (d[None, :] < HEAD_DIM),
        other=0.0,
    )
    # a query sees a key of the first tile that it meets, so the new maximum is finite
    new_top = tl.maximum(top, tl.max(logits, 1))
    rescale = tl.exp(top - new_top)
    weight = tl.exp(logits - new_top[:, None])
    total = total * rescale + tl.sum(weight, 1)
    acc = acc * rescale[:, None]
    acc += tl.dot(weight.to(DOT), v_tile.to(DOT), input_precision="ieee")
    return new_top, total, acc


@triton.jit
def attend_text(  # type: ignore[no-untyped-def]
    q_tile, k_all, v_all, k_base, v_base, stride_kr, stride_vr, slots, gap_first, gap, begin, end,
    seen, top, total, acc, scale,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """Text tokens [begin, end), counted without the gap; their slots lie around it.

    seen: int32 [BLOCK_M], the last text token that each query sees; read if CAUSAL.
    """
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        inside = j < end
        position = j + tl.where(j >= gap_first, gap, 0)
        slot = tl.load(slots + position, mask=inside, other=0).to(tl.int64)
        visible = inside[None, :]
        if CAUSAL:
            visible = visible & (j[None, :] <= seen[:, None])
        top, total, acc = _attend_tile(
            q_tile, k_all, v_all, k_base + slot * stride_kr, v_base + slot * stride_vr,
            inside, visible, top, total, acc, scale, HEAD_DIM, BLOCK_D, DOT,
        )  # fmt: skip
    return top, total, acc


@triton.jit
def attend_tree(  # type: ignore[no-untyped-def]
    q_tile, k_all, v_all, k_base, v_base, stride_kr, stride_vr, slots, tree, node, n_nodes,
    top, total, acc, scale,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr,
    N_TREE: tl.constexpr,
):  # fmt: skip
    """The nodes of a tree [0, n_nodes), each visible to those that follow it.

    slots: of the nodes; tree: uint8 [N_TREE, N_TREE]; node: int [BLOCK_M], the node of each query.
    """
    for start in range(0, n_nodes, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        inside = j < n_nodes
        slot = tl.load(slots + j, mask=inside, other=0).to(tl.int64)
        follows = tl.load(tree + node[:, None] * N_TREE + j[None, :], mask=inside[None, :], other=0)
        top, total, acc = _attend_tile(
            q_tile, k_all, v_all, k_base + slot * stride_kr, v_base + slot * stride_vr,
            inside, follows != 0, top, total, acc, scale, HEAD_DIM, BLOCK_D, DOT,
        )  # fmt: skip
    return top, total, acc


@triton.jit
def attend_cells(  # type: ignore[no-untyped-def]
    q_tile, k_all, v_all, k_base, v_base, stride_kl, stride_kr, stride_vl, stride_vr, columns,
    begin, end, top, total, acc, scale,
    L: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Packed cells [begin, end) of a request, all of them visible; columns: their slots."""
    for start in range(begin, end, BLOCK_N):
        cell = start + tl.arange(0, BLOCK_N)
        inside = cell < end
        column, plane = cell_address(cell, L)
        slot = tl.load(columns + column, mask=inside, other=0).to(tl.int64)
        plane = plane.to(tl.int64)
        top, total, acc = _attend_tile(
            q_tile, k_all, v_all,
            k_base + plane * stride_kl + slot * stride_kr,
            v_base + plane * stride_vl + slot * stride_vr,
            inside, inside[None, :], top, total, acc, scale, HEAD_DIM, BLOCK_D, DOT,
        )  # fmt: skip
    return top, total, acc
