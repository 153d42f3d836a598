# SPDX-License-Identifier: Apache-2.0
"""What cannot be served, each in one sentence that names it and says what to do."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator
from typing import Any

from aircache_sglang.config import AirCacheConfig

# Of the served, those in which layers with a recurrent state stand between the attending ones.
HYBRIDS = (
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
    "InternS2PreviewForConditionalGeneration",
)
# Served and tested; see docs/models.md. LlavaQwenForCausalLM is LLaVA-OneVision and LLaVA-NeXT in
# the form of their authors, LlavaForConditionalGeneration is Pixtral and LLaVA-1.5 in that of
# Transformers; the last four run on SGLang's Transformers fallback.
ARCHITECTURES = (
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "InternVLChatModel",
    "PaddleOCRVLForConditionalGeneration",
    "MiniCPMV",
    "Qwen3OmniMoeForConditionalGeneration",
    "DotsOCRForCausalLM",
    "StepVLForConditionalGeneration",
    *HYBRIDS,
    "Glm4vForConditionalGeneration",
    "Glm4vMoeForConditionalGeneration",
    "GlmOcrForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "LightOnOCRForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "LlavaQwenForCausalLM",
    "LlavaOnevisionForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaNextVideoForConditionalGeneration",
    "InternVLForConditionalGeneration",
)
# Of which SGLang adapts the decoder and leaves the vision tower alone (`should_apply_lora`).
ADAPTED = ARCHITECTURES[:4]

# (field of SGLang's arguments, the value that is fine, the flag as the operator knows it)
_FLAGS: tuple[tuple[str, Any, str], ...] = (
    ("encoder_only", False, "--encoder-only"),
    ("language_only", False, "--language-only"),
    ("enable_pdmux", False, "--enable-pdmux"),
    ("hicache_storage_backend", None, "--hicache-storage-backend"),
    ("enable_unified_memory", False, "--enable-unified-memory"),
    ("enable_unified_cache_external_linker", False, "--enable-unified-cache-external-linker"),
    ("enable_session_radix_cache", False, "--enable-session-radix-cache"),
    ("enable_streaming_session", False, "--enable-streaming-session"),
    ("enable_lmcache", False, "--enable-lmcache"),
    ("enable_flexkv", False, "--enable-flexkv"),
    ("enable_hisparse", False, "--enable-hisparse"),
    ("enable_page_major_kv_layout", False, "--enable-page-major-kv-layout"),
    ("enable_kv_cache_sharding", False, "--enable-kv-cache-sharding"),
    ("prefill_only_disable_kv_cache", False, "--prefill-only-disable-kv-cache"),
    ("enable_encoder_swa_bounded_replay", False, "--enable-encoder-swa-bounded-replay"),
    ("enable_two_batch_overlap", False, "--enable-two-batch-overlap"),
    ("enable_torch_compile", False, "--enable-torch-compile"),
    ("attn_dp_size", 1, "--attn-dp-size"),
    ("attn_cp_size", 1, "--attn-cp-size"),
    ("dcp_size", 1, "--dcp-size"),
    ("pp_size", 1, "--pp-size"),
    ("dllm_algorithm", None, "--dllm-algorithm"),
    ("kv_canary", "none", "--kv-canary"),
)
# Knobs that pages of several tokens cannot serve (config.py, needs_single_tokens).
_SINGLE_TOKENS = {
    "session_columns": "--aircache-session-columns",
    "ablation.audience": "--aircache-ablation audience",
}
# Knobs that nothing reads without a radix cache (config.py, needs_tree).
_TREE = {
    "reuse": "--aircache-reuse compressed",
    "session_columns": "--aircache-session-columns",
    "pin_text": "--aircache-pin-text",
}
# Knobs that a prefill and a decode server cannot serve together (config.py, needs_one_server).
_ONE_SERVER = {
    "reuse": "--aircache-reuse compressed",
    "when": "--aircache-when pressure",
    "session_columns": "--aircache-session-columns",
    "ablation.audience": "--aircache-ablation audience",
}
# As _FLAGS, of a server that prefills or decodes for another.
_PAIR_FLAGS: tuple[tuple[str, Any, str], ...] = (
    ("disaggregation_transfer_backend", "mooncake", "--disaggregation-transfer-backend"),
    (
        "disaggregation_decode_allocation_policy",
        "early",
        "--disaggregation-decode-allocation-policy",
    ),
    ("optimistic_prefill_attempts", 0, "--optimistic-prefill-attempts"),
    ("disaggregation_enable_kv_checksum", False, "--disaggregation-enable-kv-checksum"),
    (
        "disaggregation_decode_enable_radix_cache",
        False,
        "--disaggregation-decode-enable-radix-cache",
    ),
    (
        *("disaggregation_decode_enable_offload_kvcache", False),
        "--disaggregation-decode-enable-offload-kvcache",
    ),
    (
        *("disaggregation_decode_host_receive_threshold", 1.0),
        "--disaggregation-decode-host-receive-threshold",
    ),
    ("enable_pd_role_switch", False, "--enable-pd-role-switch"),
    ("enable_hierarchical_cache", False, "--enable-hierarchical-cache"),
    ("speculative_algorithm", None, "--speculative-algorithm"),
    ("page_size", 1, "--page-size"),
)
# As _FLAGS, of a server with --aircache-shadow.
_SHADOW_FLAGS: tuple[tuple[str, Any, str], ...] = (
    ("speculative_algorithm", None, "--speculative-algorithm"),
    ("disaggregation_mode", "null", "--disaggregation-mode"),
    ("enable_hierarchical_cache", False, "--enable-hierarchical-cache"),
)
# As _FLAGS, of a hybrid model; and of one with a radix cache.
_BESIDE_STATES: tuple[tuple[str, Any, str], ...] = (
    ("speculative_algorithm", None, "--speculative-algorithm"),
    ("disaggregation_mode", "null", "--disaggregation-mode"),
)
_BESIDE_CACHED_STATES: tuple[tuple[str, Any, str], ...] = (
    ("enable_hierarchical_cache", False, "--enable-hierarchical-cache"),
    # An answer's bits depend on where chunks end.
    ("enable_deterministic_inference", False, "--enable-deterministic-inference"),
    ("rl_on_policy_target", None, "--rl-on-policy-target"),
    ("enable_int8_mamba_checkpoint", False, "--enable-int8-mamba-checkpoint"),
    ("enable_linear_replayssm", False, "--enable-linear-replayssm"),
    ("mamba_max_states_per_path", -1, "--mamba-max-states-per-path"),
)
# Why a hybrid extends no replica.
NO_STATE = "since a replica in the radix cache has no recurrent state to go on from"
# Switches of SGLang that are environment variables.
_VARIABLES = (
    "SGLANG_RUST_SERVER",
    "SGLANG_ENABLE_METADATA_GLUE_GRAPH",
    "SGLANG_USE_HND_KVCACHE",
)
# Prefill is the backend's own; decode of compressed requests is ours.
CPU_BACKENDS = ("torch_native", "triton")
CUDA_BACKENDS = ("flashinfer", "triton", "fa3")
_KV_DTYPES = ("auto", "bf16", "bfloat16", "fp8_e4m3")
# Of FlashInfer's FA2 decode.
_FLASHINFER_HEAD_DIMS = (64, 128, 256)


def _given(view: Any, flags: Iterable[tuple[str, Any, str]]) -> Iterator[str]:
    """Those of `flags` that are not what is fine, as the operator wrote them."""
    for field, fine, flag in flags:
        value = getattr(view, field)
        if value != fine:
            yield flag if value is True else f"{flag} {value}"


def unsupported(server_args: Any) -> Iterator[str]:
    """Sentences, the first of which refuses the start; none if all is well.

    server_args: a resolved record of SGLang's arguments.
    """
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.arg_groups.overrides import resolving_view

    view = resolving_view(server_args)
    policy = f"--kv-policy {server_args.kv_policy}"
    # First: SGLang derives other flags from the backend, as the page size.
    yield from _unsupported_device(view, policy)
    for field, fine, flag in _FLAGS:
        value = getattr(view, field)
        if value != fine and not (fine is False and value is None):
            if field == "attn_dp_size" and server_args.enable_dp_attention:
                # What was typed; SGLang turns it into --attn-dp-size.
                flag, value = "--enable-dp-attention", True
            shown = flag if value is True else f"{flag} {value}"
            yield f"{policy} does not work with {shown}; drop one of the two flags"
    if view.enable_mixed_chunk and view.enable_deterministic_inference:
        yield (
            f"{policy} does not work with --enable-mixed-chunk and "
            "--enable-deterministic-inference, since a mixed step decodes by another kernel; "
            "drop one of the two flags"
        )
    if view.radix_eviction_policy == "tlru":
        yield f"{policy} does not work with --radix-eviction-policy tlru; use lru"
    if view.kv_cache_dtype not in _KV_DTYPES:
        yield (
            f"{policy} does not work with --kv-cache-dtype {view.kv_cache_dtype}; "
            "use auto, bf16 or fp8_e4m3"
        )
    if view.page_size > 1:
        knob = AirCacheConfig.from_server_args(server_args).needs_single_tokens()
        if knob is not None:
            flag = _SINGLE_TOKENS[knob]
            yield (
                f"{policy} does not work with {flag} and --page-size {view.page_size}; "
                "use --page-size 1"
            )
    if view.disaggregation_mode != "null":
        yield from unsupported_disaggregation(
            view, AirCacheConfig.from_server_args(server_args), policy
        )
    elif view.disable_radix_cache:
        config = AirCacheConfig.from_server_args(server_args)
        pinned = config.pin_text != AirCacheConfig().pin_text
        knob = config.needs_tree() or ("pin_text" if pinned else None)
        if knob is not None:
            yield (
                f"{policy} does not work with {_TREE[knob]} and --disable-radix-cache; "
                "drop one of the flags"
            )
    if server_args.aircache_shadow > 0:
        for shown in _given(view, _SHADOW_FLAGS):
            yield f"--aircache-shadow does not work with {shown}; drop one of the two flags"
    if server_args.aircache_elite == "shared" and view.tp_size > 1:
        yield f"{policy} does not work with --aircache-elite shared and --tp-size > 1; use per-head"
    yield from _unsupported_environment(server_args, policy)
    yield from _unsupported_model(server_args, policy)
    if view.enable_lora:
        yield from unsupported_adapters(model_config_of(server_args), policy)
    yield from unsupported_kv_dtype(view, model_config_of(server_args), policy)
    if server_args.aircache_decode == "flashinfer":
        yield from unsupported_flashinfer(view, model_config_of(server_args), policy)
    if view.speculative_algorithm is not None:
        yield from unsupported_speculation(view, policy)


def unsupported_disaggregation(view: Any, config: AirCacheConfig, policy: str) -> Iterator[str]:
    """What a prefill and a decode server cannot serve together.

    view: SGLang's resolved arguments, of one of them; config: its own flags.
    """
    from sglang.srt.environ import envs

    pair = f"{policy} with --disaggregation-mode {view.disaggregation_mode} does not work with"
    for shown in _given(view, _PAIR_FLAGS):
        yield f"{pair} {shown}; drop one of the flags"
    if view.disaggregation_decode_retraction_backup not in (None, "cpu_tensor"):
        yield (
            f"{pair} --disaggregation-decode-retraction-backup "
            f"{view.disaggregation_decode_retraction_backup}; use cpu_tensor"
        )
    knob = config.needs_one_server()
    if knob is not None:
        yield f"{pair} {_ONE_SERVER[knob]}; drop one of the flags"
    if envs.SGLANG_DISAGG_STAGING_BUFFER.get():
        yield f"{pair} SGLANG_DISAGG_STAGING_BUFFER=1; unset it"
    if envs.SGLANG_MOONCAKE_CUSTOM_MEM_POOL.get():
        yield f"{pair} SGLANG_MOONCAKE_CUSTOM_MEM_POOL; unset it"


def unsupported_speculation(view: Any, policy: str) -> Iterator[str]:
    """What drafts tokens by layers of its own, and how drafts cannot be verified.

    view: SGLang's resolved arguments, of a server that speculates.
    """
    flag = f"--speculative-algorithm {view.speculative_algorithm}"
    if view.speculative_algorithm != "NGRAM":
        yield (
            f"{policy} does not work with {flag}, whose draft layers keep KV that nobody packs; "
            "use --speculative-algorithm NGRAM or drop one of the two flags"
        )
        return
    if view.enable_deterministic_inference or view.rl_on_policy_target:
        yield (
            f"{policy} with {flag} does not work with --enable-deterministic-inference or "
            "--rl-on-policy-target; drop one of the flags"
        )
    if view.page_size > 1:
        yield f"{policy} with {flag} does not work with --page-size {view.page_size}; use 1"
    # SGLang has none with speculation on a CPU, so that it could not be tested.
    if not view.disable_overlap_schedule:
        yield f"{policy} with {flag} needs --disable-overlap-schedule; add it"


def _unsupported_environment(server_args: Any, policy: str) -> Iterator[str]:
    from sglang.srt.arg_groups.overrides import post_capture_kv_sizing_planned
    from sglang.srt.environ import envs

    for variable in _VARIABLES:
        if getattr(envs, variable).get():
            yield f"{policy} does not work with {variable}=1; unset it"
    if post_capture_kv_sizing_planned(server_args):
        yield (
            f"{policy} does not work with post-capture KV sizing; "
            "set SGLANG_ENABLE_POST_CAPTURE_KV_SIZING=0"
        )


def decode_kind(flag: str, decode_backend: str) -> str:
    """What `--aircache-decode auto` means beside SGLang's decode attention backend."""
    if flag != "auto":
        return flag
    return "torch" if decode_backend == "torch_native" else "triton"


