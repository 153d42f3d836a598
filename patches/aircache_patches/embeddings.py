# SPDX-License-Identifier: Apache-2.0
"""SGLang's vision embeddings, which outlive the weights that made them, and every flush.

`mm_schedule.embedding_cache` is keyed by a picture's hash alone, and stock SGLang never empties it
(sglang PR #36468 is open): after an update of the weights, a picture that was seen before is still
what the old vision tower made of it.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.managers import mm_schedule


def flush_cache_after_weight_update(*args: Any, **kwargs: Any) -> None:
    """BEFORE SchedulerWeightUpdaterManager.flush_cache_after_weight_update, to which every update
    comes that has changed the weights, whether it may flush or not (`flush_cache: false`)."""
    if mm_schedule.embedding_cache is not None:
        mm_schedule.embedding_cache.clear()
