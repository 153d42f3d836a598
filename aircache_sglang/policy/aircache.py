# SPDX-License-Identifier: Apache-2.0
"""AirCache: elite observation window, budgets per layer (Huang et al., sections 3.3 and 3.4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from aircache_sglang.policy.base import Policy, States
from aircache_sglang.policy.budget import (
    BUDGET_MODES,
    head_mean_statistics,
    layer_budgets_from_statistics,
)
from aircache_sglang.policy.importance import DEFAULT_WINDOW, ELITE_MODES, importance_batched
from aircache_sglang.policy.prompt_attention import visual_window_attention
from aircache_sglang.policy.registry import register_policy
from aircache_sglang.policy.validation import (
    natural,
    number_in,
    one_of,
    positive_int,
    validate_alpha,
)


@register_policy
@dataclass(frozen=True)
class AirCache(Policy):
    """The paper's policy.

    Args:
        alpha: relevance threshold of eq. 5, in [0, 1].
        elite: "per-head" or "shared"; see `elite_mask`.
        budget: one of BUDGET_MODES; see `layer_shares`.
        window: at most so many last instruction tokens are looked at.
        visual: if above 0, the window is so many last visual tokens instead (table 5).
        floor: of budget "global", the share of the columns that all layers get alike, in [0, 1].
    """

    name: ClassVar[str] = "aircache"

    alpha: float = 0.9
    elite: str = "per-head"
    budget: str = "aircache"
    window: int = DEFAULT_WINDOW
    visual: int = 0
    floor: float = 0.0

    def __post_init__(self) -> None:
        validate_alpha(self.alpha)
        one_of("elite", self.elite, ELITE_MODES)
        one_of("budget", self.budget, BUDGET_MODES)
        positive_int("window", self.window)
        natural("visual", self.visual)
        number_in("floor", self.floor, 0.0, 1.0, open_low=False)
        if self.floor and not self.global_budgets:
            raise ValueError(f"floor is of budget global, got budget {self.budget}")

    @property
    def visual_window(self) -> int:
        return self.visual

    @property
    def global_budgets(self) -> bool:
        return self.budget == "global"

    def score(self, states: States) -> Tensor:
        if self.visual:
            return visual_window_attention(states)
        return importance_batched(
            states.q_text,
            states.k_text,
            states.k_visual,
            alpha=self.alpha,
            scale=states.scale,
            elite=self.elite,
            window=self.window,
            unified=states.unified,
        )

    def statistics(self, states: States, scores: Tensor) -> Tensor:
        if self.global_budgets:
            return super().statistics(states, scores)
        return head_mean_statistics(scores)

    def budgets(self, statistics: Tensor, n_visual: int, m: int) -> Tensor:
        if self.floor:
            even = statistics.mean(dim=-1, keepdim=True)
            statistics = (1 - self.floor) * statistics + self.floor * even
        return layer_budgets_from_statistics(statistics, n_visual, m, budget=self.budget)
