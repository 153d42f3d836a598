# SPDX-License-Identifier: Apache-2.0
"""The model runner's attention backend, and the forward pass that compression follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aircache_patches import process
from aircache_patches.support import decode_kind


def init_attention_backends(result: Any, model_runner: Any) -> None:
    """AFTER ModelRunner.init_attention_backends: pool, request table and backend exist now."""
    from aircache_sglang.engine.compressor import Compressor

    _, config = process.policy_in_force()
    decode = decode_kind(
        model_runner.server_args.aircache_decode, model_runner.decode_attention_backend_str
    )
    process.set_compressor(Compressor(config, decode, model_runner))


def create_attention_graph_variants(original: Callable[..., Any], hf_config: Any) -> Any:
    """AROUND create_attention_graph_variants: uncompressed batches replay SGLang's own graph."""
    from aircache_sglang.engine.backend import DecodeGraphVariants

    stock = original(hf_config)
    assert stock is None, "the supported models have no decode graph variants of their own"
    return DecodeGraphVariants(process.compressor().attention)


def forward_batch_generation(
    original: Callable[..., Any], worker: Any, batch: Any, *args: Any, **kwargs: Any
) -> Any:
    """AROUND TpModelWorker.forward_batch_generation, on the forward stream.

    The next decode step is launched before the scheduler sees this prefill's result, so the pass
    has to follow the prefill here (managers/scheduler.py, event_loop_overlap).
    """
    return process.compressor().run_forward(batch, lambda: original(worker, batch, *args, **kwargs))
