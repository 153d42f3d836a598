# SPDX-License-Identifier: Apache-2.0
"""The ordered list of hooks, with the SGLang versions it was tested on.

README.md says for each hook why it is needed and what would make it unnecessary.
"""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

TESTED_VERSIONS = ("0.5.23",)


@dataclasses.dataclass(frozen=True, slots=True)
class Hook:
    """One function or class of SGLang that we wrap or replace."""

    target: str
    function: Any
    kind: HookType


def hooks() -> list[Hook]:
    """All hooks, in the order in which a request meets them."""
    from aircache_patches import (
        accounting,
        embeddings,
        forward,
        media,
        models,
        output,
        pool,
        prefill,
        pressure,
        requests,
        sessions,
    )

    before, after, around = HookType.BEFORE, HookType.AFTER, HookType.AROUND
    replace = HookType.REPLACE
    srt = "sglang.srt."
    return [
        Hook(srt + "platforms.interface.SRTPlatform.get_kv_pool_cls", pool.get_kv_pool_cls, around),
        Hook(
            srt + "mem_cache.kv_cache_configurator.KVCacheConfigurator._profile_available_bytes",
            pool.profile_available_bytes,
            around,
        ),
        Hook(
            srt + "model_loader.loader._initialize_model",
            models.initialize_model,
            after,
        ),
        Hook(
            srt + "model_executor.model_runner.ModelRunner.init_attention_backends",
            forward.init_attention_backends,
            after,
        ),
        Hook(
            srt + "layers.attention.graph_variants.create_attention_graph_variants",
            forward.create_attention_graph_variants,
            around,
        ),
        Hook(
            srt + "managers.multimodal_processor.get_mm_processor",
            media.get_mm_processor,
            around,
        ),
        Hook(
            srt + "managers.tokenizer_manager.TokenizerManager._tokenize_one_request",
            media.tokenize_one_request,
            around,
        ),
        Hook(
            srt + "multimodal.processors.executor.MultimodalProcessorExecutor._run",
            media.run_in_worker,
            around,
        ),
        Hook(
            srt + "managers.tokenizer_manager.TokenizerManager._validate_one_request",
            requests.validate_one_request,
            after,
        ),
        Hook(
            srt + "session.session_controller.SessionController._close",
            sessions.close,
            around,
        ),
        Hook(
            srt + "session.session_controller.Session.create_req",
            sessions.create_req,
            around,
        ),
        Hook(
            srt + "managers.mm_utils.pad_mm_token_pairs",
            media.pad_mm_token_pairs,
            around,
        ),
        Hook(
            srt + "managers.scheduler.Scheduler.get_new_batch_prefill",
            prefill.get_new_batch_prefill,
            around,
        ),
        Hook(
            srt + "managers.schedule_policy.PrefillAdder.add_one_req",
            prefill.add_one_req,
            around,
        ),
        Hook(
            srt + "managers.schedule_policy.PrefillAdder.add_chunked_req",
            prefill.add_chunked_req,
            around,
        ),
        Hook(
            srt + "managers.schedule_policy.PrefillAdder._request_slot_reserve_for_req",
            prefill.request_slot_reserve_for_req,
            around,
        ),
        Hook(
            srt + "managers.schedule_batch.ScheduleBatch.prepare_for_extend",
            prefill.prepare_for_extend,
            around,
        ),
        Hook(
            srt + "mem_cache.prefill_budget.PrefillBudget._available_and_evictable",
            pressure.available_and_evictable,
            around,
        ),
        Hook(
            srt + "managers.scheduler.Scheduler.update_running_batch",
            pressure.update_running_batch,
            around,
        ),
        Hook(
            srt + "managers.tp_worker.TpModelWorker.forward_batch_generation",
            forward.forward_batch_generation,
            around,
        ),
        Hook(
            srt + "managers.mm_schedule.get_embedding_and_mask",
            media.get_embedding_and_mask,
            around,
        ),
        Hook(
            srt + "managers.scheduler_components.pool_stats_observer.kv_private_tokens",
            accounting.kv_private_tokens,
            around,
        ),
        Hook(
            srt + "managers.scheduler_components.output_streamer.SchedulerOutputStreamer",
            output.AirCacheOutputStreamer,
            replace,
        ),
        Hook(
            srt + "managers.tokenizer_manager.TokenizerManager.update_request_meta_info",
            requests.update_request_meta_info,
            around,
        ),
        Hook(
            srt + "managers.scheduler_components.internal_state"
            ".SchedulerInternalStateController.get_internal_state",
            accounting.get_internal_state,
            after,
        ),
        Hook(
            srt + "managers.scheduler_components.weight_updater"
            ".SchedulerWeightUpdaterManager.flush_cache_after_weight_update",
            embeddings.flush_cache_after_weight_update,
            before,
        ),
    ]


