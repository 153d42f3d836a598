# SPDX-License-Identifier: Apache-2.0
"""Layer budgets from one threshold for the scores of a whole request, in four launches.

A radix search over the bits of the scores, 11, 11 and 10 of them at a time: each launch leaves a
histogram a layer, of which the next one settles a digit. Only integers are counted and added, so
that a budget depends on no order; tensor-parallel ranks add up their histograms between launches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from aircache_kernels import validation as check
from aircache_kernels.budgets import MAX_LAYERS, store_budgets, whole_budgets
from aircache_kernels.launch import power_of_2
from aircache_kernels.selection import ordered_key

# (bits below, bits) of the digits, the highest first
_DIGITS = ((21, 11), (10, 11), (0, 10))
# Visual tokens of a step; one number, so that nothing is compiled while a request waits.
_BLOCK = 2048


@triton.jit
def _settled(histogram, left, n_layers, BINS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The digit of the threshold, and how many are above it and how many have it.

    histogram: of all layers; left: how many of its candidates are still to be found.
    """
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], dtype=tl.int64)
    for layer in range(0, n_layers):
        counts += tl.load(histogram + layer * BINS + bins).to(tl.int64)
    at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
    digit = tl.max(tl.where(at_least >= left, bins, 0), 0)
    higher = tl.sum(tl.where(bins > digit, counts, 0), 0)
    return digit, higher, tl.sum(tl.where(bins == digit, counts, 0), 0)


