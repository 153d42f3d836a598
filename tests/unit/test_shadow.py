# SPDX-License-Identifier: Apache-2.0
"""What waits for an idle moment is bounded, what is dropped is counted; what the command prints."""

from __future__ import annotations

import dataclasses
import zlib
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH

from aircache_sglang import audit
from aircache_sglang.config import AirCacheConfig
from aircache_sglang.engine import shadow
from aircache_sglang.engine.request import state_of
from aircache_sglang.engine.shadow import MOST_BYTES, MOST_WAITING, Sample, Shadows
from aircache_sglang.engine.shadow_metrics import ShadowMetrics
from aircache_sglang.runtime.agreement import Comparison
from aircache_sglang.runtime.decide import Intent, Reason
from aircache_sglang.runtime.record import CompressionRecord
from aircache_sglang.runtime.spans import VisualPrompt
from tests.support.one_rank import ONE_RANK

VOCABULARY = 50
PROMPT = VisualPrompt(spans=((2, 6),), length=9, n_visual=4)


@dataclasses.dataclass
class MultimodalInputs:
    """Those of SGLang that are copied (managers/schedule_batch.py)."""

    mm_items: list[Any]
    mrope_positions: torch.Tensor | None = None
    mrope_position_delta_repeated_cache: Any = None


class Item(SimpleNamespace):
    """A picture of 8 bytes a pixel."""

    def __init__(self, pixels: int = 4, *, borrowed: bool = False) -> None:
        super().__init__(
            feature=torch.zeros(pixels, dtype=torch.float64),
            precomputed_embeddings=None,
            model_specific_data={},
            offsets=[(2, 5)],
            has_cuda_ipc_proxy=lambda: borrowed,
        )


def make(**changes: Any) -> Shadows:
    config = AirCacheConfig(shadow=1.0, **changes)
    return Shadows(config, ONE_RANK, ShadowMetrics(None))


def request(shadows: Shadows, *, rid: str = "r", n: int = 5, item: Item | None = None) -> Any:
    """A request that was generated and captured, n tokens long; its record is `record_of`."""
    req = SimpleNamespace(
        rid=rid,
        lora_id=None,
        origin_input_ids=array("q", range(9)),
        output_ids_through_stop=array("q", range(n)),
        multimodal_inputs=MultimodalInputs([item or Item()]),
        finished=lambda: True,
        finished_reason=FINISH_LENGTH(n),
        extra_key=None,
        cache_salt=None,
        sampling_params=SimpleNamespace(custom_params=None),
    )
    state_of(req).intent = intent(shadows.config)
    for index in range(n):
        batch = SimpleNamespace(reqs=[req], seq_lens_cpu=torch.tensor([9 + index]))
        shadows.capture(batch, torch.randn(1, VOCABULARY))
    return req


def intent(config: AirCacheConfig) -> Intent:
    return Intent(config, PROMPT, 1)


def record_of(shadows: Shadows, **changes: Any) -> CompressionRecord:
    nothing = torch.empty(0, dtype=torch.int64)
    return CompressionRecord(intent(shadows.config), 0, nothing, nothing, **changes)


def waiting(shadows: Shadows) -> list[Sample]:
    return list(shadows._waiting)


def test_a_share_is_a_hash_of_the_id() -> None:
    shadows = Shadows(AirCacheConfig(shadow=0.25), ONE_RANK, ShadowMetrics(None))
    names = [f"request-{i}" for i in range(4000)]
    chosen = [name for name in names if shadows.is_sampled(SimpleNamespace(rid=name))]
    assert abs(len(chosen) / len(names) - 0.25) < 0.03
    assert all(zlib.crc32(name.encode()) < 1 << 30 for name in chosen)