def disaggregation_hooks(mode: str) -> list[Hook]:
    """Hooks of a server that prefills for others (`prefill`), or decodes (`decode`); none for
    `null`."""
    if mode == "null":
        return []
    from aircache_patches import disaggregation

    around, srt = HookType.AROUND, "sglang.srt.disaggregation."
    metadata = Hook(
        srt + "utils.MetadataBuffers", disaggregation.AirCacheMetadataBuffers, HookType.REPLACE
    )
    if mode == "prefill":
        queue = srt + "prefill.PrefillBootstrapQueue."
        return [
            metadata,
            Hook(srt + "utils.get_pd_kv_layout", disaggregation.get_pd_kv_layout, around),
            Hook(queue + "_process_req", disaggregation.process_req, around),
            Hook(queue + "finalize_bootstrap", disaggregation.finalize_bootstrap, around),
            Hook(queue + "_num_pages_to_send", disaggregation.num_pages_to_send, around),
            Hook(
                srt + "prefill.SchedulerDisaggregationPrefillMixin.send_kv_chunk",
                disaggregation.send_kv_chunk,
                around,
            ),
        ]
    queue = srt + "decode.DecodePreallocQueue."
    return [
        metadata,
        Hook(queue + "_ensure_prefill_info", disaggregation.ensure_prefill_info, around),
        Hook(
            queue + "_required_admission_tokens", disaggregation.required_admission_tokens, around
        ),
        Hook(
            queue + "_need_space_for_single_req", disaggregation.need_space_for_single_req, around
        ),
        Hook(queue + "_prealloc_required_tokens", disaggregation.prealloc_required_tokens, around),
        Hook(
            queue + "_alloc_for_decode_prealloc", disaggregation.alloc_for_decode_prealloc, around
        ),
        Hook(queue + "_pre_alloc", disaggregation.pre_alloc, around),
        Hook(queue + "_transfer_page_indices", disaggregation.transfer_page_indices, around),
        Hook(
            srt + "decode.DecodeTransferQueue._commit_transfer_to_req",
            disaggregation.commit_transfer_to_req,
            around,
        ),
    ]


def shadow_hooks() -> list[Hook]:
    """Hooks of a server with --aircache-shadow; the last two stand for two of `hooks`."""
    from aircache_patches import shadow

    before, srt = HookType.BEFORE, "sglang.srt.managers."
    return [
        Hook(
            srt + "tp_worker.capture_pre_sample_logits",
            shadow.capture_pre_sample_logits,
            HookType.AFTER,
        ),
        Hook(
            srt + "scheduler.Scheduler.process_input_requests",
            shadow.process_input_requests,
            before,
        ),
        Hook(
            srt + "scheduler.Scheduler._get_new_batch_prefill_raw",
            shadow.get_new_batch_prefill_raw,
            HookType.AROUND,
        ),
        Hook(srt + "scheduler.Scheduler.flush_cache", shadow.flush_cache, before),
        Hook(srt + "scheduler.Scheduler.abort_request", shadow.abort_request, before),
        Hook(
            srt + "scheduler_components.weight_updater"
            ".SchedulerWeightUpdaterManager.flush_cache_after_weight_update",
            shadow.flush_cache_after_weight_update,
            before,
        ),
        Hook(
            srt + "scheduler_components.output_streamer.SchedulerOutputStreamer",
            shadow.ShadowOutputStreamer,
            HookType.REPLACE,
        ),
    ]


def hooks_for(mode: str, *, shadow: bool = False) -> list[Hook]:
    """All hooks of a server; mode: its --disaggregation-mode; shadow: with --aircache-shadow."""
    more = shadow_hooks() if shadow else []
    instead = {hook.target for hook in more}
    kept = [hook for hook in hooks() if hook.target not in instead]
    return [*kept, *disaggregation_hooks(mode), *more]


def resolution_hooks() -> list[tuple[str, Callable[[Any, Callable[[Any], None]], None]]]:
    """Wrapped steps of SGLang's argument resolution (arg_groups/pipeline.py)."""
    from aircache_patches import decode_graphs, resolution

    return [
        (step.__name__, step)
        for step in (
            decode_graphs.handle_gpu_memory_settings,
            resolution.handle_model_specific_adjustments,
            resolution.handle_deterministic_inference,
            resolution.handle_attention_backend_compatibility,
            resolution.handle_cache_compatibility,
        )
    ]


def missing_targets(mode: str = "null", *, shadow: bool = False) -> list[str]:
    """Targets that the installed SGLang does not have; mode, shadow: as in `hooks_for`."""
    missing = []
    for hook in hooks_for(mode, shadow=shadow):
        try:
            pkgutil.resolve_name(hook.target)
        except (ImportError, AttributeError):
            missing.append(hook.target)
    return missing