def served_backends(device: str) -> tuple[str, ...]:
    """SGLang's attention backends that run on this machine, the one to advise first."""
    from sglang.srt.runtime_context import get_platform

    if device != "cuda":
        return CPU_BACKENDS
    # FlashAttention 3 is for Ampere to Hopper (layers/attention/attention_registry.py).
    if 80 <= get_platform().device_sm < 100:
        return CUDA_BACKENDS
    return tuple(name for name in CUDA_BACKENDS if name != "fa3")


def _unsupported_device(view: Any, policy: str) -> Iterator[str]:
    if view.device not in ("cpu", "cuda"):
        yield (
            f"{policy} runs on CUDA devices and on plain CPUs, and this server runs on "
            f"{view.device}; drop --kv-policy"
        )
    names = {
        view.attention_backend,
        view.prefill_attention_backend or view.attention_backend,
        view.decode_attention_backend or view.attention_backend,
    }
    served = served_backends(view.device)
    # Triton on a CPU is an interpreter.
    advice = " or ".join(served) if view.device == "cuda" else served[0]
    for name in sorted(str(name) for name in names if name not in served):
        yield (
            f"{policy} does not work with the attention backend {name} on this {view.device} "
            f"device; use --attention-backend {advice}"
        )
    kind = decode_kind(
        view.aircache_decode, view.decode_attention_backend or view.attention_backend
    )
    if kind == "torch" and view.device == "cuda":
        yield f"{policy} decodes in torch on a CPU only; use --aircache-decode triton"
    if kind == "triton" and view.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        yield (
            f"{policy} decodes with Triton on a CPU only under TRITON_INTERPRET=1; "
            "use --attention-backend torch_native"
        )


