# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints, written in a second, that SGLang and Transformers load."""

from __future__ import annotations

from tests.factories.qwen2_vl import make_qwen2_vl

__all__ = ["make_qwen2_vl"]
