# SPDX-License-Identifier: Apache-2.0
"""The decision on a request: every reason to leave it alone, and the intent where there is none."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from aircache_sglang.config import AirCacheConfig
from aircache_sglang.runtime.decide import Asked, Intent, Reason, decide

PAD = 1000
ROOM = 300
# 4 tokens of text, a picture of 100, 20 of instruction; an answer of 64.
PLAIN = Asked(
    input_ids=[*range(4), *[PAD] * 100, *range(4, 24)],
    mm_items=[
        SimpleNamespace(is_image=lambda: True, is_video=lambda: False, offsets=[(4, 103)]),
    ],
    bare_ids=frozenset(),
    expected=None,
    custom_params=None,
    max_new_tokens=64,
    reserved=64,
    supported=True,
)


def asked(**changes: Any) -> Asked:
    return dataclasses.replace(PLAIN, **changes)


def overridden(**overrides: Any) -> Asked:
    return asked(custom_params={"aircache": overrides})


def decided(question: Asked, room: int = ROOM) -> Intent | Reason | None:
    return decide(question, AirCacheConfig(), room=room, pad_floor=PAD)


def test_an_intent() -> None:
    found = decided(PLAIN)
    assert isinstance(found, Intent)
    assert (found.columns, found.n_extra, found.match_limit, found.published) == (10, 10, 104, 124)
    assert found.config == AirCacheConfig()
    reusing = decided(overridden(reuse="compressed"))
    assert isinstance(reusing, Intent) and reusing.published == 104


def test_no_picture_is_no_reason() -> None:
    assert decided(asked(mm_items=[])) is None


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        (asked(input_ids=PLAIN.input_ids[:104]), Reason.NO_INSTRUCTION),
        (asked(input_ids=PLAIN.input_ids[:50]), Reason.TRUNCATED_PROMPT),
        (asked(input_ids=[*range(124)]), Reason.SPAN_MISMATCH),
        (asked(mm_items=[*PLAIN.mm_items, *PLAIN.mm_items]), Reason.OVERLAPPING_SPANS),
        (overridden(retention=7), Reason.BAD_OVERRIDES),
        (overridden(policy="none"), Reason.POLICY_NONE),
        (overridden(min_visual_tokens=101), Reason.FEW_VISUAL_TOKENS),
        (overridden(retention=1), Reason.KEEPS_ALL),
        (asked(max_new_tokens=1, reserved=1), Reason.NO_DECODE),
        (asked(supported=False), Reason.UNSUPPORTED_REQUEST),
        (asked(max_new_tokens=3, reserved=3), Reason.NO_GAIN),
    ],
    ids=lambda value: value if isinstance(value, Reason) else "",
)
def test_left_alone(question: Asked, reason: Reason) -> None:
    assert decided(question) is reason


def test_the_room_of_a_prompt_its_answer_and_its_columns() -> None:
    assert isinstance(decided(PLAIN, room=124 + 64 + 10 + 1), Intent)
    assert decided(PLAIN, room=124 + 64 + 10) is Reason.POOL_TOO_SMALL


def test_a_replica_is_worth_a_short_answer() -> None:
    short = asked(max_new_tokens=3, reserved=3, custom_params={"aircache": {"reuse": "compressed"}})
    assert isinstance(decided(short), Intent)
    open_gate = asked(max_new_tokens=3, reserved=3, custom_params={"aircache": {"gate": "off"}})
    assert isinstance(decided(open_gate), Intent)