def unsupported_kv_dtype(view: Any, model: Any, policy: str) -> Iterator[str]:
    """KV that the kernels cannot read: they take the type of the queries, or float8.

    view: SGLang's resolved arguments; model: its ModelConfig.
    """
    import torch

    backend = view.decode_attention_backend or view.attention_backend
    if decode_kind(view.aircache_decode, backend) == "torch":
        return
    flag = f"{policy} does not work with --kv-cache-dtype {view.kv_cache_dtype}"
    if view.kv_cache_dtype in ("bf16", "bfloat16") and model.dtype != torch.bfloat16:
        yield f"{flag} beside a model in {model.dtype}; use --kv-cache-dtype auto"
    if view.kv_cache_dtype == "fp8_e4m3" and view.device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        # Triton compiles no float8_e4m3fn below that.
        if (major, minor) < (8, 9):
            yield (
                f"{flag} on a GPU of compute capability {major}.{minor}, below 8.9; "
                "use --kv-cache-dtype auto"
            )


def unsupported_flashinfer(view: Any, model: Any, policy: str) -> Iterator[str]:
    """What one plan for all layers, made on the host in each step, cannot serve.

    view: SGLang's resolved arguments; model: its ModelConfig.
    """
    flag, other = f"{policy} with --aircache-decode flashinfer", "use --aircache-decode triton"
    if view.device != "cuda":
        yield f"{flag} needs a CUDA device, and this server runs on {view.device}; use auto"
    if importlib.util.find_spec("flashinfer") is None:
        yield f"{flag} needs FlashInfer, which is not installed; {other}"
    if view.cuda_graph_config.decode.backend != "disabled":
        yield (
            f"{flag} plans every step on the host, which no CUDA graph replays; "
            f"add --cuda-graph-backend-decode disabled, or {other}"
        )
    if model.dtype.itemsize != 2:
        yield f"{flag} needs --dtype bfloat16 or float16, got {model.dtype}; {other}"
    if model.head_dim not in _FLASHINFER_HEAD_DIMS:
        sizes = ", ".join(str(size) for size in _FLASHINFER_HEAD_DIMS)
        yield f"{flag} needs a head size of {sizes}, and the model has {model.head_dim}; {other}"


