# SPDX-License-Identifier: Apache-2.0
"""The policy object that a request's configuration asks for."""

from __future__ import annotations

import functools

from aircache_sglang.config import AirCacheConfig
from aircache_sglang.policy import Policy, get_policy


@functools.lru_cache(maxsize=256)
def policy_of(config: AirCacheConfig) -> Policy:
    """A policy with the knobs of `config` that it has."""
    window, visual = config.observed()
    ablation = config.ablation
    pooled: dict[str, object] = {"window": window, "kernel": ablation.kernel}
    options: dict[str, dict[str, object]] = {
        "aircache": {
            "alpha": config.scoring_window()[1],
            "elite": config.elite,
            "budget": config.budget,
            "window": window or config.scoring_window()[0],
            "visual": visual,
            # What a request inherits may be another budget's.
            "floor": ablation.floor if config.budget == "global" else 0.0,
        },
        **dict.fromkeys(("snapkv", "pyramidkv", "mixkv"), pooled),
        "random": {"seed": ablation.seed},
        "streaming": {"sinks": ablation.sinks},
    }
    return get_policy(config.policy, **options.get(config.policy, {}))
