# SPDX-License-Identifier: Apache-2.0
"""A pool holds what requests keep, not what their prefills need."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from aircache_sglang.testing import LoadWatch, Server
from aircache_sglang.testing.prompts import Prompt, picture, user_prompt, words
from benchmarks.bench_sharing import wait_for
from tests.integration.conftest import COMPRESSING_FLAGS, STRICT_MEMORY_CHECKS
from tests.support.preloaded import PreloadedServer

pytestmark = pytest.mark.server

POOL = 8192
SIDE, TOKENS, REQUESTS = 20, 96, 64


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    flags = [*COMPRESSING_FLAGS, "--enable-metrics", "--max-total-tokens", str(POOL)]
    flags += ["--max-running-requests", "128", "--load-snapshot-publish-interval", "1"]
    with PreloadedServer(checkpoint, flags, env=STRICT_MEMORY_CHECKS) as server:
        yield server


def test_requests_in_flight_fill_the_pool(server: Server) -> None:
    """At least 90 % of pool / (text + output + columns), without a retraction."""
    prompts = [user_prompt(picture(i, SIDE, SIDE), words(6, seed=i)) for i in range(REQUESTS)]
    sampling = {"ignore_eos": True}

    def ask(prompt: Prompt) -> dict[str, Any]:
        answer = server.generate(
            prompt.text, images=prompt.images, max_new_tokens=TOKENS, sampling=sampling
        )
        return dict(answer["meta_info"])

    # A client prepares pictures slowly: a long text takes the pool until all of them wait.
    with ThreadPoolExecutor(REQUESTS + 1) as pool:
        text = words(POOL // 2)
        pool.submit(
            server.generate, text, max_new_tokens=POOL // 2 - 64, rid="text", sampling=sampling
        )
        wait_for(server, "num_running_reqs", 1)
        answers = [pool.submit(ask, prompt) for prompt in prompts]
        wait_for(server, "num_waiting_reqs", REQUESTS)
        with LoadWatch(server) as watch:
            server.request("POST", "/abort_request", {"rid": "text"})
            metas = [answer.result() for answer in answers]
    held = [m["prompt_tokens"] - m["aircache"]["slots_freed"] + TOKENS for m in metas]
    assert watch.most("num_running_reqs") >= 0.9 * POOL / (sum(held) / REQUESTS)
    assert sum(meta["num_retractions"] for meta in metas) == 0