def _unsupported_model(server_args: Any, policy: str) -> Iterator[str]:
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.arg_groups.overrides import resolving_view

    model = model_config_of(server_args)
    architecture = (model.hf_config.architectures or ["an unnamed architecture"])[0]
    reason = out_of_reach(model)
    if reason:
        yield (
            f"{policy} does not work with {architecture}, which {reason}; "
            f"serve {server_args.model_path} without --kv-policy"
        )
    if architecture not in ARCHITECTURES:
        yield (
            f"{policy} supports {', '.join(ARCHITECTURES)}, and {server_args.model_path} is a "
            f"{architecture}; serve it without --kv-policy"
        )
    # Again, with the pages that SGLang has chosen since.
    view, config = resolving_view(server_args), AirCacheConfig.from_server_args(server_args)
    yield from unsupported_beside_states(view, config, architecture, policy)
    yield from unsupported_dtype(model, policy)
    yield from unsupported_tower(server_args.model_impl, model, policy)
    if not model.is_generation or not model.is_multimodal:
        yield (
            f"{policy} needs a model that answers with text about pictures, and "
            f"{server_args.model_path} is served as none; drop --is-embedding or --kv-policy"
        )


def unsupported_beside_states(
    view: Any, config: AirCacheConfig, architecture: str, policy: str
) -> Iterator[str]:
    """What a hybrid model's recurrent states cannot follow.

    view: SGLang's arguments, resolved or not; config: the server's own flags.
    """
    from sglang.srt.environ import envs

    if architecture not in HYBRIDS:
        return
    flags = _BESIDE_STATES if view.disable_radix_cache else _BESIDE_STATES + _BESIDE_CACHED_STATES
    for shown in _given(view, flags):
        yield f"{policy} does not work with {architecture} and {shown}; serve it without"
    if view.disable_radix_cache:
        return
    # It cuts a match to nothing that has named the state to go on from (mem_cache/common.py).
    if envs.SGLANG_RADIX_FORCE_MISS.get():
        yield (
            f"{policy} does not work with {architecture} and SGLANG_RADIX_FORCE_MISS=1; unset it, "
            "or add --disable-radix-cache"
        )
    # As SGLang resolves `auto` (arg_groups/overrides.py, _mamba_radix_cache_resolution).
    strategy = view.mamba_radix_cache_strategy
    if strategy not in ("auto", "no_buffer") or not view.disable_overlap_schedule:
        yield (
            f"{policy} caches the recurrent states of {architecture} where a step has ended, "
            "before the next one begins; add --mamba-radix-cache-strategy no_buffer "
            "--disable-overlap-schedule, or serve it with --disable-radix-cache"
        )
    if view.page_size not in (None, 1):
        yield (
            f"{policy} does not work with {architecture} and --page-size {view.page_size}, as a "
            "recurrent state ends at any token; use --page-size 1 or --disable-radix-cache"
        )
    # Asserted by SGLang (arg_groups/mamba_hook.py, validate_mamba_no_buffer).
    if view.attention_backend == "trtllm_mha":
        yield (
            f"{policy} does not work with {architecture}, a radix cache and --attention-backend "
            "trtllm_mha; use another"
        )
    knob = config.needs_tree()
    if knob is not None:
        yield (
            f"{policy} does not work with {architecture} and {_TREE[knob]}, {NO_STATE}; "
            "drop the flag"
        )


