# SPDX-License-Identifier: Apache-2.0
"""How many cells each layer keeps (eqs. 9 to 11), in whole numbers that add up; and which."""

from __future__ import annotations

import torch
from torch import Tensor

from aircache_sglang.policy.means import mean
from aircache_sglang.policy.validation import one_of, positive_int, tensor_of, validate_retention

BUDGET_MODES: tuple[str, ...] = (
    *("aircache", "uniform", "strength", "skewness", "pyramid"),
    "global",
)
# PyramidKV's beta: the last layer gets 1 / PYRAMID of the average
PYRAMID = 20

# scores whose range is below this share of the largest one differ by float32 rounding alone
_FLAT = 8 * torch.finfo(torch.float32).eps
# quotas closer than this are ties, so that rounding noise does not choose the richer layer
_QUOTA_STEP = 2.0**-20
# shares below this part of the largest count as 0, so that quotients stay finite
_NO_SHARE = 1e-100


def head_mean_statistics(importance: Tensor) -> Tensor:
    """Strength (row 0) and skewness (row 1) of each layer, mean over the KV heads given.

    Ranks that hold equally many KV heads average these to get what one device would have computed.

    Args:
        importance: [L, H_kv, N_v].
    Returns:
        float64 [2, L] on the same device. No host sync.
    """
    heads = torch.stack((head_strength(importance), head_skewness(importance)))
    return mean(heads, 2)


def columns(retention: float, n_visual: int) -> int:
    """Columns a request keeps: m = round(retention * N_v), between 1 and N_v.

    Python's `round`: a half goes to the even number. Known on the host before any scoring.
    """
    retention = validate_retention(retention)
    n_visual = positive_int("n_visual", n_visual)
    return min(n_visual, max(1, round(retention * n_visual)))


def layer_shares(statistics: Tensor, *, budget: str = "aircache") -> Tensor:
    """Each layer's share r_l / r of eq. 11, with mean 1 over the layers.

    s' = s / mean_l s, and 1 in every layer where all s are 0. NaN and infinity count as 0.

    Args:
        statistics: [2, L] from `head_mean_statistics`, averaged over ranks; for "global" [1, L]
            of `global_counts`.
        budget: "aircache" is (s_t' + s_k') / 2; "strength" is s_t', "skewness" is s_k',
            "uniform" is 1 and "pyramid" is `pyramid_shares` (table 5); "global" is the counts.
    Returns:
        float64 [L], not negative. No host sync.
    """
    one_of("budget", budget, BUDGET_MODES)
    tensor_of("statistics", statistics, (1 if budget == "global" else 2, "L"))
    stats = statistics.to(torch.float64)
    stats = torch.nan_to_num(stats, nan=0.0, posinf=0.0, neginf=0.0).clamp_min(0.0)
    if budget == "uniform":
        return torch.ones_like(stats[0])
    if budget == "pyramid":
        return pyramid_shares(stats[0])
    top = stats.amax(dim=1, keepdim=True)
    # divided by the largest first: neither the mean nor the quotient can overflow or vanish
    scaled = torch.where(top > 0, stats / torch.where(top > 0, top, 1.0), 1.0)
    normalised = scaled / mean(scaled, 1, keepdim=True)
    if budget == "aircache":
        return mean(normalised, 0)
    return normalised[1 if budget == "skewness" else 0]


def pyramid_shares(like: Tensor) -> Tensor:
    """Shares that fall linearly over the layers (PyramidKV, arXiv 2406.02069), mean 1.

    From 2 - 1 / PYRAMID in the first layer to 1 / PYRAMID in the last.

    Args:
        like: [L]; its device is taken.
    Returns:
        float64 [L].
    """
    least, n_layers = 1.0 / PYRAMID, like.shape[0]
    if n_layers == 1:
        return torch.ones(1, dtype=torch.float64, device=like.device)
    return torch.linspace(2.0 - least, least, n_layers, dtype=torch.float64, device=like.device)