@triton.jit(do_not_specialize=["total_visual", "n_heads"])
def _histogram_fwd_kernel(  # type: ignore[no-untyped-def]
    importance, kv_indptr, columns, before, histogram, state_before, state, above,
    total_visual, n_layers, n_heads,
    H_KV: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, BITS_BEFORE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """grid (L, B)"""
    layer = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    start = tl.load(kv_indptr + b).to(tl.int64)
    n_visual = (tl.load(kv_indptr + b + 1) - start).to(tl.int32)
    one = tl.arange(0, 1)
    own = above + b * n_layers + layer + one
    if BITS_BEFORE == 0:
        m = tl.minimum(tl.maximum(tl.load(columns + b), 1), tl.maximum(n_visual, 1))
        prefix = tl.zeros([1], dtype=tl.int64)
        left = prefix + m.to(tl.int64) * n_layers * n_heads
        tl.store(own, prefix)
    else:
        # the digit of the launch before, and what of this layer lies above it
        rows = before + b * n_layers * (1 << BITS_BEFORE)
        left = tl.load(state_before + b * 2 + 1)
        digit, higher, _ = _settled(rows, left, n_layers, 1 << BITS_BEFORE)
        bins = tl.arange(0, 1 << BITS_BEFORE)
        mine = tl.load(rows + layer * (1 << BITS_BEFORE) + bins)
        counted = tl.sum(tl.where(bins > digit, mine, 0), 0).to(tl.int64)
        tl.store(own, tl.load(own) + counted)
        left = left - higher + tl.zeros([1], dtype=tl.int64)
        prefix = tl.load(state_before + b * 2 + one) | (digit.to(tl.int64) << (SHIFT + BITS))
    first = (one >= 0) & (layer == 0)
    tl.store(state + b * 2 + one, prefix, mask=first)
    tl.store(state + b * 2 + 1 + one, left, mask=first)

    settled: tl.constexpr = (0xFFFFFFFF << (SHIFT + BITS)) & 0xFFFFFFFF
    lanes = tl.arange(0, BLOCK)
    bins_now = tl.arange(0, 1 << BITS)
    counts = tl.zeros([1 << BITS], dtype=tl.int32)
    for head in range(0, H_KV):
        scores = importance + (layer * H_KV + head) * total_visual + start
        for v0 in range(0, n_visual, BLOCK):
            inside = v0 + lanes < n_visual
            key = ordered_key(tl.load(scores + v0 + lanes, mask=inside, other=0.0), inside)
            match = inside & ((key & settled) == prefix.to(tl.uint32))
            found = tl.where(match, ((key >> SHIFT) & ((1 << BITS) - 1)).to(tl.int32), 0)
            # what does not match is counted in bin 0 and taken off again
            spare = BLOCK - tl.sum(match.to(tl.int32), 0)
            counts += tl.histogram(found, 1 << BITS) - tl.where(bins_now == 0, spare, 0)
    tl.store(histogram + (b * n_layers + layer) * (1 << BITS) + bins_now, counts)


@triton.jit
def _global_budgets_fwd_kernel(  # type: ignore[no-untyped-def]
    histogram, state, above, kv_indptr, columns, req_pool_indices, budgets, offsets, table,
    n_layers,
    HAS_TABLE: tl.constexpr, BINS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """grid (B,)"""
    b = tl.program_id(0).to(tl.int64)
    l = tl.arange(0, BLOCK_L)
    inside = l < n_layers
    n_visual = tl.load(kv_indptr + b + 1) - tl.load(kv_indptr + b)
    rows = histogram + b * n_layers * BINS
    left = tl.load(state + b * 2 + 1)
    digit, higher, tied = _settled(rows, left, n_layers, BINS)
    count = tl.load(above + b * n_layers + l, mask=inside, other=0)
    for first in range(0, BINS, BLOCK_B):
        bins = first + tl.arange(0, BLOCK_B)
        mask = inside[:, None] & (bins[None, :] > digit)
        part = tl.load(rows + l[:, None] * BINS + bins[None, :], mask=mask, other=0)
        count += tl.sum(part, 1).to(tl.int64)
    ties = tl.load(rows + l * BINS + digit, mask=inside, other=0).to(tl.int64)
    # of those that equal the threshold every layer counts the same share
    share = (ties * (left - higher)).to(tl.float64) / tl.maximum(tied, 1).to(tl.float64)
    share = count.to(tl.float64) + share
    cells = whole_budgets(share, l, inside, tl.load(columns + b), n_visual, n_layers)
    store_budgets(
        cells, l, inside, b, n_layers, req_pool_indices, budgets, offsets, table, HAS_TABLE
    )


def global_budgets(
    importance: Tensor,
    kv_indptr: Tensor,
    columns: Tensor,
    *,
    max_kv_len: int,
    ranks: int = 1,
    total: Callable[[Tensor], Tensor] | None = None,
    cell_offset: Tensor | None = None,
    req_pool_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cells n_l of every request and layer, from its L * H_kv * m highest scores.

    Each layer's share is how many of them it has; of those that equal the lowest of them every
    layer counts the same share. In whole numbers as in `layer_budgets`: 1 <= n_l <= N_v and
    sum_l n_l = L * m. Four launches, no host sync.

    Args:
        importance: float32 [L, H_kv, total_visual] of `score`; NaN counts as the lowest score.
        kv_indptr: int32 [B + 1].
        columns: int32 [B], m of each request, 1 <= m <= N_v (clamped to that).
        max_kv_len: the most visual tokens of a request.
        ranks: how many hold H_kv heads each.
        total: the sum over ranks of an int32 tensor; None for one rank.
        cell_offset, req_pool_indices: see `layer_budgets`.
    Returns:
        budgets int32 [B, L] and their prefix sums int32 [B, L + 1].
    """
    check.tensor_of("importance", importance, ("L", "H_kv", "total_visual"), torch.float32)
    check.contiguous("importance", importance)
    device = importance.device
    n_layers, n_kv, total_visual = importance.shape
    check.int_in("number of layers", n_layers, 1, MAX_LAYERS)
    check.tensor_of("kv_indptr", kv_indptr, ("B + 1",), torch.int32, device)
    check.contiguous("kv_indptr", kv_indptr)
    batch = check.int_in("batch size", kv_indptr.shape[0] - 1, 1)
    check.tensor_of("columns", columns, (batch,), torch.int32, device)
    check.contiguous("columns", columns)
    check.int_in("max_kv_len", max_kv_len, 1, check.MAX_VISUAL)
    check.int_in("ranks", ranks, 1)
    if ranks > 1 and total is None:
        raise ValueError(f"total must be given with {ranks} ranks")
    check.table_rows(cell_offset, req_pool_indices, n_layers, batch, device)
    above = torch.empty(batch, n_layers, dtype=torch.int64, device=device)
    states = torch.empty(len(_DIGITS), batch, 2, dtype=torch.int64, device=device).unbind(0)
    before, before_bits, state_before = above, 0, states[0]
    for (shift, bits), state in zip(_DIGITS, states, strict=True):
        size = (batch, n_layers, 1 << bits)
        histogram = torch.empty(size, dtype=torch.int32, device=device)
        _histogram_fwd_kernel[(n_layers, batch)](
            importance, kv_indptr, columns, before, histogram, state_before, state, above,
            total_visual, n_layers, n_kv * ranks,
            H_KV=n_kv, SHIFT=shift, BITS=bits, BITS_BEFORE=before_bits, BLOCK=_BLOCK,
            num_warps=8,
        )  # fmt: skip
        before = histogram if total is None else total(histogram)
        before_bits, state_before = bits, state
    budgets = torch.empty(batch, n_layers, dtype=torch.int32, device=device)
    offsets = torch.empty(batch, n_layers + 1, dtype=torch.int32, device=device)
    _global_budgets_fwd_kernel[(batch,)](
        before, state_before, above, kv_indptr, columns, req_pool_indices, budgets, offsets,
        cell_offset, n_layers,
        HAS_TABLE=cell_offset is not None, BINS=1 << before_bits, BLOCK_B=32,
        BLOCK_L=power_of_2(n_layers, 16), num_warps=8,
    )  # fmt: skip
    return budgets, offsets
