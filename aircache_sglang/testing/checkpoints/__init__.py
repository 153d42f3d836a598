# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints, written in a second, that SGLang and Transformers load."""

from __future__ import annotations

import importlib
from typing import Any

from aircache_sglang.testing.checkpoints.qwen2_vl import make_qwen2_vl

__all__ = [
    "make_dots_ocr",
    "make_glm4v",
    "make_glm4v_moe",
    "make_glm_ocr",
    "make_interns2_preview",
    "make_internvl_chat",
    "make_internvl_hf",
    "make_lighton_ocr",
    "make_llava",
    "make_llava_next",
    "make_llava_next_video",
    "make_llava_onevision",
    "make_llava_qwen",
    "make_minicpm_v",
    "make_paddleocr_vl",
    "make_mistral3",
    "make_pixtral",
    "make_qwen2_5_vl",
    "make_qwen2_vl",
    "make_qwen3_5",
    "make_qwen3_5_moe",
    "make_qwen3_omni",
    "make_qwen3_vl",
    "make_qwen3_vl_moe",
    "make_step_vl",
]

# Of makers that share a module of another name.
_MODULES = {
    "make_glm4v": "glm_v",
    "make_glm4v_moe": "glm_v",
    "make_glm_ocr": "glm_v",
    "make_interns2_preview": "qwen3_5",
    "make_lighton_ocr": "pixtral",
    "make_llava_next": "llava",
    "make_mistral3": "pixtral",
}


def __getattr__(name: str) -> Any:
    """Import the families that need Transformers' model classes, seconds, only when asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULES.get(name, name.removeprefix("make_").removesuffix("_moe"))
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