def test_what_is_captured_is_what_the_model_said() -> None:
    shadows = make()
    req = request(shadows, n=0)
    logits = torch.randn(3, VOCABULARY)
    others = [SimpleNamespace(aircache=SimpleNamespace(intent=None)) for _ in range(2)]
    batch = SimpleNamespace(reqs=[others[0], req, others[1]], seq_lens_cpu=torch.tensor([3, 8, 4]))
    shadows.capture(batch, logits)
    assert state_of(req).captured is None, "a chunk that does not end the prompt"
    batch.seq_lens_cpu[1] = 11
    shadows.capture(batch, logits)
    before = logits.clone()
    logits.zero_()  # as sampling does
    values, tokens = state_of(req).captured.rows[2]
    assert len(values) == shadow.TOP
    torch.testing.assert_close(values, before[1].log_softmax(dim=-1)[tokens])


def test_the_first_token_and_those_before_a_pack_are_left_out() -> None:
    shadows = make()
    shadows.collect(request(shadows), record_of(shadows), [])
    shadows.collect(request(shadows), record_of(shadows, reused=True), [])
    packs = [record_of(shadows, packed_at=3), record_of(shadows, packed_at=4)]
    shadows.collect(request(shadows), packs[-1], packs)
    late = record_of(shadows, packed_at=5)
    shadows.collect(request(shadows), late, [late])
    assert [s.indices for s in waiting(shadows)] == [[1, 2, 3, 4], [0, 1, 2, 3, 4], [3, 4]]
    assert all(len(s.rows) == len(s.indices) for s in waiting(shadows))
    assert [list(s.input_ids) for s in waiting(shadows)] == [[*range(9), *range(5)]] * 3
    assert shadows.describe()["dropped"] == {}


def test_aborted_unsampled_and_running_requests_leave_nothing() -> None:
    shadows = make()
    req = request(shadows)
    req.finished_reason = FINISH_ABORT()
    shadows.collect(req, record_of(shadows), [])
    req = request(shadows)
    req.finished = lambda: False
    shadows.collect(req, record_of(shadows), [])
    # It is only retracted.
    assert len(state_of(req).captured.rows) == 5
    req = request(shadows)
    shadows._share = 0.0
    shadows.collect(req, record_of(shadows), [])
    assert waiting(shadows) == [] and state_of(req).captured is None


def test_pictures_are_kept_though_sglang_lets_them_go() -> None:
    shadows = make()
    item = Item(3)
    req = request(shadows, item=item)
    item.feature = None  # batch_result_processor.py, before the KV is released
    shadows.collect(req, record_of(shadows), [])
    (sample,) = waiting(shadows)
    assert sample.complete and sample.n_bytes == 24 and sample.media_end == 6


def test_a_borrowed_picture_is_not_kept() -> None:
    shadows = make()
    shadows.collect(request(shadows, item=Item(borrowed=True)), record_of(shadows), [])
    (sample,) = waiting(shadows)
    assert not sample.complete and sample.inputs.mm_items[0].feature is None


def test_the_number_that_waits_is_bounded_and_the_oldest_goes() -> None:
    shadows = make()
    for i in range(MOST_WAITING + 3):
        shadows.collect(request(shadows, rid=f"r{i}"), record_of(shadows), [])
    assert [s.rid for s in waiting(shadows)] == [f"r{i + 3}" for i in range(MOST_WAITING)]
    found = shadows.describe()
    assert found["dropped"] == {"queue_full": 3} and found["waiting"] == MOST_WAITING
    assert found["waiting_bytes"] == 32 * MOST_WAITING
    shadows.drop_all("flushed")
    found = shadows.describe()
    assert (found["waiting"], found["waiting_bytes"]) == (0, 0)
    assert found["dropped"] == {"queue_full": 3, "flushed": MOST_WAITING}


def test_their_bytes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow, "MOST_BYTES", 100)
    shadows = make()
    for pixels in (4, 4, 4, 8):
        shadows.collect(request(shadows, item=Item(pixels)), record_of(shadows), [])
    assert [s.n_bytes for s in waiting(shadows)] == [32, 64]
    shadows.collect(request(shadows, item=Item(13)), record_of(shadows), [])
    assert waiting(shadows) == [] and MOST_BYTES > 100


