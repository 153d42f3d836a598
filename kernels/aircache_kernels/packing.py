# SPDX-License-Identifier: Apache-2.0
"""Gathers the kept K and V rows and scatters them into the cells of the columns.

Plain: one launch, no scratch; the columns must be disjoint from the visual slots.
In place: the columns may be any of the visual slots, of this request or another of the batch. Every
row element moves within its own (K or V, head, position in the row), so slices of these components
move one after another, each gathered in full before it is scattered. Two launches a slice. Scratch:
max(max_scratch_bytes, 16 * L * total_columns) bytes, never more than the packed K and V.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aircache_kernels import validation as check
from aircache_kernels.launch import INTERPRETED, cell_address, power_of_2

DEFAULT_SCRATCH_BYTES = 64 << 20


@triton.jit
def _cell_source(  # type: ignore[no-untyped-def]
    cell, inside, b, head, selected, kv_indptr, kv_indices, cell_offset, column_indptr,
    stride_sh, L: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Layer and slot that the survivor of a cell comes from, for one KV head."""
    l = tl.arange(0, BLOCK_L)
    ends = tl.load(cell_offset + b * (L + 1) + 1 + l, mask=l < L, other=2147483647)
    layer = tl.sum((ends[None, :] <= cell[:, None]).to(tl.int32), 1)
    at = tl.load(column_indptr + b).to(tl.int64) * L + cell
    ordinal = tl.load(selected + head * stride_sh + at, mask=inside, other=0)
    kv_start = tl.load(kv_indptr + b).to(tl.int64)
    slot = tl.load(kv_indices + kv_start + ordinal, mask=inside, other=0)
    return layer.to(tl.int64), slot.to(tl.int64)


@triton.jit
def _cell_target(  # type: ignore[no-untyped-def]
    cell, inside, b, column_indptr, column_indices, L: tl.constexpr
):
    """Plane and slot of a cell."""
    column, plane = cell_address(cell, L)
    first = tl.load(column_indptr + b).to(tl.int64)
    slot = tl.load(column_indices + first + column, mask=inside, other=0)
    return plane.to(tl.int64), slot.to(tl.int64)