def largest_remainder(shares: Tensor, total: int, cap: int) -> Tensor:
    """Whole numbers in proportion to `shares`, between 1 and `cap`, that add up to `total`.

    What the cap takes off (and what the floor of 1 gives) goes to and from the other layers in
    proportion. The fractions are then settled by largest remainder; ties, that is quotas equal to
    within 2**-20, go to the lower layer. Where all layers with a share are full, the rest goes
    evenly to those without.

    Args:
        shares: [L], finite and not negative.
        total: L <= total <= L * cap.
        cap: most that one layer may get.
    Returns:
        int64 [L]. No host sync.
    """
    tensor_of("shares", shares, ("L",))
    n_layers = shares.shape[0]
    cap, total = positive_int("cap", cap), positive_int("total", total)
    if not n_layers <= total <= n_layers * cap:
        raise ValueError(
            f"total must be between L={n_layers} and L * cap={n_layers * cap}, got {total}"
        )
    share = shares.to(torch.float64)
    top = share.amax()
    share = share / torch.where(top > 0, top, 1.0)
    some = share > _NO_SHARE
    least = torch.where(some, share, 1.0).amin()
    # so little that a layer without a share leaves the floor only when all others are full
    share = torch.where(some, share, least / (2 * cap))
    # the quota at water level x is clamp(x * share, 1, cap): find the x whose quotas add up
    leaves_floor, meets_cap = 1.0 / share, cap / share
    levels = torch.cat((leaves_floor, meets_cap)).sort().values  # [2 * L]
    filled = (levels[:, None] * share).clamp(1.0, float(cap)).sum(dim=1)
    index = (filled <= total).sum().sub(1).clamp_min(0)
    level = levels.gather(0, index.view(1))
    full = meets_cap <= level
    between = (leaves_floor <= level) & ~full
    low = ~(full | between)
    rest = total - cap * full.sum() - low.sum()
    flowing = torch.where(between, share, 0.0)
    pool = flowing.sum()
    quota = flowing * (rest / torch.where(pool > 0, pool, 1.0))
    quota = torch.where(full, float(cap), torch.where(low, 1.0, quota))
    quota = torch.round(quota / _QUOTA_STEP) * _QUOTA_STEP
    quota = quota.clamp(1.0, float(cap))
    whole = quota.floor()
    order = (quota - whole).argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        0, order, torch.arange(n_layers, device=order.device, dtype=order.dtype)
    )
    whole = whole.to(torch.int64)
    return whole + (rank < total - whole.sum()).to(torch.int64)


def in_proportion(shares: Tensor, n_visual: int, m: int) -> Tensor:
    """Budgets of a policy, int64 [L], in proportion to `shares` [L]. No host sync.

    What is no number, not finite or negative counts as 0.
    """
    shares = torch.nan_to_num(shares, nan=0.0, posinf=0.0, neginf=0.0).clamp_min(0.0)
    return largest_remainder(shares, m * shares.shape[0], n_visual)


def layer_budgets_from_statistics(
    statistics: Tensor, n_visual: int, m: int, *, budget: str = "aircache"
) -> Tensor:
    """`layer_budgets` from statistics that may have been averaged over tensor-parallel ranks.

    Args:
        statistics: see `layer_shares`.
        n_visual: N_v.
        m: columns to fill, 1 <= m <= N_v; see `columns`.
        budget: see `layer_shares`.
    Returns:
        int64 [L] with sum L * m, each between 1 and N_v, whatever the
        statistics hold. No host sync.
    """
    n_visual, m = positive_int("n_visual", n_visual), positive_int("m", m)
    if m > n_visual:
        raise ValueError(f"m must be at most n_visual={n_visual}, got {m}")
    shares = layer_shares(statistics, budget=budget)
    return largest_remainder(shares, m * shares.shape[0], n_visual)


def head_strength(importance: Tensor) -> Tensor:
    """Sum of the scores of each layer and KV head, float64 [L, H_kv]."""
    tensor_of("importance", importance, ("L", "H_kv", "N_v"))
    return importance.sum(dim=-1, dtype=torch.float64)


def head_skewness(importance: Tensor) -> Tensor:
    """Adjusted sample skewness of each layer and KV head, not negative, float64 [L, H_kv]."""
    tensor_of("importance", importance, ("L", "H_kv", "N_v"))
    n = importance.shape[-1]
    if n < 3:
        return torch.zeros(importance.shape[:2], dtype=torch.float64, device=importance.device)
    scores = importance.to(torch.float64)
    flat = scores.amax(-1) - scores.amin(-1) <= _FLAT * scores.abs().amax(-1)  # [L, H_kv]
    centred = scores - mean(scores, -1, keepdim=True)
    deviation = (centred.square().sum(-1) / (n - 1)).sqrt()
    flat = flat | (deviation == 0)
    cubes = (centred / torch.where(flat, 1.0, deviation).unsqueeze(-1)).pow(3).sum(-1)
    value = cubes * (n / ((n - 1) * (n - 2)))
    return torch.where(flat, 0.0, value.clamp_min(0.0))


def select_padded(importance: Tensor, budgets: Tensor) -> Tensor:
    """All visual tokens by falling score; the first `budgets[l]` of a row are the kept ones.

    Padded to N_v, so that no shape depends on the budgets. Ties: the earlier token first.

    Args:
        importance: [L, H_kv, N_v].
        budgets: integers [L], on the same device; only their shape is looked at here.
    Returns:
        int64 [L, H_kv, N_v], each row a permutation of 0..N_v-1. No host sync.
    """
    tensor_of("importance", importance, ("L", "H_kv", "N_v"))
    if list(budgets.shape) != [importance.shape[0]]:
        raise ValueError(
            f"budgets must have shape [{importance.shape[0]}], got {list(budgets.shape)}"
        )
    if budgets.is_floating_point() or budgets.is_complex() or budgets.dtype == torch.bool:
        raise ValueError(f"budgets must be an integer tensor, got {budgets.dtype}")
    return importance.argsort(dim=-1, descending=True, stable=True)
