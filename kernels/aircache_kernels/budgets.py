# SPDX-License-Identifier: Apache-2.0
"""Layer budgets on the device: eqs. 9 to 11 in whole numbers that add up, in two launches.

`importance_statistics` is apart, so that tensor-parallel ranks can average its result over their
KV heads before `layer_budgets` turns it into cells. Both compute in float64: quotas are compared,
and a budget must not depend on the order of a float32 sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aircache_kernels import validation as check
from aircache_kernels.launch import power_of_2

BUDGET_MODES = ("aircache", "uniform", "strength", "skewness")
MAX_LAYERS = 256
# Of `importance_statistics`; one number, so that no other request of the batch changes a sum.
_BLOCK = 2048


@triton.jit(do_not_specialize=["total_visual"])
def _statistics_fwd_kernel(  # type: ignore[no-untyped-def]
    importance, kv_indptr, out, total_visual, n_layers,
    H_KV: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grid (L, B)"""
    layer = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1)
    start = tl.load(kv_indptr + b).to(tl.int64)
    n = (tl.load(kv_indptr + b + 1) - start).to(tl.int32)
    count = n.to(tl.float64)
    lanes = tl.arange(0, BLOCK)
    # one-element blocks: scalars carried through the loop keep one type
    one = tl.arange(0, 1)
    strength = tl.zeros([1], dtype=tl.float64)
    skewness = tl.zeros([1], dtype=tl.float64)
    for head in range(0, H_KV):
        base = importance + (layer * H_KV + head) * total_visual + start
        total = tl.zeros([BLOCK], dtype=tl.float64)
        high = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
        low = tl.full([BLOCK], float("inf"), dtype=tl.float32)
        for v0 in range(0, n, BLOCK):
            v = v0 + lanes
            x = tl.load(base + v, mask=v < n, other=0.0)
            total += x.to(tl.float64)
            high = tl.maximum(high, tl.where(v < n, x, float("-inf")))
            low = tl.minimum(low, tl.where(v < n, x, float("inf")))
        head_sum = tl.sum(total, 0)
        head_high = tl.max(high, 0)
        head_low = tl.min(low, 0)
        largest = tl.maximum(tl.abs(head_high), tl.abs(head_low))
        flat = (head_high - head_low).to(tl.float64) <= FLAT * largest.to(tl.float64)
        mean = head_sum / tl.maximum(count, 1.0)
        squares = tl.zeros([BLOCK], dtype=tl.float64)
        cubes = tl.zeros([BLOCK], dtype=tl.float64)
        for v0 in range(0, n, BLOCK):
            v = v0 + lanes
            x = tl.load(base + v, mask=v < n, other=0.0).to(tl.float64)
            centred = tl.where(v < n, x - mean, 0.0)
            squares += centred * centred
            cubes += centred * centred * centred
        variance = tl.sum(squares, 0) / tl.maximum(count - 1.0, 1.0)
        some = (n >= 3) & (flat == 0) & (variance > 0.0)
        deviation = tl.sqrt(tl.where(some, variance, 1.0))
        pairs = tl.maximum((count - 1.0) * (count - 2.0), 1.0)
        value = tl.sum(cubes, 0) / (deviation * deviation * deviation) * (count / pairs)
        strength += tl.where(one >= 0, head_sum, 0.0)
        skewness += tl.where((one >= 0) & some, tl.maximum(value, 0.0), 0.0)
    at = (b * 2 * n_layers + layer) + one
    tl.store(out + at, strength / H_KV)
    tl.store(out + at + n_layers, skewness / H_KV)


@triton.jit
def _normalised(stats, inside, n_layers):  # type: ignore[no-untyped-def]
    """s / mean s over the layers; 1 everywhere where all are 0. NaN and infinity count as 0."""
    good = inside & (stats > 0.0) & (stats < float("inf"))
    stats = tl.where(good, stats, 0.0)
    top = tl.max(stats, 0)
    scaled = tl.where(top > 0.0, stats / tl.where(top > 0.0, top, 1.0), 1.0)
    scaled = tl.where(inside, scaled, 0.0)
    # n_layers = 1 is a compile-time constant, which has no .to()
    return scaled / (tl.sum(scaled, 0) / tl.cast(n_layers, tl.float64))


@triton.jit
def _filled(level, share, inside, cap):  # type: ignore[no-untyped-def]
    """Sum over the layers of clamp(level * share, 1, cap), for every level."""
    quota = level[:, None] * share[None, :]
    quota = tl.minimum(tl.maximum(quota, 1.0), cap)
    return tl.sum(tl.where(inside[None, :], quota, 0.0), 1)


