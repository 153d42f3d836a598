# SPDX-License-Identifier: Apache-2.0
"""The KV pool that SGLang builds for plain multi-head attention, and what it may fill."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sglang.srt.runtime_context import get_parallel

from aircache_patches import process
from aircache_patches.refusal import refuse

logger = logging.getLogger(__name__)


def get_kv_pool_cls(original: Callable[..., Any], platform: Any, *, kind: str) -> Any:
    """AROUND SRTPlatform.get_kv_pool_cls: our pool for kind "mha"."""
    from aircache_sglang.engine.kv_pool import LayerContiguousKVPool

    chosen = original(platform, kind=kind)
    if kind != "mha":
        return chosen
    if chosen is not None:
        raise refuse(
            f"--kv-policy needs its own KV pool, but the platform "
            f"{type(platform).__name__} brings {chosen.__name__}; select another platform"
        )
    return LayerContiguousKVPool


def profile_available_bytes(original: Callable[..., int], configurator: Any, *args: Any) -> int:
    """AROUND KVCacheConfigurator._profile_available_bytes: room for the queries that a prefill
    keeps until its pass, and for what packing under pressure needs."""
    from aircache_sglang.engine.model import ladder_share, query_bytes

    stock = original(configurator, *args)
    _, config = process.policy_in_force()
    reserved = query_bytes(configurator.model_config, get_parallel().attn_tp_size)
    if config.when == "pressure":
        share = ladder_share(
            configurator.model_config, configurator.kv_cache_dtype, config.ladder()[0]
        )
        reserved += int(share * max(0, stock - reserved))
    if reserved >= stock:
        raise refuse(
            f"--kv-policy needs {reserved >> 20} MiB beside the KV pool, and "
            f"--mem-fraction-static leaves {stock >> 20} MiB for both; raise it"
        )
    logger.info("Reserving %.2f GB of the KV budget for the compression pass.", reserved / 2**30)
    return stock - reserved
