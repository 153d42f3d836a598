# SPDX-License-Identifier: Apache-2.0
"""SGLang's leak check while busy, and what it reports of itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.runtime_context import get_parallel

from aircache_patches import process
from aircache_sglang.config import REQUEST_KEY


def kv_private_tokens(original: Callable[..., int], kv: Any, page_size: int) -> int:
    """AROUND kv_private_tokens: slots a request owns outside the tree."""
    stock = original(kv, page_size)
    return process.compressor().private_tokens(kv.req_pool_idx, stock)


def get_internal_state(result: Any, controller: Any, recv_req: Any) -> None:
    """AFTER SchedulerInternalStateController.get_internal_state: the tree, for `aircache cache`,
    and what shadows have found, for `aircache audit`."""
    dump = controller.scheduler.tree_cache.describe()
    compressor = process.compressor()
    dump["totals"] = dict(compressor.metrics.totals)
    dump["dp_rank"] = get_parallel().dp_rank or 0
    if compressor.shadows is not None:
        dump["shadow"] = compressor.shadows.describe()
    result.internal_state[REQUEST_KEY] = dump
