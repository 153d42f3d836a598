# SPDX-License-Identifier: Apache-2.0
"""Models that SGLang 0.5.23 loads and cannot start."""

from __future__ import annotations

from typing import Any


def initialize_model(model: Any, *_: Any, **__: Any) -> None:
    """AFTER _initialize_model: the model inside MiniCPM-V's wrapper gets what the wrapper got.

    The wrapper is no nn.Module and hands `eval` on, so that the loader goes on with the model
    inside (models/minicpmv.py), which lacks the field that the runner reads.
    """
    inner = getattr(model, "minicpmv", None)
    if inner is not None:
        inner.shared_experts_config = model.shared_experts_config
