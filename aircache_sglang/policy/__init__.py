# SPDX-License-Identifier: Apache-2.0
"""The mathematics of AirCache and its peers: torch only, free of the engine, checkable."""

from __future__ import annotations

from aircache_sglang.policy.aircache import AirCache
from aircache_sglang.policy.base import Policy, States
from aircache_sglang.policy.budget import (
    BUDGET_MODES,
    columns,
    head_mean_statistics,
    largest_remainder,
    layer_budgets_from_statistics,
    layer_shares,
    pyramid_shares,
    select_padded,
)
from aircache_sglang.policy.elastic import Elastic
from aircache_sglang.policy.h2o import H2O
from aircache_sglang.policy.importance import (
    DEFAULT_WINDOW,
    ELITE_MODES,
    elite_mask_batched,
    importance_batched,
    reference_rows,
)
from aircache_sglang.policy.mass import visual_mass
from aircache_sglang.policy.merge import merge_dropped
from aircache_sglang.policy.mixkv import MixKV
from aircache_sglang.policy.paper import (
    elite_mask,
    importance,
    layer_budgets,
    select,
    skewness,
    strength,
)
from aircache_sglang.policy.prefixkv import PrefixKV
from aircache_sglang.policy.prompt_attention import accumulate
from aircache_sglang.policy.pyramidkv import PyramidKV
from aircache_sglang.policy.random import Random
from aircache_sglang.policy.registry import get_policy, policy_names, register_policy
from aircache_sglang.policy.snapkv import SnapKV
from aircache_sglang.policy.streaming import Streaming
from aircache_sglang.policy.tgvkv import TGVKV
from aircache_sglang.policy.threshold import global_counts
from aircache_sglang.policy.validation import validate_alpha, validate_retention
from aircache_sglang.policy.vlcache import VLCache

__all__ = [
    "BUDGET_MODES",
    "DEFAULT_WINDOW",
    "ELITE_MODES",
    "H2O",
    "TGVKV",
    "AirCache",
    "Elastic",
    "MixKV",
    "Policy",
    "PrefixKV",
    "PyramidKV",
    "Random",
    "SnapKV",
    "States",
    "Streaming",
    "VLCache",
    "accumulate",
    "columns",
    "elite_mask",
    "elite_mask_batched",
    "get_policy",
    "global_counts",
    "head_mean_statistics",
    "importance",
    "importance_batched",
    "largest_remainder",
    "layer_budgets",
    "layer_budgets_from_statistics",
    "layer_shares",
    "merge_dropped",
    "policy_names",
    "pyramid_shares",
    "reference_rows",
    "register_policy",
    "select",
    "select_padded",
    "skewness",
    "strength",
    "validate_alpha",
    "validate_retention",
    "visual_mass",
]
