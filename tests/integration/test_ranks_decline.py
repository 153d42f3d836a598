# SPDX-License-Identifier: Apache-2.0
"""Two tensor-parallel ranks decline, evict and retract alike; else the server would hang."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from aircache_sglang.platform import has_accelerator
from aircache_sglang.testing import Server
from aircache_sglang.testing.oracle import Oracle, assert_agrees
from aircache_sglang.testing.prompts import Prompt, ask, picture, user_prompt, words
from tests.integration.conftest import COMPRESSING_FLAGS, STRICT_MEMORY_CHECKS

pytestmark = [
    pytest.mark.server,
    pytest.mark.timeout(900),
    pytest.mark.skipif(has_accelerator(), reason="SGLang would use the accelerator"),
]

POOL = 700
# What a request asks for, and why it is left alone.
ASKED: list[tuple[dict[str, Any], str | None]] = [
    ({"retention": 0.2}, None),
    ({"min_visual_mass": 0.3}, None),
    ({"min_visual_mass": 1.0}, "mass_not_reached"),
    ({"policy": "none"}, "policy_none"),
    ({"retention": 0.3, "reuse": "compressed"}, None),
    ({"retention": 1.0}, "keeps_all"),
]


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    flags = [*COMPRESSING_FLAGS, "--tp-size", "2", "--max-total-tokens", str(POOL)]
    flags += ["--chunked-prefill-size", "64", "--enable-metrics"]
    with Server(checkpoint, flags, env=STRICT_MEMORY_CHECKS, timeout=240) as server:
        yield server


def test_requests_that_are_declined_among_others(server: Server, oracle: Oracle) -> None:
    """In a pool that holds three of them at a time."""
    rng = random.Random(5)
    jobs: list[tuple[Prompt, dict[str, Any], str | None]] = []
    for i in range(24):
        overrides, reason = ASKED[i % len(ASKED)]
        prompt = user_prompt(picture(800 + i % 9, 10, 9 + i % 3), words(4 + i, seed=800 + i))
        jobs.append((prompt, overrides, reason))
    rng.shuffle(jobs)

    def answer(job: tuple[Prompt, dict[str, Any], str | None]) -> Any:
        prompt, overrides, _ = job
        selection = {} if overrides.get("policy") == "none" else {"return_selection": True}
        return ask(server, prompt, {**overrides, **selection}, max_new_tokens=12)

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(answer, jobs))
    for (prompt, _, reason), got in zip(jobs, answers, strict=True):
        assert got["meta_info"]["aircache_reason"] == reason
        assert (got["meta_info"]["aircache"] is None) == (reason is not None)
        assert_agrees(oracle, prompt, got)
    assert server.metrics()["sglang:aircache_evicted_slots_total"] > POOL
