# SPDX-License-Identifier: Apache-2.0
"""FlashInfer page tables (page size 1) for every layer, in one launch.

Rows are absolute: plane * rows + slot, into k_all.view(L * rows, ...). FlashInfer's indices are
int32, so pools of 2**31 rows and more are refused.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aircache_kernels import validation as check
from aircache_kernels.launch import cell_address, power_of_2
from aircache_kernels.streams import read_lengths, read_request
from aircache_kernels.tables import Tables

_CHUNKS = 4


@triton.jit
def _page_tables_kernel(  # type: ignore[no-untyped-def]
    req_to_token, req_pool_indices, seq_lens, gap_start, gap_len, cell_offset,
    kv_indptr, kv_indices, last_page_len, stride_r, rows, capacity, batch,
    L: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grid (B, L, chunks)"""
    b = tl.program_id(0)
    layer = tl.program_id(1)
    chunk = tl.program_id(2)
    step = BLOCK * tl.num_programs(2)
    # keys of every request before this one, in this layer
    others = tl.arange(0, BLOCK_B)
    lengths = read_lengths(
        others, batch, layer, req_pool_indices, seq_lens, gap_len, cell_offset, L
    )
    begin = tl.sum(tl.where(others < b, lengths, 0), 0)
    total = tl.sum(tl.where(others == b, lengths, 0), 0)

    row, gap_first, gap, n_text = read_request(b, req_pool_indices, seq_lens, gap_start, gap_len)
    if chunk == 0:
        tl.store(kv_indptr + layer * (batch + 1) + b + 1, begin + total)
        if b == 0:
            tl.store(kv_indptr + layer * (batch + 1), 0)
        if layer == 0:
            tl.store(last_page_len + b, 1)
    table = req_to_token + row * stride_r
    out = kv_indices + layer.to(tl.int64) * capacity
    for start in range(chunk * BLOCK, n_text, step):
        j = start + tl.arange(0, BLOCK)
        position = j + tl.where(j >= gap_first, gap, 0)
        slot = tl.load(table + position, mask=j < n_text, other=0)
        fits = (j < n_text) & (begin + j < capacity)
        tl.store(out + begin + j, layer * rows + slot, mask=fits)
    first_cell = tl.load(cell_offset + row * (L + 1) + layer)
    n_cells = total - n_text
    for start in range(chunk * BLOCK, n_cells, step):
        j = start + tl.arange(0, BLOCK)
        column, plane = cell_address(first_cell + j, L)
        slot = tl.load(table + gap_first + column, mask=j < n_cells, other=0)
        at = begin + n_text + j
        tl.store(out + at, plane * rows + slot, mask=(j < n_cells) & (at < capacity))


def build_flashinfer_tables(
    tables: Tables,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    *,
    rows: int,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    last_page_len: Tensor,
) -> None:
    """Write the page tables of all layers. One launch, no host sync.

    Args:
        tables, req_pool_indices, seq_lens: as in `decode_attention`.
        rows: rows of one plane of the pool.
        kv_indptr: int32 [L, bs + 1], written.
        kv_indices: int32 [L, capacity], written from 0 in each layer: the text tokens in order,
            then the layer's cells; never past capacity.
        last_page_len: int32 [bs], written: 1.
    Raises:
        ValueError: L * rows >= 2**31, or a shape, dtype or device is not as above.
    """
    device = tables.req_to_token.device
    n_layers = tables.cell_offset.shape[1] - 1
    batch = check.requests_of(tables, n_layers, req_pool_indices, seq_lens, device)
    check.tensor_of("kv_indptr", kv_indptr, (n_layers, batch + 1), torch.int32, device)
    check.contiguous("kv_indptr", kv_indptr)
    check.tensor_of("kv_indices", kv_indices, (n_layers, "capacity"), torch.int32, device)
    check.contiguous("kv_indices", kv_indices)
    check.tensor_of("last_page_len", last_page_len, (batch,), torch.int32, device)
    check.contiguous("last_page_len", last_page_len)
    check.flashinfer_rows(n_layers, check.int_in("rows", rows, 1))
    req_to_token, gap_start, gap_len, cell_offset = tables
    _page_tables_kernel[(batch, n_layers, _CHUNKS)](
        req_to_token, req_pool_indices, seq_lens, gap_start, gap_len, cell_offset,
        kv_indptr, kv_indices, last_page_len,
        req_to_token.stride(0), rows, kv_indices.shape[1], batch,
        L=n_layers, BLOCK_B=power_of_2(batch, 16), BLOCK=1024, num_warps=4,
    )  # fmt: skip