def test_retentions_that_clients_invent_share_a_row() -> None:
    shadows = make(retention=0.3)
    for retention in (0.3, 0.1, 0.0123, 0.0124):
        req = request(shadows)
        shadows.collect(req, record_of(shadows), [])
        sample = waiting(shadows)[-1]
        sample.retention = retention
        shadows._count(sample, Comparison(4, 0, 0.0, None), [0.0] * 4)
    rows = shadows.describe()["tallies"]
    assert [(row["retention"], row["requests"]) for row in rows] == [
        ("0.1", 1),
        ("0.3", 1),
        ("other", 2),
    ]


def test_the_guard_hears_of_the_servers_own_settings_alone() -> None:
    shadows = make(guard=0.02)
    own = shadows.config
    bad = Comparison(4, 4, 1.0, 0)
    for config in (dataclasses.replace(own, retention=0.2), dataclasses.replace(own, alpha=0.1)):
        for _ in range(60):
            shadows.collect(request(shadows), record_of(shadows), [])
            sample = waiting(shadows)[-1]
            sample.config = config
            shadows._count(sample, bad, [0.0] * 4)
    assert shadows.config.retention == 0.1
    for _ in range(50):
        shadows._count(dataclasses.replace(sample, config=own), bad, [0.0] * 4)
    assert shadows.config == dataclasses.replace(own, retention=0.2)
    assert shadows.describe()["guard"]["raised"] == 1


def test_at_retention_1_requests_that_name_none_are_counted() -> None:
    shadows = make(guard=0.02, retention=0.5)
    sample = Comparison(4, 4, 1.0, 0)
    assert shadows._guard is not None
    for _ in range(50):
        shadows._moved(shadows._guard.compared(sample))
    assert shadows.config.retention == 1.0
    req = request(shadows)
    named = request(shadows)
    named.sampling_params.custom_params = {"aircache": {"retention": 1.0}}
    for _ in range(199):
        shadows.left_alone(req, Reason.KEEPS_ALL)
        shadows.left_alone(req, Reason.NO_GAIN)
        shadows.left_alone(named, Reason.KEEPS_ALL)
    assert shadows.config.retention == 1.0
    shadows.left_alone(req, Reason.KEEPS_ALL)
    assert shadows.config.retention == 0.5


def test_only_the_worst_are_named() -> None:
    shadows = make()
    shadows.collect(request(shadows), record_of(shadows), [])
    (sample,) = waiting(shadows)
    for i in range(30):
        one = Comparison(10, i % 10, 0.01 * i, 0 if i % 10 else None)
        shadows._count(dataclasses.replace(sample, rid=f"r{i}"), one, [0.0] * 10)
    worst = shadows.describe()["worst"]
    assert [row["rid"] for row in worst[:4]] == ["r29", "r19", "r9", "r28"] and len(worst) == 10
    assert set(worst[0]) == {
        *("rid", "policy", "retention", "tokens", "differing", "mean_kl", "first_difference")
    }, "no prompt, no picture, no answer"


def test_the_report_of_two_ranks_is_one_table() -> None:
    found = []
    for seed in range(2):
        shadows = make(guard=0.02)
        shadows.collect(request(shadows), record_of(shadows), [])
        (sample,) = waiting(shadows)
        for i in range(20):
            shadows._count(sample, Comparison(5, int(i == seed), 0.1, i or None), [0.02] * 5)
        shadows.drop_all("flushed")
        found.append(shadows.describe())
    report = audit.summary(found)
    (row,) = report["rows"]
    assert (row["requests"], row["tokens"]) == (40, 200)
    assert row["agreement"][0] == pytest.approx(0.99) and row["same_answers"][0] == 0.95
    assert report["dropped"] == {"flushed": 2} and len(report["guards"]) == 2
    text = audit.draw(report)
    assert "99.0 % (" in text and "dropped: flushed 2" in text and "guard: bound 0.02" in text
    assert max(map(len, text.splitlines())) < 140
    assert "None has been compared yet." in audit.draw(audit.summary([make().describe()]))
