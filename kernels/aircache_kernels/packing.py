# SPDX-License-Identifier: Apache-2.0
"""Copies the kept K and V rows into the cells of the columns, which are no visual slots."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aircache_kernels import validation as check
from aircache_kernels.launch import INTERPRETED, cell_address, power_of_2


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
    # the survivor: its layer, its ordinal among the visual tokens, its slot
    l = tl.arange(0, BLOCK_L)
    ends = tl.load(cell_offset + b * (L + 1) + 1 + l, mask=l < L, other=2147483647)
    layer = tl.sum((ends[None, :] <= cell[:, None]).to(tl.int32), 1).to(tl.int64)
    columns = tl.load(column_indptr + b).to(tl.int64)
    at = head * stride_sh + columns * L + cell
    ordinal = tl.load(selected + at, mask=inside, other=0)
    kv_start = tl.load(kv_indptr + b).to(tl.int64)
    source = tl.load(kv_indices + kv_start + ordinal, mask=inside, other=0).to(tl.int64)
    # its cell
    column, plane = cell_address(cell, L)
    target = tl.load(column_indices + columns + column, mask=inside, other=0).to(tl.int64)
    plane = plane.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (d[None, :] < HEAD_DIM)
    k_base = k_all + head * stride_kh + d[None, :]
    v_base = v_all + head * stride_vh + d[None, :]
    k_row = tl.load(k_base + (layer * stride_kl + source * stride_kr)[:, None], mask=mask)
    v_row = tl.load(v_base + (layer * stride_vl + source * stride_vr)[:, None], mask=mask)
    tl.store(k_base + (plane * stride_kl + target * stride_kr)[:, None], k_row, mask=mask)
    tl.store(v_base + (plane * stride_vl + target * stride_vr)[:, None], v_row, mask=mask)


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
) -> None:
    """Copy the survivors of all layers into the cells of the columns, in k_all and v_all.

    Cell c of request b holds, for KV head h, the K and V of visual token
    selected[h, L * column_indptr[b] + c] of the layer l with off[l] <= c < off[l + 1]. It lies in
    plane c % L of slot column_indices[column_indptr[b] + c // L]. One launch, no host sync.

    Args:
        k_all, v_all: [L, rows, H_kv, D] of any KV dtype, changed in place; bits are copied.
        selected: int32 [H_kv, L * total_columns] of `select`.
        kv_indptr: int32 [B + 1].
        kv_indices: int32 or int64 [total_visual], visual slots.
        cell_offset: int32 [B, L + 1].
        column_indptr: int32 [B + 1].
        column_indices: int32 or int64 [total_columns], the slots of the columns, all distinct and
            none of them a visual slot of the batch.
        max_columns: the most columns of a request (known on the host).
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
    # bits move, not numbers: an integer view keeps NaN payloads and avoids fp8 and bf16 registers
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[k_all.element_size()]
    k_bits, v_bits = k_all.view(bits), v_all.view(bits)
    strides = (*k_all.stride()[:3], *v_all.stride()[:3], selected.stride(0))
    block_c = 256 if INTERPRETED else 32
    _pack_fwd_kernel[(triton.cdiv(n_layers * max_columns, block_c), n_kv, batch)](
        k_bits, v_bits, selected, kv_indptr, kv_indices, cell_offset, column_indptr,
        column_indices, *strides,
        L=n_layers, HEAD_DIM=head_dim, BLOCK_C=block_c, BLOCK_L=power_of_2(n_layers, 16),
        BLOCK_D=power_of_2(head_dim), num_warps=4,
    )  # fmt: skip
