# SPDX-License-Identifier: Apache-2.0
"""`--aircache-gate`, and the reason that every answer left alone carries."""

from __future__ import annotations

from typing import Any

import pytest

from aircache_sglang.testing import Server, png_data_url
from aircache_sglang.testing.prompts import Prompt, ask, picture, user_prompt, words

pytestmark = pytest.mark.server

# 4 + 100 + 20 tokens: at retention 0.1, 4 decode steps pay.
PROMPT = user_prompt(picture(1), words(12))
AUTO = {"gate": "auto"}


def outcome(answer: dict[str, Any]) -> tuple[bool, str | None]:
    """(whether it was compressed, the reason why not)."""
    meta = answer["meta_info"]
    return meta["aircache"] is not None, meta["aircache_reason"]


def test_an_answer_too_short_to_pay_is_left_alone(aircache_server: Server) -> None:
    short = ask(aircache_server, PROMPT, AUTO, max_new_tokens=3)
    full = ask(aircache_server, PROMPT, {"retention": 1}, max_new_tokens=3)
    assert outcome(short) == (False, "no_gain")
    assert short["output_ids"] == full["output_ids"]
    forced = ask(aircache_server, PROMPT, {"gate": "off"}, max_new_tokens=3)
    assert outcome(forced) == (True, None)


def test_a_longer_answer_is_compressed(aircache_server: Server) -> None:
    assert outcome(ask(aircache_server, PROMPT, AUTO, max_new_tokens=8)) == (True, None)
    # Half of the savings need twice the steps.
    half = AUTO | {"retention": 0.5}
    assert outcome(ask(aircache_server, PROMPT, half, max_new_tokens=6)) == (False, "no_gain")
    assert outcome(ask(aircache_server, PROMPT, half, max_new_tokens=16)) == (True, None)


def test_replicas_are_not_gated(aircache_server: Server) -> None:
    """Later turns use them, too."""
    prompt = user_prompt(picture(2), words(12))
    answer = ask(aircache_server, prompt, AUTO | {"reuse": "compressed"}, max_new_tokens=3)
    assert outcome(answer) == (True, None)


@pytest.mark.parametrize(
    ("prompt", "overrides", "reason"),
    [
        (PROMPT, {"retention": 1}, "keeps_all"),
        (user_prompt(picture(1, 4, 4), words(12)), None, "few_visual_tokens"),
        (Prompt(words(12)), None, None),
    ],
    ids=["keeps all", "few visual tokens", "text"],
)
def test_other_reasons(
    aircache_server: Server, prompt: Prompt, overrides: dict[str, Any] | None, reason: str | None
) -> None:
    answer = ask(aircache_server, prompt, overrides, max_new_tokens=4)
    assert outcome(answer) == (False, reason)


def test_the_reason_in_streams_and_chats(aircache_server: Server) -> None:
    body = {
        "text": PROMPT.text,
        "image_data": [png_data_url(PROMPT.images[0])],
        "sampling_params": {"max_new_tokens": 3, "custom_params": {"aircache": AUTO}},
    }
    chunks = list(aircache_server.stream("/generate", body))
    assert {chunk["meta_info"]["aircache_reason"] for chunk in chunks} == {"no_gain"}
    answer = aircache_server.chat(
        "what?",
        images=PROMPT.images,
        max_tokens=2,
        custom_params={"aircache": AUTO},
        return_meta_info=True,
    )
    assert answer["choices"][0]["meta_info"]["aircache_reason"] == "no_gain"
