# SPDX-License-Identifier: Apache-2.0
"""What travels between a prefill and a decode server, and who refuses whom."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aircache_sglang.config import Ablation, AirCacheConfig
from aircache_sglang.engine.disaggregation import (
    Arrival,
    difference,
    layout,
    metadata_row,
    metadata_width,
    originals_of,
    slots_saved,
    slots_to_send,
    with_padding,
    without_padding,
)
from aircache_sglang.engine.disaggregation_prefill import settle
from aircache_sglang.engine.request import state_of
from aircache_sglang.runtime.decide import Intent
from aircache_sglang.runtime.spans import VisualPrompt
from aircache_sglang.runtime.table import gap_end

# Text at 0-3, 9-10, 13-14 and 20-24.
PROMPT = VisualPrompt(((4, 9), (11, 13), (15, 20)), length=25, n_visual=12)
INTENT = Intent(AirCacheConfig(), PROMPT, columns=3)


def test_a_row_travels_without_its_padding() -> None:
    slots = torch.arange(100, 100 + slots_to_send(INTENT))
    assert len(slots) == 13 + 3 and slots_saved(INTENT) == 9
    row = with_padding(INTENT, slots)
    assert len(row) == PROMPT.length
    assert row[PROMPT.start + 3 : gap_end(PROMPT)].tolist() == [0] * 9
    assert torch.equal(without_padding(INTENT, row), slots)
    # The head alone has been sent.
    assert torch.equal(without_padding(INTENT, row)[4:], slots[4:])


def test_a_row_with_an_answer() -> None:
    slots = torch.arange(100, 100 + slots_to_send(INTENT) + 7)
    assert with_padding(INTENT, slots)[-7:].tolist() == slots[-7:].tolist()


def test_text_is_found_by_its_position() -> None:
    """A request that was aborted in flight frees its text by it, each slot once."""
    slots = torch.arange(100, 100 + slots_to_send(INTENT))
    row = with_padding(INTENT, slots)
    originals = originals_of(INTENT, row)
    assert originals.tolist() == [
        *(100, 101, 102, 103),
        *[0] * 5,
        *(107, 108),
        *[0] * 2,
        *(109, 110),
        *[0] * 5,
    ]
    columns = row[PROMPT.start : PROMPT.start + 3].tolist()
    text = originals[originals > 0].tolist()
    assert sorted([*text, *columns, *row[PROMPT.end :].tolist()]) == slots.tolist()


def test_metadata_round_trip() -> None:
    budgets, mass = torch.tensor([2, 4, 3, 3]), torch.tensor(0.4232491, dtype=torch.float64)
    row = metadata_row(INTENT, budgets, mass)
    padded = [*row, *[0] * (metadata_width(4) - len(row))]
    assert len(padded) == 16 and metadata_width(28) == 30
    arrival = Arrival.of(padded, 4)
    assert arrival.columns == 3 and torch.equal(arrival.budgets, budgets)
    assert round(float(arrival.mass), 6) == 0.423249
    assert arrival.objection(INTENT) is None


@pytest.mark.parametrize(
    ("row", "intent", "sentence"),
    [
        ([0] * 6, INTENT, "into 0 columns and the decode server expected 3"),
        ([3, 0, 3, 3, 3, 3], None, "into 3 columns and the decode server expected 0"),
        ([3, 0, 3, 3, 3, 2], INTENT, "budgets of 11 cells for 3 columns of 4 layers"),
        ([3, 0, 13, -1, 0, 0], INTENT, "budgets of 12 cells for 3 columns of 4 layers"),
    ],
)
def test_what_does_not_fit_is_named(row: list[int], intent: Any, sentence: str) -> None:
    objection = Arrival.of(row, 4).objection(intent)
    assert objection is not None and sentence in objection


def test_nothing_was_packed() -> None:
    assert Arrival.of([0] * 16, 4).objection(None) is None


def described(config: AirCacheConfig, heads: int = 2) -> str:
    k_all = torch.zeros((4, 10, 1, 16))
    return layout(config, SimpleNamespace(layer_num=4, k_all=k_all), heads)  # type: ignore[arg-type]


def test_equal_servers_work_together() -> None:
    config = AirCacheConfig()
    own = dataclasses.replace(config, gate="off", pin_text=0.2)
    assert difference("here:1", described(own), described(config)) is None


@pytest.mark.parametrize(
    ("theirs", "sentence"),
    [
        (None, "at here:1 has no --kv-policy and this decode server has --kv-policy aircache"),
        ("of another pool", "at here:1 has no --kv-policy"),
        ("[]", "at here:1 has no --kv-policy"),
        (described(AirCacheConfig(retention=0.2)), "has retention 0.2 and this decode server 0.1"),
        (described(AirCacheConfig(policy="h2o")), "has policy h2o and this decode server aircache"),
        (
            described(AirCacheConfig(ablation=Ablation(merge=0.5))),
            "start both with the same version and flags",
        ),
        (described(AirCacheConfig(), heads=4), "4 layers of 4 heads of 16 in float32"),
    ],
)
def test_unequal_servers_are_told_apart(theirs: str | None, sentence: str) -> None:
    found = difference("here:1", theirs, described(AirCacheConfig()))
    assert found is not None and sentence in found and "\n" not in found


OURS = (1, 2, 3, 3)  # metadata buffers, the last of them named twice


class Manager(SimpleNamespace):
    """SGLang's transfers, as far as they say what a decode server waits for."""

    def __init__(self, expected: int | None, theirs: Sequence[int]) -> None:
        info = SimpleNamespace(
            is_dummy=False, dst_kv_indices=range(expected or 0), mooncake_session_id="peer"
        )
        super().__init__(
            transfer_infos={} if expected is None else {7: {"peer": info}},
            kv_args=SimpleNamespace(aux_data_ptrs=[10, 20, 30, 30]),
            decode_kv_args_table={"peer": SimpleNamespace(dst_aux_ptrs=theirs)},
        )


class Compressor(SimpleNamespace):
    """Decides as it was told."""

    def __init__(self, intent: Intent | None) -> None:
        super().__init__(config=AirCacheConfig(), declined=[], wanted=intent)

    def intent(self, req: Any) -> Intent | None:
        return self.wanted

    def decline(self, req: Any, reason: Any) -> None:
        self.declined.append(reason)


@pytest.mark.parametrize(
    ("intent", "expected", "theirs", "sentence"),
    [
        (INTENT, 16, OURS, None),
        (INTENT, 25, OURS, None),
        (None, 25, OURS, None),
        (INTENT, None, OURS, None),
        (None, 16, OURS, "expects 16 slots of a prompt of 25 tokens and this prefill server would"),
        (INTENT, 15, OURS, "would send 16;"),
        (INTENT, 25, OURS[:2], "has --kv-policy aircache and the decode server has none"),
        # A stock server with as many buffers.
        (INTENT, 25, (1, 2, 3, 4), "has --kv-policy aircache and the decode server has none"),
    ],
)
def test_the_decode_server_decides(
    intent: Intent | None, expected: int | None, theirs: Sequence[int], sentence: str | None
) -> None:
    req = SimpleNamespace(origin_input_ids=[0] * 25, bootstrap_room=7)
    compressor = Compressor(intent)
    objection = settle(compressor, req, Manager(expected, theirs))  # type: ignore[arg-type]
    if sentence is not None:
        assert objection is not None and sentence in objection
        return
    assert objection is None
    packs = intent is not None and expected == 16
    assert state_of(req).promised is (intent if packs else None)
    assert len(compressor.declined) == (intent is not None and not packs)