@triton.jit
def whole_budgets(share, l, inside, columns, n_visual, n_layers):  # type: ignore[no-untyped-def]
    """Cells of each layer in proportion to float64 shares, between 1 and N_v, sum L * m."""
    m = tl.minimum(tl.maximum(columns, 1), tl.maximum(n_visual, 1))
    total = m * n_layers
    cap = tl.maximum(n_visual, 1).to(tl.float64)
    # find the water level x at which the quotas clamp(x * share, 1, cap) add up to total
    share = share / tl.max(share, 0)
    some = inside & (share > 1e-100)
    least = tl.min(tl.where(some, share, 1.0), 0)
    # so little that a layer without a share leaves the floor only when all others are full
    share = tl.where(some, share, least / (2.0 * cap))
    leaves_floor = 1.0 / share
    meets_cap = cap / share
    wanted = total.to(tl.float64)
    low_ok = inside & (_filled(leaves_floor, share, inside, cap) <= wanted)
    cap_ok = inside & (_filled(meets_cap, share, inside, cap) <= wanted)
    level = tl.max(tl.where(low_ok, leaves_floor, 0.0), 0)
    level = tl.maximum(level, tl.max(tl.where(cap_ok, meets_cap, 0.0), 0))
    least_level = tl.min(tl.where(inside, leaves_floor, float("inf")), 0)
    level = tl.where(level > 0.0, level, least_level)
    full = inside & (meets_cap <= level)
    between = inside & (leaves_floor <= level) & (meets_cap > level)
    low = inside & (leaves_floor > level) & (meets_cap > level)
    rest = wanted - cap * tl.sum(full.to(tl.int32), 0).to(tl.float64)
    rest -= tl.sum(low.to(tl.int32), 0).to(tl.float64)
    flowing = tl.where(between, share, 0.0)
    pool = tl.sum(flowing, 0)
    quota = flowing * (rest / tl.where(pool > 0.0, pool, 1.0))
    quota = tl.where(full, cap, tl.where(low, 1.0, quota))
    # quotas equal to within 2**-20 are ties; halves go to the even step
    steps = quota * 1048576.0
    floor = tl.floor(steps)
    odd = floor - 2.0 * tl.floor(floor * 0.5)
    up = (steps - floor > 0.5) | ((steps - floor == 0.5) & (odd == 1.0))
    quota = (floor + tl.where(up, 1.0, 0.0)) * (1.0 / 1048576.0)
    quota = tl.minimum(tl.maximum(quota, 1.0), cap)

    whole = tl.floor(quota)
    fraction = tl.where(inside, quota - whole, -1.0)
    cells = tl.where(inside, whole.to(tl.int32), 0)
    ahead = (fraction[None, :] > fraction[:, None]) | (
        (fraction[None, :] == fraction[:, None]) & (l[None, :] < l[:, None])
    )
    rank = tl.sum((ahead & inside[None, :]).to(tl.int32), 1)
    return cells + tl.where(inside & (rank < total - tl.sum(cells, 0)), 1, 0)


@triton.jit
def store_budgets(  # type: ignore[no-untyped-def]
    cells, l, inside, b, n_layers, req_pool_indices, budgets, offsets, table,
    HAS_TABLE: tl.constexpr,
):  # fmt: skip
    """Budgets of request b, their prefix sums, and these in its row of the table."""
    end = tl.cumsum(cells, 0)
    tl.store(budgets + b * n_layers + l, cells, mask=inside)
    row = offsets + b * (n_layers + 1)
    tl.store(row + 1 + l, end, mask=inside)
    tl.store(row + l, end - cells, mask=l == 0)
    if HAS_TABLE:
        request = tl.load(req_pool_indices + b).to(tl.int64)
        row = table + request * (n_layers + 1)
        tl.store(row + 1 + l, end, mask=inside)
        tl.store(row + l, end - cells, mask=l == 0)


