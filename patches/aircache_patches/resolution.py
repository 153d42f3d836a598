# SPDX-License-Identifier: Apache-2.0
"""Choices that the policy makes for the operator while SGLang resolves its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

from aircache_patches.refusal import refuse


def handle_cache_compatibility(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Select our radix cache; another one chosen by the operator is refused."""
    from aircache_sglang.engine.radix_cache import BACKEND_NAME

    previous(server_args)
    chosen = resolving_view(server_args).radix_cache_backend
    if chosen not in (None, BACKEND_NAME):
        raise refuse(
            f"--kv-policy {server_args.kv_policy} brings its own radix cache and cannot use "
            f"--radix-cache-backend {chosen}; drop one of the two flags"
        )
    declare_resolution(server_args, "aircache.radix_cache", radix_cache_backend=BACKEND_NAME)


def register_radix_cache() -> None:
    """Make our radix cache known to this process, once."""
    from sglang.srt.mem_cache.registry import (
        get_radix_cache_factory,
        register_radix_cache_backend,
    )

    from aircache_sglang.engine.radix_cache import BACKEND_NAME

    if get_radix_cache_factory(BACKEND_NAME) is None:
        register_radix_cache_backend(BACKEND_NAME, _make_radix_cache)


def _make_radix_cache(context: Any) -> Any:
    from aircache_patches import process
    from aircache_sglang.engine.radix_cache import AirCacheRadixCache

    context.params.disable = context.disable_radix_cache
    compressor = process.compressor()
    return AirCacheRadixCache(
        context.params, compressor, compressor.config.pin_text, compressor.metrics
    )
