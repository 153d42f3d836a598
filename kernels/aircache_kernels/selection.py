# SPDX-License-Identifier: Apache-2.0
"""The n_l best visual tokens of every request, layer and KV head, in one launch.

A radix select over the bits of the scores (four passes of 8 bits) finds the threshold, a fifth pass
stores the kept ordinals in rising order and, where it is wanted, adds up what they carry. Only
integers are counted, so the choice does not depend on scheduling; of equal scores the earlier token
stays. No scratch memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aircache_kernels import validation as check

# Visual tokens of a step; one number, so that nothing is compiled while a request waits.
_BLOCK = 2048


@triton.jit
def ordered_key(score, inside):  # type: ignore[no-untyped-def]
    """uint32 that rises with the float32 score; NaN is least, -0.0 equals 0.0."""
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(tl.uint32, bitcast=True)
    negative = (bits >> 31) != 0
    key = tl.where(negative, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(inside & (score == score), key, 0).to(tl.uint32)


@triton.jit
def _radix_step(  # type: ignore[no-untyped-def]
    scores, n_visual, threshold, remaining, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):
    """Settles 8 more bits of the threshold; `remaining` candidates are still to be found in it."""
    settled: tl.constexpr = (0xFFFFFFFF << (SHIFT + 8)) & 0xFFFFFFFF
    lanes = tl.arange(0, BLOCK)
    bins = tl.arange(0, 256)
    counts = tl.zeros([256], dtype=tl.int32)
    for v0 in range(0, n_visual, BLOCK):
        v = v0 + lanes
        key = ordered_key(tl.load(scores + v, mask=v < n_visual, other=0.0), v < n_visual)
        match = (v < n_visual) & ((key & settled) == threshold)
        digit = tl.where(match, ((key >> SHIFT) & 255).to(tl.int32), 0)
        # what does not match is counted in bin 0 and taken off again
        spare = BLOCK - tl.sum(match.to(tl.int32), 0)
        counts += tl.histogram(digit, 256) - tl.where(bins == 0, spare, 0)
    at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
    # the highest digit that at least `remaining` candidates reach
    digit = tl.max(tl.where(at_least >= remaining, bins, 0), 0)
    above = tl.sum(tl.where(bins > digit, counts, 0), 0)
    return threshold | (digit.to(tl.uint32) << SHIFT), remaining - above


@triton.jit(do_not_specialize=["total_visual", "stride_sh"])
def _select_fwd_kernel(  # type: ignore[no-untyped-def]
    importance, kv_indptr, cell_offset, column_indptr, selected, weights, mass,
    total_visual, stride_sh, n_layers,
    H_KV: tl.constexpr, HAS_MASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grid (L * H_kv, B)"""
    row = tl.program_id(0).to(tl.int64)
    layer = row // H_KV
    head = row % H_KV
    b = tl.program_id(1)
    start = tl.load(kv_indptr + b).to(tl.int64)
    n_visual = (tl.load(kv_indptr + b + 1) - start).to(tl.int32)
    offset = tl.load(cell_offset + b * (n_layers + 1) + layer)
    n_keep = tl.load(cell_offset + b * (n_layers + 1) + layer + 1) - offset
    n_keep = tl.minimum(n_keep, n_visual)
    scores = importance + row * total_visual + start
    lanes = tl.arange(0, BLOCK)
    threshold = tl.zeros([1], dtype=tl.uint32)
    remaining = tl.full([1], 0, dtype=tl.int32) + n_keep
    threshold, remaining = _radix_step(scores, n_visual, threshold, remaining, 24, BLOCK)
    threshold, remaining = _radix_step(scores, n_visual, threshold, remaining, 16, BLOCK)
    threshold, remaining = _radix_step(scores, n_visual, threshold, remaining, 8, BLOCK)
    threshold, remaining = _radix_step(scores, n_visual, threshold, remaining, 0, BLOCK)
    carried = tl.zeros([1], dtype=tl.float64)
    total = tl.zeros([1], dtype=tl.float64)
    stored = tl.zeros([1], dtype=tl.int32)
    ties = tl.zeros([1], dtype=tl.int32)
    columns_before = tl.load(column_indptr + b).to(tl.int64)
    out = selected + head * stride_sh + columns_before * n_layers + offset
    for v0 in range(0, n_visual, BLOCK):
        v = v0 + lanes
        key = ordered_key(tl.load(scores + v, mask=v < n_visual, other=0.0), v < n_visual)
        tie = (v < n_visual) & (key == threshold)
        tie_rank = ties + tl.cumsum(tie.to(tl.int32), 0) - 1
        keep = ((v < n_visual) & (key > threshold)) | (tie & (tie_rank < remaining))
        position = stored + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(out + position, v, mask=keep & (position < n_keep))
        stored += tl.sum(keep.to(tl.int32), 0)
        ties += tl.sum(tie.to(tl.int32), 0)
        if HAS_MASS:
            at = weights + row * total_visual + start + v
            weight = tl.load(at, mask=v < n_visual, other=0.0).to(tl.float64)
            total += tl.sum(weight, 0)
            carried += tl.sum(tl.where(keep, weight, 0.0), 0)
    if HAS_MASS:
        some = total > 0.0
        share = tl.where(some, carried / tl.where(some, total, 1.0), 1.0)
        share = tl.minimum(tl.maximum(share, 0.0), 1.0)
        at = b.to(tl.int64) * n_layers * H_KV + row + tl.arange(0, 1)
        tl.store(mass + at, share)


