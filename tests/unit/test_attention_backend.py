# SPDX-License-Identifier: Apache-2.0
"""The compressing backend around a stock class that, like FlashInfer's, captures wrappers."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, SharedReadEnds
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.runner_utils.capture_mode import (
    _set_capture_attention_variant,
    get_capture_attention_variant,
)

from aircache_sglang.engine.backend import (
    COMPRESSED,
    PLAIN,
    AttentionState,
    DecodeGraphVariants,
    Work,
    adopt,
)

RECORD: Any = object()


class Stock(AttentionBackend):
    """One wrapper a capture, planned by every call, as flashinfer_backend.py has it."""

    def __init__(self) -> None:
        self.captured: dict[int, object] = {}
        self.plans: list[object] = []
        self.decoded = 0

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        if in_capture:
            self.captured[forward_batch.batch_size] = object()
        self.plans.append(self.captured.get(forward_batch.batch_size))

    def forward(self, q: Any, *args: Any, **kwargs: Any) -> Any:
        self.decoded += 1
        return q

    def can_run_prefill_cuda_graph(self, forward_batch: Any) -> bool:
        return forward_batch.small


class Decoder:
    def __init__(self) -> None:
        self.planned: list[Any] = []

    def plan(self, forward_batch: Any, records: Any) -> None:
        self.planned.append(records)

    def attend(self, q: torch.Tensor, layer: Any, forward_batch: Any) -> torch.Tensor:
        return q + 1.0


@pytest.fixture(autouse=True)
def no_capture() -> Iterator[None]:
    yield
    _set_capture_attention_variant(None)


@pytest.fixture
def state() -> AttentionState:
    pool: Any = SimpleNamespace(start_layer=0, write=lambda *args: None)
    extender: Any = SimpleNamespace()
    return AttentionState(pool, Decoder(), extender, get_capture_attention_variant)


@pytest.fixture
def backend(state: AttentionState) -> Any:
    stock = Stock()
    adopt(stock, state)
    return stock


def batch(mode: ForwardMode = ForwardMode.DECODE, size: int = 4) -> Any:
    return SimpleNamespace(batch_size=size, forward_mode=mode, out_cache_loc=None, small=True)


LAYER = SimpleNamespace(layer_id=0, tp_q_head_num=2, qk_head_dim=3, v_head_dim=3)


def forward(backend: Any) -> float:
    """0 from the stock decode, 1 from ours."""
    q = torch.zeros(4, 6)
    return float(backend.forward(q, None, None, LAYER, batch()).mean())


def capture(backend: Any) -> None:
    """As decode_cuda_graph_runner.py, _capture_one_stream, does for one batch size."""
    for label in DecodeGraphVariants(backend.aircache).capture_labels:
        _set_capture_attention_variant(label)
        backend.init_forward_metadata_out_graph(batch(), in_capture=True)
        assert forward(backend) == (label == COMPRESSED)
    _set_capture_attention_variant(None)


@pytest.mark.parametrize("labels", [(PLAIN, COMPRESSED), (COMPRESSED, PLAIN)])
def test_the_stock_graph_keeps_its_wrapper(
    labels: tuple[str, ...], backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In either order: our capture makes no wrapper, so none is freed under the stock graph."""
    monkeypatch.setattr(DecodeGraphVariants, "capture_labels", labels)
    capture(backend)
    assert len(backend.plans) == 1 and backend.plans[0] is backend.captured[4]


def test_every_variant_is_captured() -> None:
    assert sorted(DecodeGraphVariants.capture_labels) == sorted((PLAIN, COMPRESSED))


def test_a_replay_plans_what_its_graph_reads(backend: Any, state: AttentionState) -> None:
    """The stock plan for a stock graph alone; each batch gets the variant of its records."""
    capture(backend)
    variants = DecodeGraphVariants(state)
    for records, label, plans in (((), PLAIN, 2), ([None, RECORD], COMPRESSED, 2), ((), PLAIN, 3)):
        with state.during(Work(records=records)):
            assert variants.select(batch()) == label
            backend.init_forward_metadata_out_graph(batch())
        assert len(backend.plans) == plans
    assert set(backend.plans) == {backend.captured[4]}


def test_the_captured_label_outweighs_the_records(state: AttentionState) -> None:
    """Capture runs between requests or before any; what it records follows its label."""
    for label, records, expected in (
        (None, (), False),
        (None, [RECORD], True),
        (PLAIN, [RECORD], False),
        (COMPRESSED, (), True),
    ):
        _set_capture_attention_variant(label)
        with state.during(Work(records=records)):
            assert state.decodes() == expected


def test_eager_decode(backend: Any, state: AttentionState) -> None:
    """With packed cells our plan and attention, without them the stock ones."""
    backend.init_forward_metadata(batch())
    assert (len(backend.plans), forward(backend), backend.decoded) == (1, 0.0, 1)
    with state.during(Work(records=[RECORD, None])):
        backend.init_forward_metadata(batch())
        assert (len(backend.plans), forward(backend), backend.decoded) == (1, 1.0, 1)
    assert state.decoder.planned == [[RECORD, None]]  # type: ignore[attr-defined]


def test_prefill_is_planned_by_the_stock_backend(backend: Any, state: AttentionState) -> None:
    with state.during(Work(records=[RECORD])):
        backend.init_forward_metadata(batch(ForwardMode.EXTEND))
        backend.init_forward_metadata_out_graph(batch(ForwardMode.EXTEND))
    assert len(backend.plans) == 2


@pytest.mark.parametrize("work", ["queries", "sums", "extends"])
def test_a_scored_prefill_runs_eagerly(work: str, backend: Any, state: AttentionState) -> None:
    prefill = batch(ForwardMode.EXTEND)
    assert backend.can_run_prefill_cuda_graph(prefill)
    state.extender.plan = lambda jobs: None  # type: ignore[method-assign]
    with state.during(Work(**{work: [object()]})):  # type: ignore[arg-type]
        assert not backend.can_run_prefill_cuda_graph(prefill)
    assert backend.can_run_prefill_cuda_graph(prefill)
    prefill.small = False
    assert not backend.can_run_prefill_cuda_graph(prefill)


def test_shared_reads_end_later_for_packed_cells_alone(backend: Any, state: AttentionState) -> None:
    stock = {mode: AttentionBackend.shared_read_ends(backend, mode) for mode in ForwardMode}
    assert {mode: backend.shared_read_ends(mode) for mode in ForwardMode} == stock
    changed = {ForwardMode.DECODE: SharedReadEnds.POST_REPLAY}
    with state.during(Work(records=[RECORD])):
        assert {mode: backend.shared_read_ends(mode) for mode in ForwardMode} == stock | changed
