# SPDX-License-Identifier: Apache-2.0
"""Hooks of a server with `--aircache-shadow` alone (aircache_sglang/engine/shadow.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.managers.io_struct import GetInternalStateReq

from aircache_patches import embeddings, process
from aircache_patches.output import AirCacheOutputStreamer
from aircache_sglang.engine.shadow import ShadowReq, Shadows, is_shadow

# Who looks at a server does not disturb it.
_LOOKS = GetInternalStateReq


def shadows() -> Shadows:
    """Of this process; the hooks are installed with the flag alone."""
    found = process.compressor().shadows
    assert found is not None, "a hook of the shadow without its flag"
    return found


def capture_pre_sample_logits(
    result: Any, batch: Any, forward_batch: Any, logits_output: Any
) -> None:
    """AFTER capture_pre_sample_logits, on the forward stream: sampling changes the logits."""
    if batch is not None and logits_output is not None:
        logits = logits_output.next_token_logits
        if logits is not None:
            shadows().capture(batch, logits)


def process_input_requests(scheduler: Any, recv_reqs: list[Any]) -> None:
    """BEFORE Scheduler.process_input_requests: what comes in finds the server without a shadow."""
    if any(not isinstance(one, _LOOKS) for one in recv_reqs):
        shadows().yield_to_requests(scheduler)


def get_new_batch_prefill_raw(
    original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any
) -> Any:
    """AROUND Scheduler._get_new_batch_prefill_raw: a shadow is queued in an idle moment."""
    found = shadows()
    found.start(scheduler)
    batch, running = original(scheduler, *args, **kwargs)
    found.admitted(scheduler)
    if batch is not None and is_shadow(batch):
        # Neither its tokens nor its hits are traffic (batch_result_processor.py).
        batch.prefill_stats = None
    return batch, running


def flush_cache(*args: Any, **kwargs: Any) -> None:
    """BEFORE Scheduler.flush_cache."""
    shadows().drop_all("flushed")


def abort_request(scheduler: Any, recv_req: Any) -> None:
    """BEFORE Scheduler.abort_request."""
    if recv_req.abort_all:
        shadows().drop_all("aborted")


def flush_cache_after_weight_update(*args: Any, **kwargs: Any) -> None:
    """BEFORE SchedulerWeightUpdaterManager.flush_cache_after_weight_update: answers of old weights
    are not compared with new ones."""
    embeddings.flush_cache_after_weight_update(*args, **kwargs)
    shadows().forget_weights()


class ShadowOutputStreamer(AirCacheOutputStreamer):
    """Sends nothing of a shadow, whose result it hands over."""

    __slots__ = ()

    def stream_output(self, reqs: list[Any], return_logprob: bool, skip_req: Any = None) -> None:
        rest = [req for req in reqs if not isinstance(req, ShadowReq)]
        for req in reqs:
            if isinstance(req, ShadowReq) and req is not skip_req and req.finished():
                shadows().finished(req)
        if rest or not reqs:
            super().stream_output(rest, return_logprob, skip_req)