def select(
    importance: Tensor,
    kv_indptr: Tensor,
    cell_offset: Tensor,
    column_indptr: Tensor,
    *,
    total_columns: int,
    max_kv_len: int,
    weights: Tensor | None = None,
    mass: Tensor | None = None,
) -> Tensor:
    """The n_l highest scores of every request, layer and KV head (algorithm 1).

    One launch, no host sync.

    Args:
        importance: float32 [L, H_kv, total_visual] of `score`; NaN counts as the lowest score.
        kv_indptr: int32 [B + 1].
        cell_offset: int32 [B, L + 1], the prefix sums of `layer_budgets`.
        column_indptr: int32 [B + 1], prefix sums of the columns m_b.
        total_columns: sum of m_b (known on the host).
        max_kv_len: the most visual tokens of a request, at most 131072.
        weights: float32 [L, H_kv, total_visual], what `mass` adds up; None for importance.
        mass: float64 [B, L, H_kv], written if given: the weights of the kept tokens over those of
            all, in [0, 1]; 1 where they are all 0.
    Returns:
        int32 [H_kv, L * total_columns]: entry L * column_indptr[b] + cell_offset[b, l] + j is the
        ordinal of the token among request b's visual tokens, rising within each layer.
    """
    check.tensor_of("importance", importance, ("L", "H_kv", "total_visual"), torch.float32)
    check.contiguous("importance", importance)
    device = importance.device
    n_layers, n_kv, total_visual = importance.shape
    check.tensor_of("kv_indptr", kv_indptr, ("B + 1",), torch.int32, device)
    check.contiguous("kv_indptr", kv_indptr)
    batch = check.int_in("batch size", kv_indptr.shape[0] - 1, 1)
    check.tensor_of("cell_offset", cell_offset, (batch, n_layers + 1), torch.int32, device)
    check.contiguous("cell_offset", cell_offset)
    check.tensor_of("column_indptr", column_indptr, (batch + 1,), torch.int32, device)
    check.contiguous("column_indptr", column_indptr)
    check.int_in("total_columns", total_columns, 1)
    check.int_in("max_kv_len", max_kv_len, 1, check.MAX_VISUAL)
    out = torch.empty(n_kv, n_layers * total_columns, dtype=torch.int32, device=device)
    if weights is None:
        weights = importance
    check.tensor_of("weights", weights, tuple(importance.shape), torch.float32, device)
    check.contiguous("weights", weights)
    if mass is not None:
        check.tensor_of("mass", mass, (batch, n_layers, n_kv), torch.float64, device)
        check.contiguous("mass", mass)
    _select_fwd_kernel[(n_layers * n_kv, batch)](
        importance, kv_indptr, cell_offset, column_indptr, out, weights, mass,
        total_visual, out.stride(0), n_layers,
        H_KV=n_kv, HAS_MASS=mass is not None, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
    return out