def unsupported_dtype(model: Any, policy: str) -> Iterator[str]:
    """dots.ocr in another type: the first picture would end SGLang 0.5.23.

    model: SGLang's ModelConfig. Its tower casts pixels to bfloat16, whatever its weights are
    (models/dots_vlm_vit.py, forward).
    """
    import torch

    architecture = model.hf_config.architectures[0]
    if architecture == "DotsOCRForCausalLM" and model.dtype != torch.bfloat16:
        yield (
            f"{policy} serves {architecture} in bfloat16 alone, got {model.dtype}; "
            "use --dtype bfloat16"
        )


def unsupported_tower(model_impl: str, model: Any, policy: str) -> Iterator[str]:
    """LLaVA-1.5 on SGLang 0.5.23's own class, which finds none for CLIP (models/llava.py:788).

    model_impl: as in --model-impl; model: SGLang's ModelConfig.
    """
    architecture = model.hf_config.architectures[0]
    if architecture != "LlavaForConditionalGeneration" or model_impl == "transformers":
        return
    tower = model.hf_config.vision_config.model_type
    if tower != "pixtral":
        yield (
            f"{policy} serves {architecture} with a {tower} on SGLang's Transformers fallback "
            "alone, since SGLang 0.5.23 itself fails to start it otherwise; "
            "add --model-impl transformers"
        )


