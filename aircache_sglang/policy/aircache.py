# SPDX-License-Identifier: Apache-2.0
"""AirCache: elite observation window, budgets per layer (Huang et al., sections 3.3 and 3.4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from aircache_sglang.policy.base import Policy
from aircache_sglang.policy.budget import (
    BUDGET_MODES,
    head_mean_statistics,
    layer_budgets_from_statistics,
)
from aircache_sglang.policy.elite import ELITE_MODES
from aircache_sglang.policy.importance import DEFAULT_WINDOW, importance_batched
from aircache_sglang.policy.registry import register_policy
from aircache_sglang.policy.validation import one_of, positive_int, validate_alpha


@register_policy
@dataclass(frozen=True)
class AirCache(Policy):
    """The paper's policy.

    Args:
        alpha: relevance threshold of eq. 5, in [0, 1].
        elite: "per-head" or "shared"; see `elite_mask`.
        budget: "aircache", "uniform", "strength" or "skewness"; see `layer_shares`.
        window: at most so many last instruction tokens are looked at.
    """

    name: ClassVar[str] = "aircache"

    alpha: float = 0.9
    elite: str = "per-head"
    budget: str = "aircache"
    window: int = DEFAULT_WINDOW

    def __post_init__(self) -> None:
        validate_alpha(self.alpha)
        one_of("elite", self.elite, ELITE_MODES)
        one_of("budget", self.budget, BUDGET_MODES)
        positive_int("window", self.window)

    def score(
        self, q_text: Tensor, k_text: Tensor, k_visual: Tensor, *, scale: float | None = None
    ) -> Tensor:
        return importance_batched(
            q_text,
            k_text,
            k_visual,
            alpha=self.alpha,
            scale=scale,
            elite=self.elite,
            window=self.window,
        )

    def statistics(self, scores: Tensor) -> Tensor:
        return head_mean_statistics(scores)

    def budgets(self, statistics: Tensor, n_visual: int, m: int) -> Tensor:
        return layer_budgets_from_statistics(statistics, n_visual, m, budget=self.budget)
