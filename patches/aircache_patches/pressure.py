# SPDX-License-Identifier: Apache-2.0
"""Packing when the pool is short: before admission gives up, and before a retraction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aircache_patches import process


def available_and_evictable(original: Callable[..., int], budget: Any) -> int:
    """AROUND PrefillBudget._available_and_evictable: what could be packed counts as available."""
    return original(budget) + process.compressor().pressure.promised(budget.tree_cache)


def update_running_batch(original: Callable[..., Any], scheduler: Any, batch: Any) -> Any:
    """AROUND Scheduler.update_running_batch: requests are packed before one is retracted.

    None skips this decode step, as in SGLang where finishing requests are about to free slots.
    """
    pressure, tree = process.compressor().pressure, batch.tree_cache
    # SGLang itself waits for the slots of requests that finish.
    if not pressure.is_far(tree, batch) and not scheduler._reqs_finishing_inflight(batch):
        need = batch.new_tokens_required_next_decode()
        if not pressure.for_decode(tree, need, batch.reqs):
            # What was decided must not wait for a forward: rows would name slots of others.
            launch(scheduler)
            return None
    return original(scheduler, batch)


def launch(scheduler: Any) -> None:
    """Pack what was decided now, and not with the next forward."""
    pressure = process.compressor().pressure
    if pressure.has_decided():
        with scheduler.forward_stream_ctx:
            scheduler.forward_stream.wait_stream(scheduler.schedule_stream)
            pressure.launch()
        # No forward need follow: what takes these slots next may not be behind one's barrier.
        scheduler.schedule_stream.wait_stream(scheduler.forward_stream)
