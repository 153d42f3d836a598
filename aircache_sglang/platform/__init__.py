# SPDX-License-Identifier: Apache-2.0
"""Entry point of the plain-CPU platform (group ``sglang.srt.platforms``).

SGLang calls :func:`activate` in every process the first time it asks for ``current_platform``.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import entry_points

ENTRY_POINT = "aircache_cpu"
GROUP = "sglang.srt.platforms"
PLATFORM_CLASS = "aircache_sglang.platform.cpu:PlainCpuPlatform"

_DEVICE_MODULES = ("cuda", "xpu", "mps", "npu", "musa", "hpu")


def has_accelerator() -> bool:
    """Whether torch sees any device other than the CPU (ROCm and SAIL report as CUDA)."""
    import torch

    if torch.accelerator.is_available():
        return True
    return any(
        module is not None and module.is_available()
        for module in (getattr(torch, name, None) for name in _DEVICE_MODULES)
    )


def activate() -> str | None:
    """Return the platform's qualified class name, or None to leave SGLang as it is.

    The platform takes a machine only where nothing else wants it:

    - ``SGLANG_USE_CPU_ENGINE=1`` asks for SGLang's own CPU engine: None.
    - ``SGLANG_PLATFORM`` names another platform, or it is unset and another platform plugin is
      installed (two activated plugins are an error in SGLang, platforms/__init__.py): None.
    - torch sees an accelerator, or the machine is not x86-64 (on arm64 SGLang calls CPU kernels
      that its CUDA wheel lacks, distributed/bootstrap.py:283): None.
    """
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None
    selected = os.environ.get("SGLANG_PLATFORM", "")
    if selected:
        if selected != ENTRY_POINT:
            return None
    elif any(ep.name != ENTRY_POINT for ep in entry_points(group=GROUP)):
        return None
    if platform.machine().lower() not in ("x86_64", "amd64") or has_accelerator():
        return None
    return PLATFORM_CLASS
