# SPDX-License-Identifier: Apache-2.0
"""One threshold for the scores of a whole request, and how many of each layer's reach it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from aircache_sglang.policy.validation import compute_dtype, positive_int, tensor_of

# Bits of the threshold that one reading of the scores settles, at most.
DIGIT = 11


def ordered_keys(scores: Tensor) -> Tensor:
    """Integers of the scores' size whose bits, read without a sign, rise with the scores.

    NaN equals negative infinity, and -0.0 equals 0.0.
    """
    lowest = -torch.inf
    value = scores.to(compute_dtype(scores)).nan_to_num(nan=lowest, posinf=-lowest, neginf=lowest)
    bits = (value.contiguous() + 0.0).view(
        torch.int64 if value.dtype == torch.float64 else torch.int32
    )
    return torch.where(bits < 0, ~bits, bits ^ torch.iinfo(bits.dtype).min)


def global_counts(
    scores: Tensor, cells: int, total: Callable[[Tensor], Tensor] = lambda counts: counts
) -> Tensor:
    """Of the `cells` highest scores of all layers and heads, how many are each layer's.

    Of the scores that equal the lowest of them, each layer counts the same share: equal layers
    count alike. A radix search over the bits of the scores finds the threshold, digit by digit;
    ranks that hold some of the heads each meet in the histograms, and count the same.

    Args:
        scores: [L, H_kv, N_v], the heads at hand.
        cells: 1 <= cells <= the number of scores on all ranks.
        total: the sum over ranks of an int32 tensor.
    Returns:
        float64 [L] with sum `cells` but for rounding. No host sync.
    """
    tensor_of("scores", scores, ("L", "H_kv", "N_v"))
    keys = ordered_keys(scores).flatten(1)
    n_layers, device = len(keys), keys.device
    left = torch.full((), positive_int("cells", cells), device=device)
    bins = torch.arange(1 << DIGIT, device=device)
    candidates = torch.ones_like(keys, dtype=torch.int32)
    above = ties = torch.zeros(n_layers, dtype=torch.int64, device=device)
    for high in range(8 * keys.element_size(), 0, -DIGIT):
        low = max(0, high - DIGIT)
        digit = (keys >> low).bitwise_and_((1 << (high - low)) - 1).to(torch.int64)
        counts = torch.zeros((n_layers, len(bins)), dtype=torch.int32, device=device)
        counts = total(counts.scatter_add_(1, digit, candidates))
        at_least = counts.sum(dim=0).flip(0).cumsum(0).flip(0)
        settled = (at_least >= left).sum() - 1
        higher = torch.where(bins > settled, counts, 0).sum(dim=1)
        above, left = above + higher, left - higher.sum()
        ties = torch.where(bins == settled, counts, 0).sum(dim=1)
        candidates *= digit == settled
    return above + (left * ties).double() / ties.sum()