@triton.jit(do_not_specialize=["stride_sh"])
def _pack_fwd_kernel(  # type: ignore[no-untyped-def]
    k_all, v_all, selected, kv_indptr, kv_indices, cell_offset, column_indptr, column_indices,
    stride_kl, stride_kr, stride_kh, stride_vl, stride_vr, stride_vh, stride_sh,
    L: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grid (cell tiles, H_kv, B)"""
    head = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2)
    n_cells = (tl.load(column_indptr + b + 1) - tl.load(column_indptr + b)) * L
    cell = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cell < n_cells
    layer, source = _cell_source(
        cell, inside, b, head, selected, kv_indptr, kv_indices, cell_offset, column_indptr,
        stride_sh, L, BLOCK_L,
    )  # fmt: skip
    plane, target = _cell_target(cell, inside, b, column_indptr, column_indices, L)
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (d[None, :] < HEAD_DIM)
    k_base = k_all + head * stride_kh + d[None, :]
    v_base = v_all + head * stride_vh + d[None, :]
    k_row = tl.load(k_base + (layer * stride_kl + source * stride_kr)[:, None], mask=mask)
    v_row = tl.load(v_base + (layer * stride_vl + source * stride_vr)[:, None], mask=mask)
    tl.store(k_base + (plane * stride_kl + target * stride_kr)[:, None], k_row, mask=mask)
    tl.store(v_base + (plane * stride_vl + target * stride_vr)[:, None], v_row, mask=mask)


@triton.jit(do_not_specialize=["stride_sh", "total_cells", "first_unit", "d0", "width"])
def _stage_fwd_kernel(  # type: ignore[no-untyped-def]
    k_all, v_all, scratch, selected, kv_indptr, kv_indices, cell_offset, column_indptr,
    column_indices, stride_kl, stride_kr, stride_kh, stride_vl, stride_vr, stride_vh, stride_sh,
    total_cells, first_unit, d0, width,
    H_KV: tl.constexpr, L: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """grid (cell tiles, units, B); unit u is head u of K, or head u - H_kv of V"""
    local = tl.program_id(1)
    unit = first_unit + local
    b = tl.program_id(2)
    head = (unit % H_KV).to(tl.int64)
    before = tl.load(column_indptr + b)
    n_cells = (tl.load(column_indptr + b + 1) - before) * L
    cell = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cell < n_cells
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (d[None, :] < width) & (d0 + d[None, :] < HEAD_DIM)
    row = local.to(tl.int64) * total_cells + before.to(tl.int64) * L + cell
    staged = scratch + row[:, None] * width + d[None, :]
    if GATHER:
        plane, slot = _cell_source(
            cell, inside, b, head, selected, kv_indptr, kv_indices, cell_offset, column_indptr,
            stride_sh, L, BLOCK_L,
        )  # fmt: skip
    else:
        plane, slot = _cell_target(cell, inside, b, column_indptr, column_indices, L)
    if unit < H_KV:
        at = plane * stride_kl + slot * stride_kr + head * stride_kh + d0
        pool = k_all + at[:, None] + d[None, :]
        if GATHER:
            tl.store(staged, tl.load(pool, mask=mask), mask=mask)
        else:
            tl.store(pool, tl.load(staged, mask=mask), mask=mask)
    else:
        at = plane * stride_vl + slot * stride_vr + head * stride_vh + d0
        pool = v_all + at[:, None] + d[None, :]
        if GATHER:
            tl.store(staged, tl.load(pool, mask=mask), mask=mask)
        else:
            tl.store(pool, tl.load(staged, mask=mask), mask=mask)


def staging_plan(
    n_cells: int, n_kv: int, head_dim: int, item_size: int, max_scratch_bytes: int
) -> tuple[int, int]:
    """(units, width) of a slice: how many of the 2 * H_kv (K or V, head) rows, how many elements.

    The scratch of a slice, n_cells * units * width * item_size bytes, is at most
    max(max_scratch_bytes, 16 * n_cells).
    """
    row = n_cells * head_dim * item_size
    if row <= max_scratch_bytes:
        return min(2 * n_kv, max_scratch_bytes // row), head_dim
    grain = 16 // item_size  # elements in 16 bytes
    return 1, min(head_dim, max(1, max_scratch_bytes // (n_cells * 16)) * grain)


def pack(
    k_all: Tensor,
    v_all: Tensor,
    selected: Tensor,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    cell_offset: Tensor,
    column_indptr: Tensor,
    column_indices: Tensor,
    *,
    max_columns: int,
    in_place: bool = False,
    max_scratch_bytes: int = DEFAULT_SCRATCH_BYTES,
) -> None:
    """Copy the survivors of all layers into the cells of the columns, in k_all and v_all.

    Cell c of request b holds, for KV head h, the K and V of visual token
    selected[h, L * column_indptr[b] + c] of the layer l with off[l] <= c < off[l + 1]. It lies in
    plane c % L of slot column_indices[column_indptr[b] + c // L]. No host sync.

    Args:
        k_all, v_all: [L, rows, H_kv, D] of any KV dtype, changed in place; bits are copied.
        selected: int32 [H_kv, L * total_columns] of `select`.
        kv_indptr: int32 [B + 1].
        kv_indices: int32 or int64 [total_visual], visual slots.
        cell_offset: int32 [B, L + 1].
        column_indptr: int32 [B + 1].
        column_indices: int32 or int64 [total_columns], the slots of the columns, all distinct.
        max_columns: the most columns of a request (known on the host).
        in_place: True where columns may be visual slots; False needs them disjoint.
        max_scratch_bytes: see the module; for in_place only.
    Raises:
        ValueError: a shape, dtype or device is not as above.
    """
    n_layers, _, n_kv, head_dim = check.pool_of(k_all, v_all)
    device = k_all.device
    check.index_vector("column_indices", column_indices, "total_columns", device)
    n_cells = n_layers * column_indices.shape[0]
    check.tensor_of("selected", selected, (n_kv, n_cells), check.INDEX_DTYPES, device)
    check.contiguous("selected", selected)
    check.tensor_of("kv_indptr", kv_indptr, ("B + 1",), check.INDEX_DTYPES[0], device)
    check.contiguous("kv_indptr", kv_indptr)
    batch = check.int_in("batch size", kv_indptr.shape[0] - 1, 1)
    check.index_vector("kv_indices", kv_indices, "total_visual", device)
    check.tensor_of(
        "cell_offset", cell_offset, (batch, n_layers + 1), check.INDEX_DTYPES[0], device
    )
    check.contiguous("cell_offset", cell_offset)
    check.tensor_of("column_indptr", column_indptr, (batch + 1,), check.INDEX_DTYPES[0], device)
    check.contiguous("column_indptr", column_indptr)
    check.int_in("max_columns", max_columns, 1)
    check.int_in("max_scratch_bytes", max_scratch_bytes, 1)
    # bits move, not numbers: an integer view keeps NaN payloads and avoids fp8 and bf16 registers
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[k_all.element_size()]
    k_bits, v_bits = k_all.view(bits), v_all.view(bits)
    strides = (*k_all.stride()[:3], *v_all.stride()[:3], selected.stride(0))
    block_c = 256 if INTERPRETED else 32
    tiles = triton.cdiv(n_layers * max_columns, block_c)
    blocks = {
        "L": n_layers, "HEAD_DIM": head_dim, "BLOCK_C": block_c,
        "BLOCK_L": power_of_2(n_layers, 16), "num_warps": 4,
    }  # fmt: skip
    if not in_place:
        _pack_fwd_kernel[(tiles, n_kv, batch)](
            k_bits, v_bits, selected, kv_indptr, kv_indices, cell_offset, column_indptr,
            column_indices, *strides, BLOCK_D=power_of_2(head_dim), **blocks,
        )  # fmt: skip
        return
    units, width = staging_plan(n_cells, n_kv, head_dim, k_all.element_size(), max_scratch_bytes)
    scratch = k_bits.new_empty(units * n_cells * width)
    for first_unit in range(0, 2 * n_kv, units):
        now = min(units, 2 * n_kv - first_unit)
        for d0 in range(0, head_dim, width):
            for gather in (True, False):
                _stage_fwd_kernel[(tiles, now, batch)](
                    k_bits, v_bits, scratch, selected, kv_indptr, kv_indices, cell_offset,
                    column_indptr, column_indices, *strides, n_cells, first_unit, d0, width,
                    H_KV=n_kv, BLOCK_D=power_of_2(width), GATHER=gather, **blocks,
                )  # fmt: skip
