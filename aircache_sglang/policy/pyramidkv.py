# SPDX-License-Identifier: Apache-2.0
"""PyramidKV (Cai et al., arXiv 2406.02069): SnapKV's scores, less for the deeper layers.

Taken: the budgets fall linearly from the first layer to the last, which gets 1 / 20 of the average;
the window of 8 tokens and the max-pool over 7 of its LongBench runs (`run_longbench.py` of
github.com/Zefan-Cai/PyramidKV). Different: as SnapKV here; and the arithmetic sequence is brought
to whole numbers that add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from aircache_sglang.policy.budget import largest_remainder, pyramid_shares
from aircache_sglang.policy.registry import register_policy
from aircache_sglang.policy.snapkv import SnapKV


@register_policy
@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with descending budgets; the arguments are SnapKV's."""

    name: ClassVar[str] = "pyramidkv"

    window: int = 8

    def budgets(self, statistics: Tensor, n_visual: int, m: int) -> Tensor:
        shares = pyramid_shares(statistics[0])
        return largest_remainder(shares, m * shares.shape[0], n_visual)
