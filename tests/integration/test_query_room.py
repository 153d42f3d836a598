# SPDX-License-Identifier: Apache-2.0
"""Long instructions share a prefill as far as their queries find room; no answer changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from aircache_sglang.platform import has_accelerator
from aircache_sglang.testing import Server
from aircache_sglang.testing.oracle import Oracle, assert_agrees
from aircache_sglang.testing.prompts import ask, picture, user_prompt, words
from tests.integration.conftest import COMPRESSING_FLAGS, STRICT_MEMORY_CHECKS
from tests.support.batches import at_once
from tests.support.preloaded import PreloadedServer

pytestmark = [
    pytest.mark.server,
    pytest.mark.timeout(600),
    pytest.mark.skipif(has_accelerator(), reason="SGLang would use the accelerator"),
]


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    """One that prefills prompts whole."""
    flags = [*COMPRESSING_FLAGS, "--chunked-prefill-size", "-1"]
    # SGLang would set aside more for such prefills than this machine may have.
    flags += ["--mem-fraction-static", "0.5", "--max-total-tokens", "16000"]
    with PreloadedServer(checkpoint, flags, env=STRICT_MEMORY_CHECKS) as server:
        yield server


def test_two_full_instructions_share_a_prefill(server: Server, oracle: Oracle) -> None:
    for attempt in range(6):
        prompts = [
            user_prompt(picture(900 + 10 * attempt + i, 8, 9), words(500 + 20 * i, seed=i))
            for i in range(5)
        ]
        answers, sizes = at_once(
            server,
            [lambda p=prompt: ask(server, p, {"return_selection": True}) for prompt in prompts],
        )
        # Three would keep the queries of more than 1,024 tokens.
        assert max(sizes) <= 2
        for prompt, answer in zip(prompts, answers, strict=True):
            assert_agrees(oracle, prompt, answer)
        if max(sizes) == 2:
            return
    pytest.fail("no two requests were prefilled together")


def test_the_log_says_what_is_reserved(server: Server) -> None:
    assert "of the KV budget for the compression pass" in server.log_path.read_text()