@triton.jit
def _budgets_fwd_kernel(  # type: ignore[no-untyped-def]
    statistics, kv_indptr, columns, req_pool_indices, budgets, offsets, table, n_layers,
    MODE: tl.constexpr, HAS_TABLE: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """grid (B,)"""
    b = tl.program_id(0)
    l = tl.arange(0, BLOCK_L)
    inside = l < n_layers
    n_visual = tl.load(kv_indptr + b + 1) - tl.load(kv_indptr + b)
    first = tl.load(statistics + b * 2 * n_layers + l, mask=inside, other=0.0).to(tl.float64)
    second = tl.load(statistics + (b * 2 + 1) * n_layers + l, mask=inside, other=0.0)
    first = _normalised(first, inside, n_layers)
    second = _normalised(second.to(tl.float64), inside, n_layers)
    if MODE == "aircache":
        share = (first + second) / 2.0
    elif MODE == "strength":
        share = first
    elif MODE == "skewness":
        share = second
    else:
        share = tl.where(inside, 1.0, 0.0).to(tl.float64)
    cells = whole_budgets(share, l, inside, tl.load(columns + b), n_visual, n_layers)
    store_budgets(
        cells, l, inside, b, n_layers, req_pool_indices, budgets, offsets, table, HAS_TABLE
    )


# scores whose range is below this share of the largest one differ by float32 rounding alone
_FLAT = 8 * torch.finfo(torch.float32).eps


def importance_statistics(importance: Tensor, kv_indptr: Tensor, *, max_kv_len: int) -> Tensor:
    """Strength (eq. 9) and skewness (eq. 10) of every request and layer, mean over KV heads.

    A head's skewness counts as 0 where it is negative, where N_v < 3 and where its scores are equal
    to within 8 float32 epsilons. One launch, no host sync.

    Args:
        importance: float32 [L, H_kv, total_visual] of `score`.
        kv_indptr: int32 [B + 1].
        max_kv_len: the most visual tokens of a request.
    Returns:
        float64 [B, 2, L]: row 0 strength, row 1 skewness.
    """
    check.tensor_of("importance", importance, ("L", "H_kv", "total_visual"), torch.float32)
    check.contiguous("importance", importance)
    device = importance.device
    n_layers, n_kv, total_visual = importance.shape
    check.tensor_of("kv_indptr", kv_indptr, ("B + 1",), torch.int32, device)
    check.contiguous("kv_indptr", kv_indptr)
    batch = check.int_in("batch size", kv_indptr.shape[0] - 1, 1)
    check.int_in("max_kv_len", max_kv_len, 1, check.MAX_VISUAL)
    out = torch.empty(batch, 2, n_layers, dtype=torch.float64, device=device)
    _statistics_fwd_kernel[(n_layers, batch)](
        importance, kv_indptr, out, total_visual, n_layers,
        H_KV=n_kv, FLAT=_FLAT, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
    return out


def layer_budgets(
    statistics: Tensor,
    kv_indptr: Tensor,
    columns: Tensor,
    *,
    budget: str = "aircache",
    cell_offset: Tensor | None = None,
    req_pool_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cells n_l of every request and layer (eq. 11 in whole numbers). One launch, no host sync.

    1 <= n_l <= N_v and sum_l n_l = L * m. What the cap takes off and the floor gives goes to and
    from the other layers in proportion; fractions by largest remainder, quotas equal to within
    2**-20 are ties and go to the lower layer. Statistics that are NaN or infinite count as 0.

    Args:
        statistics: float64 [B, 2, L] of `importance_statistics`, averaged over ranks.
        kv_indptr: int32 [B + 1].
        columns: int32 [B], m of each request, 1 <= m <= N_v (clamped to that).
        budget: "aircache", "strength", "skewness" or "uniform" (table 5).
        cell_offset: int32 [R, L + 1], the compression table; rows req_pool_indices are written.
        req_pool_indices: int32 or int64 [B], with cell_offset.
    Returns:
        budgets int32 [B, L] and their prefix sums int32 [B, L + 1].
    """
    check.tensor_of("statistics", statistics, ("B", 2, "L"), torch.float64)
    check.contiguous("statistics", statistics)
    device = statistics.device
    batch, _, n_layers = statistics.shape
    check.int_in("number of layers", n_layers, 1, MAX_LAYERS)
    check.tensor_of("kv_indptr", kv_indptr, (batch + 1,), torch.int32, device)
    check.contiguous("kv_indptr", kv_indptr)
    check.tensor_of("columns", columns, (batch,), torch.int32, device)
    check.contiguous("columns", columns)
    check.one_of("budget", budget, BUDGET_MODES)
    check.table_rows(cell_offset, req_pool_indices, n_layers, batch, device)
    budgets = torch.empty(batch, n_layers, dtype=torch.int32, device=device)
    offsets = torch.empty(batch, n_layers + 1, dtype=torch.int32, device=device)
    _budgets_fwd_kernel[(batch,)](
        statistics, kv_indptr, columns, req_pool_indices, budgets, offsets, cell_offset, n_layers,
        MODE=budget, HAS_TABLE=cell_offset is not None, BLOCK_L=power_of_2(n_layers, 16),
        num_warps=8,
    )  # fmt: skip
    return budgets, offsets
