# SPDX-License-Identifier: Apache-2.0
"""The KV pool that SGLang builds for plain multi-head attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aircache_patches.refusal import refuse


def get_kv_pool_cls(original: Callable[..., Any], platform: Any, *, kind: str) -> Any:
    """AROUND SRTPlatform.get_kv_pool_cls: our pool for kind "mha"."""
    from aircache_sglang.engine.kv_pool import LayerContiguousKVPool

    chosen = original(platform, kind=kind)
    if kind != "mha":
        return chosen
    if chosen is not None:
        raise refuse(
            f"--kv-policy aircache needs its own KV pool, but the platform "
            f"{type(platform).__name__} brings {chosen.__name__}; select another platform"
        )
    return LayerContiguousKVPool