def unsupported_adapters(model: Any, policy: str) -> Iterator[str]:
    """LoRA where SGLang 0.5.23 does not know which layers are the decoder's.

    model: SGLang's ModelConfig. Where a vision tower has layers of the same names, they get the
    decoder's adapters (lora/lora_manager.py:1120), and a picture's embedding, which SGLang caches
    by the picture alone, would be that of one adapter.
    """
    architecture = model.hf_config.architectures[0]
    if architecture not in ADAPTED:
        yield (
            f"{policy} serves LoRA adapters of {', '.join(ADAPTED)} alone, and this model is a "
            f"{architecture}; drop --enable-lora and --lora-paths"
        )


def out_of_reach(model: Any) -> str | None:
    """What a model does that its visual KV cannot be compressed; None for plain attention.

    model: SGLang's ModelConfig, which knows every family's own field names.
    """
    from sglang.srt.configs.model_config import AttentionArch

    text = model.hf_text_config
    kinds = set(getattr(text, "layer_types", None) or ())
    if model.is_encoder_decoder:
        return "reads its pictures by cross attention between an encoder and a decoder"
    if model.attention_arch == AttentionArch.MLA:
        return "uses multi-head latent attention (MLA)"
    recurrent = ("linear_attention", "mamba", "recurrent")
    fields = ("linear_num_value_heads", "mamba_d_state", "ssm_state_size", "state_size")
    if model.hf_config.architectures[0] not in HYBRIDS and (
        model.attention_arch == AttentionArch.SSM
        or kinds.intersection(recurrent)
        or any(getattr(text, field, None) for field in fields)
    ):
        return "has state-space or linear-attention layers"
    windows = {kind for kind in kinds if "sliding" in kind or "chunked" in kind}
    if model.is_hybrid_swa or windows or getattr(text, "use_sliding_window", False):
        return "uses sliding-window attention"
    if getattr(text, "model_type", None) == "gpt_oss":
        return "has attention sinks and sliding windows in its text tower"
    if "LlavaVidForCausalLM" in model.hf_config.architectures:
        return "SGLang 0.5.23 itself fails to serve (models/llavavid.py:202 reads missing offsets)"
    if not model.is_multimodal:
        return "reads no pictures"
    return None
