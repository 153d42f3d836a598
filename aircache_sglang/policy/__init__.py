# SPDX-License-Identifier: Apache-2.0
"""The mathematics of AirCache: torch only, free of the engine, checkable against the paper."""

from __future__ import annotations

from aircache_sglang.policy.aircache import AirCache
from aircache_sglang.policy.base import Policy
from aircache_sglang.policy.budget import (
    BUDGET_MODES,
    columns,
    head_mean_statistics,
    largest_remainder,
    layer_budgets,
    layer_budgets_from_statistics,
    layer_shares,
    skewness,
    strength,
)
from aircache_sglang.policy.elite import (
    ELITE_MODES,
    elite_mask,
    elite_mask_batched,
    reference_rows,
)
from aircache_sglang.policy.importance import DEFAULT_WINDOW, importance, importance_batched
from aircache_sglang.policy.registry import get_policy, policy_names, register_policy
from aircache_sglang.policy.selection import select, select_padded
from aircache_sglang.policy.validation import validate_alpha, validate_retention

__all__ = [
    "BUDGET_MODES",
    "DEFAULT_WINDOW",
    "ELITE_MODES",
    "AirCache",
    "Policy",
    "columns",
    "elite_mask",
    "elite_mask_batched",
    "get_policy",
    "head_mean_statistics",
    "importance",
    "importance_batched",
    "largest_remainder",
    "layer_budgets",
    "layer_budgets_from_statistics",
    "layer_shares",
    "policy_names",
    "reference_rows",
    "register_policy",
    "select",
    "select_padded",
    "skewness",
    "strength",
    "validate_alpha",
    "validate_retention",
]
