# SPDX-License-Identifier: Apache-2.0
"""Choices that the policy makes for the operator while SGLang resolves its arguments."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sglang.srt.arg_groups.overrides import (
    declare_resolution,
    get_default_attn_backend,
    model_config_of,
    resolved_view,
    resolving_view,
    use_mla_backend,
)
from sglang.srt.runtime_context import get_platform

from aircache_patches.refusal import refuse
from aircache_patches.support import served_backends, unsupported_beside_states
from aircache_sglang.config import AirCacheConfig

logger = logging.getLogger(__name__)


def handle_deterministic_inference(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Refuse what would answer by the batch all the same: only Triton's decode does not."""
    view = resolving_view(server_args)
    for field in ("rl_on_policy_target", "enable_deterministic_inference"):
        if getattr(view, field) and (
            view.device != "cuda" or server_args.aircache_decode not in ("auto", "triton")
        ):
            raise refuse(
                f"--kv-policy {server_args.kv_policy} works with --{field.replace('_', '-')} by "
                "its Triton decode on a CUDA device alone, since another follows what else is in "
                "the batch; drop one of the two flags"
            )
    previous(server_args)


def handle_model_specific_adjustments(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Refuse a hybrid model's flags before SGLang asserts that this machine can serve them."""
    architecture = (model_config_of(server_args).hf_config.architectures or [""])[0]
    policy = f"--kv-policy {server_args.kv_policy}"
    view, config = resolving_view(server_args), AirCacheConfig.from_server_args(server_args)
    for sentence in unsupported_beside_states(view, config, architecture, policy):
        raise refuse(sentence)
    previous(server_args)


def handle_attention_backend_compatibility(
    server_args: Any, previous: Callable[[Any], None]
) -> None:
    """Replace SGLang's own default where it cannot be served: on Blackwell, with pages of 64.

    FlashInfer is what SGLang takes where it has no faster backend, and Triton without FlashInfer
    (arg_groups/model_override_base.py, get_default_attn_backend).
    """
    view = resolving_view(server_args)
    if view.attention_backend is None and view.device == "cuda" and get_platform().is_cuda:
        default = get_default_attn_backend(
            resolved_view(server_args), use_mla_backend(server_args), model_config_of(server_args)
        )
        if default not in served_backends("cuda"):
            backend = "flashinfer" if get_platform().has_flashinfer else "triton"
            logger.info(
                "aircache: the attention backend is %s; SGLang's default here, %s, is not served.",
                backend,
                default,
            )
            declare_resolution(server_args, "aircache.attention_backend", attention_backend=backend)
    previous(server_args)


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
    view = resolving_view(server_args)
    if (
        view.disaggregation_mode == "decode"
        and view.disaggregation_decode_retraction_backup is None
    ):
        # SGLang's default backs up into host pools of its own radix cache.
        declare_resolution(
            server_args,
            "aircache.retraction_backup",
            disaggregation_decode_retraction_backup="cpu_tensor",
        )


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
    from aircache_sglang.engine.stateful_cache import StatefulCache

    context.params.disable = context.disable_radix_cache
    compressor = process.compressor()
    given = context.params, compressor, compressor.config.pin_text, compressor.metrics
    if context.is_hybrid_ssm:
        return StatefulCache(*given)
    if not context.enable_hierarchical_cache:
        return AirCacheRadixCache(*given)
    # Imported here: it brings all of SGLang's host pools.
    from aircache_sglang.engine.host_tier import TieredRadixCache, make_controller

    tree = TieredRadixCache(*given, make_controller(context.params))
    # As in mem_cache/registry.py, create_unified_radix_cache.
    context.tp_worker.register_hicache_layer_transfer_counter(
        tree.cache_controller.layer_done_counter
    )
    return tree
