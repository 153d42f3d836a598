# SPDX-License-Identifier: Apache-2.0
"""A plugin of SGLang that starts what stock SGLang 0.5.23 cannot, and changes nothing else.

On the PYTHONPATH of a server with `--kv-policy none` it is what such a model is compared with.
"""

from __future__ import annotations


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from aircache_patches.models import initialize_model

    target = "sglang.srt.model_loader.loader._initialize_model"
    HookRegistry.register(target, initialize_model, HookType.AFTER)
