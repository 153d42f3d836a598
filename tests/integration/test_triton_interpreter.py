# SPDX-License-Identifier: Apache-2.0
"""The GPU's path on the real server: SGLang's Triton attention and our kernels, interpreted."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from aircache_sglang.platform import has_accelerator
from aircache_sglang.testing import Server
from aircache_sglang.testing.oracle import Oracle, assert_agrees, assert_policy_agrees
from aircache_sglang.testing.prompts import ask, picture, user_prompt
from tests.integration.conftest import COMPRESSING_FLAGS, STRICT_MEMORY_CHECKS
from tests.integration.test_sessions import assert_conversation_agrees
from tests.support.chats import compressed_chat, next_turn

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(has_accelerator(), reason="SGLang would use the accelerator"),
]


POOL = 400


@pytest.fixture(scope="module")
def triton_server(checkpoint: Path) -> Iterator[Server]:
    flags = [*COMPRESSING_FLAGS, "--attention-backend", "triton", "--skip-server-warmup"]
    flags += ["--max-total-tokens", str(POOL)]
    env = {**STRICT_MEMORY_CHECKS, "TRITON_INTERPRET": "1"}
    with Server(checkpoint, flags, env=env) as server:
        yield server


def test_kernels_serve_compressed_and_plain_requests(triton_server: Server, oracle: Oracle) -> None:
    """Two compressed requests, one of two pictures, decode beside one that is left alone."""
    one = user_prompt(picture(1, 8, 9), "what is above the house?")
    two = user_prompt(picture(2, 8, 8), "and", picture(3, 6, 5), "how many birds?")
    asked = [
        (one, {"retention": 0.3, "return_selection": True}),
        (two, {"retention": 0.1, "return_selection": True}),
        (one, {"retention": 1.0}),
    ]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda a: ask(triton_server, a[0], a[1], max_new_tokens=4), asked))
    assert answers[2]["meta_info"]["aircache"] is None
    for (prompt, _), answer in zip(asked, answers, strict=True):
        trace = assert_agrees(oracle, prompt, answer)
        report = answer["meta_info"]["aircache"]
        if report is not None:
            assert_policy_agrees(trace, report)
            assert sum(report["layer_budgets"]) == len(report["layer_budgets"]) * report["columns"]


def test_kernels_extend_a_replica(triton_server: Server, oracle: Oracle) -> None:
    """The second turn of a chat: extend attention over packed cells, then decode."""
    compressed_chat(triton_server, oracle, user_prompt(picture(1, 8, 9), "what is this?"), 2)


def test_kernels_read_what_pressure_packs(triton_server: Server, oracle: Oracle) -> None:
    """More pictures than the pool holds whole: some are packed while they decode."""
    triton_server.flush_cache()
    prompts = [user_prompt(picture(10 + i, 8, 9), "what is this?") for i in range(5)]
    asked = {"when": "pressure", "retention": 0.2, "return_selection": True}
    with ThreadPoolExecutor(len(prompts)) as pool:
        lengths = [8, 10, 12, 8, 8]
        pairs = zip(prompts, lengths, strict=True)
        answers = list(
            pool.map(lambda p: ask(triton_server, p[0], asked, max_new_tokens=p[1]), pairs)
        )
    packs = [answer["meta_info"]["aircache"].get("packs") for answer in answers]
    assert any(packs), "this test needs a smaller pool"
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_agrees(oracle, prompt, answer)


def test_kernels_serve_a_bounded_conversation(triton_server: Server, oracle: Oracle) -> None:
    """The second turn brings a picture: extend attention, and packing beside older cells."""
    bounded = {"reuse": "compressed", "session_columns": 20, "retention": 0.2}
    prompt, turns = user_prompt(picture(20, 8, 9), "what is this?"), []
    for turn in range(2):
        asked = {**bounded, "return_selection": True}
        turns.append(ask(triton_server, prompt, asked, max_new_tokens=3))
        assert_conversation_agrees(oracle, prompt, turns)
        prompt = next_turn(prompt, turns[-1], turn, picture(30 + turn, 8, 8))
    report = turns[-1]["meta_info"]["aircache"]
    assert [part["columns"] for part in report["session"]] == [0, 13]
