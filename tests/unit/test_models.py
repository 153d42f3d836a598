# SPDX-License-Identifier: Apache-2.0
"""Which models are refused, read from a config as SGLang reads it, each with its reason."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.configs.model_config import ModelConfig

from aircache_patches.models import initialize_model
from aircache_patches.support import (
    ADAPTED,
    ARCHITECTURES,
    HYBRIDS,
    out_of_reach,
    unsupported_adapters,
    unsupported_beside_states,
    unsupported_dtype,
    unsupported_kv_dtype,
    unsupported_tower,
)
from aircache_sglang.config import AirCacheConfig

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
MLA = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
WINDOW = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}
GPT_OSS = TEXT | {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}
INTERN_VIT = {"architectures": ["InternVisionModel"]}
CLIP = {"model_type": "clip_vision_model"}


@pytest.mark.parametrize(
    ("architecture", "config", "reason"),
    [
        (
            "KimiVLForConditionalGeneration",
            {
                "model_type": "kimi_vl",
                "text_config": TEXT | MLA | {"model_type": "deepseek_v3"},
                "vision_config": {},
            },
            "multi-head latent attention",
        ),
        (
            "Gemma3ForConditionalGeneration",
            {
                "model_type": "gemma3",
                "text_config": TEXT | {"model_type": "gemma3_text", "sliding_window": 16},
                "vision_config": {"model_type": "siglip_vision_model"},
            },
            "sliding-window attention",
        ),
        (
            "Qwen2_5_VLForConditionalGeneration",
            {"model_type": "qwen2_5_vl", "text_config": TEXT | WINDOW},
            "sliding-window attention",
        ),
        (
            "InternVLChatModel",
            {"model_type": "internvl_chat", "llm_config": GPT_OSS, "vision_config": INTERN_VIT},
            "sliding-window attention",
        ),
        (
            "MiniCPMV4_6ForConditionalGeneration",
            {"model_type": "qwen3_5", "text_config": TEXT | {"model_type": "qwen3_5_text"}},
            "state-space or linear-attention layers",
        ),
        (
            "NemotronH_Nano_VL_V2",
            {"model_type": "NemotronH_Nano_VL_V2"},
            "state-space or linear-attention layers",
        ),
        ("MllamaForConditionalGeneration", {"model_type": "mllama"}, "cross attention"),
        ("LlamaForCausalLM", {"model_type": "llama", **TEXT}, "reads no pictures"),
        (
            "LlavaVidForCausalLM",
            {
                "model_type": "llava",
                "text_config": TEXT | {"model_type": "llama"},
                "vision_config": CLIP,
                **TEXT,
            },
            "SGLang 0.5.23 itself fails to serve",
        ),
    ],
)
def test_out_of_reach(
    tmp_path: Path, architecture: str, config: dict[str, Any], reason: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], **config}))
    assert reason in (out_of_reach(ModelConfig(str(tmp_path))) or "")


@pytest.mark.parametrize(
    "family",
    [
        *("qwen2_vl", "qwen3_vl_moe", "internvl_chat", "llava_qwen", "llava_next"),
        *("paddleocr_vl", "minicpm_v", "qwen3_omni", "dots_ocr", "step_vl"),
        *("glm4v_moe", "glm_ocr", "mistral3", "pixtral", "lighton_ocr", "qwen3_5", "qwen3_5_moe"),
        "interns2_preview",
    ],
)
def test_within_reach(tmp_path: Path, family: str) -> None:
    from aircache_sglang.testing import checkpoints

    path = str(getattr(checkpoints, f"make_{family}")(tmp_path))
    model = ModelConfig(path, trust_remote_code=family == "minicpm_v")
    assert model.hf_config.architectures[0] in ARCHITECTURES
    assert out_of_reach(model) is None and model.is_multimodal
    assert list(unsupported_tower("auto", model, "--kv-policy aircache")) == []


def test_llava_is_served_on_the_fallback_alone(tmp_path: Path) -> None:
    from aircache_sglang.testing.checkpoints import make_llava

    model = ModelConfig(str(make_llava(tmp_path)))
    assert model.hf_config.architectures[0] in ARCHITECTURES
    assert out_of_reach(model) is None and model.is_multimodal
    [sentence] = unsupported_tower("auto", model, "--kv-policy aircache")
    assert "LlavaForConditionalGeneration with a clip_vision_model" in sentence
    assert sentence.endswith("; add --model-impl transformers")
    assert list(unsupported_tower("transformers", model, "--kv-policy aircache")) == []


@pytest.mark.parametrize(
    ("backend", "kv", "dtype", "capability", "sentence"),
    [
        ("triton", "auto", torch.float16, (8, 0), None),
        ("triton", "bf16", torch.bfloat16, (8, 0), None),
        ("triton", "fp8_e4m3", torch.bfloat16, (8, 9), None),
        ("torch_native", "bfloat16", torch.float32, (8, 0), None),
        ("torch_native", "fp8_e4m3", torch.float32, (8, 0), None),
        ("fa3", "bf16", torch.float16, (9, 0), "bf16 beside a model in torch.float16; use"),
        ("triton", "bfloat16", torch.float32, (9, 0), "bfloat16 beside a model in torch.float32"),
        ("flashinfer", "fp8_e4m3", torch.bfloat16, (8, 6), "compute capability 8.6, below 8.9"),
    ],
)
def test_kv_that_the_kernels_cannot_read(
    backend: str,
    kv: str,
    dtype: torch.dtype,
    capability: tuple[int, int],
    sentence: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a device that is not there: what it can do is all that is asked of it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    view = SimpleNamespace(
        aircache_decode="auto",
        attention_backend=backend,
        decode_attention_backend=None,
        kv_cache_dtype=kv,
        device="cuda",
    )
    found = list(unsupported_kv_dtype(view, SimpleNamespace(dtype=dtype), "--kv-policy aircache"))
    assert len(found) == (sentence is not None)
    assert all(sentence in text and "--kv-cache-dtype auto" in text for text in found)


ADD_FLAGS = "add --mamba-radix-cache-strategy no_buffer --disable-overlap-schedule"


BESIDE_STATES: dict[str, Any] = {
    "disable_radix_cache": False,
    "mamba_radix_cache_strategy": "auto",
    "disable_overlap_schedule": True,
    "page_size": None,
    "attention_backend": None,
    "speculative_algorithm": None,
    "disaggregation_mode": "null",
    "enable_hierarchical_cache": False,
    "enable_int8_mamba_checkpoint": False,
    "enable_linear_replayssm": False,
    "enable_deterministic_inference": False,
    "rl_on_policy_target": None,
    "mamba_max_states_per_path": -1,
}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, None),
        ({"disable_radix_cache": True, "disable_overlap_schedule": False, "page_size": 64}, None),
        ({"disable_radix_cache": True, "enable_hierarchical_cache": True}, None),
        ({"mamba_radix_cache_strategy": "no_buffer", "page_size": 1}, None),
        ({"disable_overlap_schedule": False}, ADD_FLAGS),
        (
            {"mamba_radix_cache_strategy": "no_buffer", "disable_overlap_schedule": False},
            ADD_FLAGS,
        ),
        ({"mamba_radix_cache_strategy": "extra_buffer"}, ADD_FLAGS),
        ({"mamba_radix_cache_strategy": "extra_buffer_lazy"}, ADD_FLAGS),
        ({"page_size": 64}, "and --page-size 64, as a recurrent state ends at any token"),
        ({"enable_hierarchical_cache": True}, "and --enable-hierarchical-cache; serve it"),
        ({"enable_int8_mamba_checkpoint": True}, "and --enable-int8-mamba-checkpoint; serve"),
        ({"enable_deterministic_inference": True}, "and --enable-deterministic-inference; serve"),
        ({"rl_on_policy_target": "fsdp"}, "and --rl-on-policy-target fsdp; serve it without"),
        ({"enable_linear_replayssm": True}, "and --enable-linear-replayssm; serve it without"),
        ({"mamba_max_states_per_path": 4}, "and --mamba-max-states-per-path 4; serve it without"),
        ({"reuse": "compressed"}, "--aircache-reuse compressed, since a replica in the radix"),
        ({"speculative_algorithm": "NGRAM"}, "and --speculative-algorithm NGRAM; serve it"),
        (
            {"disaggregation_mode": "decode", "disable_radix_cache": True},
            "and --disaggregation-mode decode; serve it without",
        ),
    ],
)
def test_what_recurrent_states_cannot_follow(change: dict[str, Any], sentence: str | None) -> None:
    config = AirCacheConfig("aircache", reuse=change.get("reuse", "exact"))
    view = SimpleNamespace(**BESIDE_STATES | change)
    for architecture in HYBRIDS:
        found = list(unsupported_beside_states(view, config, architecture, "--kv-policy aircache"))
        assert len(found) == (sentence is not None)
        assert all(sentence in text and architecture in text for text in found)
    assert not list(unsupported_beside_states(view, config, "MiniCPMV", "--kv-policy aircache"))


def test_a_cache_that_misses_at_will_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_RADIX_FORCE_MISS", "1")
    view = SimpleNamespace(**BESIDE_STATES)
    [said] = unsupported_beside_states(
        view, AirCacheConfig("aircache"), HYBRIDS[0], "--kv-policy x"
    )
    assert said.endswith("and SGLANG_RADIX_FORCE_MISS=1; unset it, or add --disable-radix-cache")


def test_dots_ocr_is_served_in_bfloat16_alone() -> None:
    config = SimpleNamespace(architectures=["DotsOCRForCausalLM"])
    for dtype, count in ((torch.bfloat16, 0), (torch.float16, 1), (torch.float32, 1)):
        model = SimpleNamespace(hf_config=config, dtype=dtype)
        found = list(unsupported_dtype(model, "--kv-policy aircache"))
        assert len(found) == count
        assert all(sentence.endswith("use --dtype bfloat16") for sentence in found)


def test_the_model_inside_minicpm_v_is_given_what_its_wrapper_got() -> None:
    from sglang.srt.models.minicpmv import MiniCPMV

    wrapper, inner, given = MiniCPMV.__new__(MiniCPMV), torch.nn.Linear(1, 1), object()
    wrapper.minicpmv, wrapper.shared_experts_config = inner, given
    assert wrapper.eval() is inner, "SGLang has mended it: the hook can go"
    assert not hasattr(inner, "shared_experts_config")
    assert initialize_model(wrapper) is None and inner.shared_experts_config is given
    plain = torch.nn.Linear(1, 1)
    assert initialize_model(plain) is None and not hasattr(plain, "shared_experts_config")


# SGLang's own classes; the others of ARCHITECTURES are LLaVA's of its authors and the fallback.
NATIVE = {
    "Qwen2VLForConditionalGeneration": "qwen2_vl",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl_moe",
    "InternVLChatModel": "internvl",
    "PaddleOCRVLForConditionalGeneration": "paddleocr_vl",
    "MiniCPMV": "minicpmv",
    "Qwen3OmniMoeForConditionalGeneration": "qwen3_omni_moe",
    "DotsOCRForCausalLM": "dots_ocr",
    "StepVLForConditionalGeneration": "step3_vl_10b",
    "Glm4vForConditionalGeneration": "glm4v",
    "Glm4vMoeForConditionalGeneration": "glm4v_moe",
    "GlmOcrForConditionalGeneration": "glm_ocr",
    "Mistral3ForConditionalGeneration": "mistral",
    "LightOnOCRForConditionalGeneration": "lightonocr",
    "LlavaForConditionalGeneration": "llava",
}


@pytest.mark.parametrize("architecture", NATIVE)
def test_adapters_are_served_where_sglang_keeps_them_off_the_vision_tower(
    architecture: str,
) -> None:
    module = importlib.import_module(f"sglang.srt.models.{NATIVE[architecture]}")
    model = getattr(module, architecture)
    adapts = getattr(model, "should_apply_lora", None)
    keeps_off = adapts is not None and not adapts(model, "visual.blocks.0.attn.qkv_proj")
    assert (architecture in ADAPTED) == keeps_off
    if adapts is not None:
        assert adapts(model, "model.layers.0.self_attn.qkv_proj")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapters_of_the_others_are_refused(architecture: str) -> None:
    model = SimpleNamespace(hf_config=SimpleNamespace(architectures=[architecture]))
    found = list(unsupported_adapters(model, "--kv-policy aircache"))
    assert len(found) == (architecture not in ADAPTED)
    for sentence in found:
        assert architecture in sentence and sentence.endswith("drop --enable-lora and --lora-paths")
