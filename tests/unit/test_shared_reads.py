# SPDX-License-Identifier: Apache-2.0
"""When the scheduler may overwrite what a prefill reads, by SGLang's own barrier and backends.

The streams are recorded instead of run: a CPU has none.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, SharedReadEnds
from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.layers.attention.trtllm_mha_backend import TRTLLMHAAttnBackend
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.runner_utils import shared_read_event
from sglang.srt.model_executor.runner_utils.shared_read_event import (
    maybe_publish_prefill_shared_read_done,
)

from aircache_patches import pressure
from aircache_sglang.engine.backend import AttentionState, Work, adopt
from aircache_sglang.engine.compressor import Compressor

BATCH: Any = SimpleNamespace(forward_mode=ForwardMode.EXTEND)
EARLY = SharedReadEnds.PRE_REPLAY
WORK = {
    "queries": Work(queries=[object()]),  # type: ignore[arg-type]
    "sums": Work(sums=[object()]),  # type: ignore[list-item]
    "extends": Work(extends=[object()]),  # type: ignore[list-item]
    "a pass without queries in its chunk": Work(packs=True),
    "drafts": Work(verifies=True),
}


def bare(kind: type) -> Any:
    """A backend of a real class without its buffers."""
    return kind.__new__(kind)


def backends() -> Iterator[tuple[Any, SharedReadEnds]]:
    """Backends of SGLang, and when each has read what a prefill reads."""
    yield bare(TorchNativeAttnBackend), SharedReadEnds.UNKNOWN
    yield bare(TritonAttnBackend), SharedReadEnds.UNKNOWN
    yield bare(TRTLLMHAAttnBackend), EARLY
    hybrid = bare(HybridAttnBackend)
    hybrid.prefill_backend = bare(TRTLLMHAAttnBackend)
    yield hybrid, EARLY


def state() -> AttentionState:
    extender: Any = SimpleNamespace(plan=lambda jobs: None)
    return AttentionState(SimpleNamespace(), SimpleNamespace(), extender, lambda: None)  # type: ignore[arg-type]


@pytest.mark.parametrize("build_snapshot", [True, False])
@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_a_prefill_with_work_of_ours_never_says_that_it_has_read(
    work: Work, build_snapshot: bool
) -> None:
    for backend, stock in backends():
        ask = {"num_qo_tokens": 4, "build_snapshot": build_snapshot}
        adopt(backend, state())
        resolve = functools.partial(backend.resolve_prefill_shared_read_ends, BATCH, **ask)
        assert resolve() is stock
        with backend.aircache.during(work):
            assert resolve() is SharedReadEnds.UNKNOWN
        assert resolve() is stock


class Stream:
    """Notes what is launched on it, and on whom it waits."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for all of {other.name}")

    def wait_event(self, event: Event) -> None:
        self.log.append(f"{self.name} waits for the event")


class Event:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def record(self) -> None:
        self.log.append("event")


class EarlyBackend(AttentionBackend):
    """Any backend that snapshots what it reads before the layers run."""

    def shared_read_ends(self, fm: ForwardMode) -> SharedReadEnds:
        return EARLY


@pytest.mark.parametrize("compresses", [True, False])
def test_the_schedule_stream_waits_for_the_pass(
    compresses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the eager runner, `forward_batch_generation` and the overlap loop.

    Without work of ours SGLang's event ends the wait, before the forward has.
    """
    log: list[str] = []
    memory = SimpleNamespace(
        enable_hierarchical_cache=False, hicache_storage_backend=None, enable_lmcache=False
    )
    monkeypatch.setattr(shared_read_event, "get_memory", lambda: memory)
    spec = SimpleNamespace(supports_prefill_shared_read_done=lambda: True)
    runner = SimpleNamespace(
        spec_algorithm=spec, attn_backend=EarlyBackend(), shared_read_done_event=None
    )
    adopt(runner.attn_backend, state())

    compressor = Compressor.__new__(Compressor)
    compressor.attention = runner.attn_backend.aircache
    compressor.pressure = SimpleNamespace(launch=lambda: None)  # type: ignore[assignment]
    row = SimpleNamespace(kv=SimpleNamespace(req_pool_idx=1))
    record = SimpleNamespace(budgets=None)
    compressor.records = {1: record} if compresses else {}  # type: ignore[dict-item]
    monkeypatch.setattr(Compressor, "_compress", lambda self, reqs: log.append("pass"))
    packs = any(compressor._unpacked(req) for req in [row])
    monkeypatch.setattr(Compressor, "_prefill_work", lambda self, batch: Work(packs=packs))

    def forward() -> None:
        ends = runner.attn_backend.resolve_prefill_shared_read_ends(BATCH, num_qo_tokens=4)
        device = SimpleNamespace(Event=lambda: Event(log))
        maybe_publish_prefill_shared_read_done(runner, ends, device)
        log.append("layers")

    batch = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND, decoding_reqs=None, reqs=[row], hicache_consumer_index=-1
    )
    compressor.run_forward(batch, forward)
    scheduler: Any = SimpleNamespace(
        _war_barrier_enabled=True,
        model_worker=SimpleNamespace(last_shared_read_runner=runner),
        schedule_stream=Stream("schedule", log),
        forward_stream=Stream("forward", log),
    )
    Scheduler._apply_war_barrier(scheduler)
    if compresses:
        assert log == ["layers", "pass", "schedule waits for all of forward"]
    else:
        assert log == ["event", "layers", "pass", "schedule waits for the event"]


def test_decode_graphs_say_so_after_their_replay() -> None:
    backend = bare(TritonAttnBackend)
    adopt(backend, state())
    assert backend.shared_read_ends(ForwardMode.DECODE) is SharedReadEnds.IN_REPLAY
    record: Any = torch.empty(0)
    with backend.aircache.during(Work(records=[record])):
        assert backend.shared_read_ends(ForwardMode.DECODE) is SharedReadEnds.POST_REPLAY


@pytest.mark.parametrize("decided", [True, False])
def test_the_schedule_stream_waits_for_what_is_packed_outside_a_forward(
    decided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No forward need follow, nor its barrier."""
    log: list[str] = []
    packing = SimpleNamespace(
        pressure=SimpleNamespace(has_decided=lambda: decided, launch=lambda: log.append("packing"))
    )
    monkeypatch.setattr(pressure.process, "compressor", lambda: packing)
    scheduler = SimpleNamespace(
        forward_stream=Stream("forward", log),
        schedule_stream=Stream("schedule", log),
        forward_stream_ctx=contextlib.nullcontext(),
    )
    pressure.launch(scheduler)
    in_order = ["forward waits for all of schedule", "packing", "schedule waits for all of forward"]
    assert log == (in_order if decided else [])
