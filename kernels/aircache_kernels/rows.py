# SPDX-License-Identifier: Apache-2.0
"""The request table after packing: columns, padding and text in the gap, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aircache_kernels import validation as check
from aircache_kernels.tables import Tables

_BLOCK = 1024


@triton.jit
def _rows_fwd_kernel(  # type: ignore[no-untyped-def]
    req_to_token, req_pool_indices, starts, kv_indptr, column_indptr, column_indices,
    between_indptr, between_indices, gap_start, gap_len, stride_r, BLOCK: tl.constexpr,
):  # fmt: skip
    """grid (chunks, B)"""
    b = tl.program_id(1)
    request = tl.load(req_pool_indices + b).to(tl.int64)
    start = tl.load(starts + b)
    n_visual = tl.load(kv_indptr + b + 1) - tl.load(kv_indptr + b)
    column = tl.load(column_indptr + b)
    m = tl.load(column_indptr + b + 1) - column
    text = tl.load(between_indptr + b)
    end = n_visual + tl.load(between_indptr + b + 1) - text
    for first in range(tl.program_id(0) * BLOCK, end, BLOCK * tl.num_programs(0)):
        j = first + tl.arange(0, BLOCK)
        packed = tl.load(column_indices + column + j, mask=j < m, other=0)
        behind = (j >= n_visual) & (j < end)
        moved = tl.load(between_indices + text + j - n_visual, mask=behind, other=0)
        slot = tl.where(behind, moved.to(tl.int32), packed.to(tl.int32))
        tl.store(req_to_token + request * stride_r + start + j, slot, mask=j < end)
    if tl.program_id(0) == 0:
        tl.store(gap_start + request, start)
        tl.store(gap_len + request, n_visual)


def lay_out_rows(
    tables: Tables,
    req_pool_indices: Tensor,
    starts: Tensor,
    kv_indptr: Tensor,
    column_indptr: Tensor,
    column_indices: Tensor,
    between_indptr: Tensor,
    between_indices: Tensor,
) -> None:
    """Lay out the gaps of packed requests and mark them as compressed. One launch, no host sync.

    From `starts[b]` on, a row gets the m_b columns, the padding slot 0 up to N_v entries, then the
    text that stood between pictures; so the gap has N_v entries and all text is outside it.

    Args:
        tables: of R requests; all but `cell_offset` is changed in place.
        req_pool_indices: int32 or int64 [B], distinct rows.
        starts: int32 [B], the first visual position.
        kv_indptr: int32 [B + 1], prefix sums of N_v.
        column_indptr: int32 [B + 1]; column_indices: int32 or int64 [total_columns], m_b <= N_v.
        between_indptr: int32 [B + 1]; between_indices: int32 or int64 [total_between], the slots
            of the text between a request's pictures.
    Raises:
        ValueError: a shape, dtype or device is not as above.
    """
    req_to_token, gap_start, gap_len, _ = tables
    check.tensor_of("req_to_token", req_to_token, ("R", "max_context"), torch.int32)
    check.last_dim_contiguous("req_to_token", req_to_token)
    device = req_to_token.device
    check.index_vector("req_pool_indices", req_pool_indices, "B", device)
    batch = check.int_in("batch size", req_pool_indices.shape[0], 1)
    check.tensor_of("starts", starts, (batch,), torch.int32, device)
    check.contiguous("starts", starts)
    for name, indptr in (
        ("kv_indptr", kv_indptr),
        ("column_indptr", column_indptr),
        ("between_indptr", between_indptr),
    ):
        check.tensor_of(name, indptr, (batch + 1,), torch.int32, device)
        check.contiguous(name, indptr)
    check.index_vector("column_indices", column_indices, "total_columns", device)
    check.index_vector("between_indices", between_indices, "total_between", device)
    for name, gaps in (("gap_start", gap_start), ("gap_len", gap_len)):
        check.tensor_of(name, gaps, (req_to_token.shape[0],), torch.int32, device)
        check.contiguous(name, gaps)
    _rows_fwd_kernel[(16, batch)](
        req_to_token, req_pool_indices, starts, kv_indptr, column_indptr, column_indices,
        between_indptr, between_indices, gap_start, gap_len, req_to_token.stride(0),
        BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
