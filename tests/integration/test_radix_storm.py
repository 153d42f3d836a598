# SPDX-License-Identifier: Apache-2.0
"""Compressed sharing under pressure: aborts and retractions in a small pool, and two ranks."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from aircache_sglang import cache_view
from aircache_sglang.platform import has_accelerator
from aircache_sglang.testing.prompts import Prompt, ask, picture, user_prompt, words
from aircache_sglang.testing.server import ServerError
from tests.integration.conftest import COMPRESSING_FLAGS, STRICT_MEMORY_CHECKS
from tests.support.preloaded import PreloadedServer

pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(has_accelerator(), reason="SGLang would use the accelerator"),
]

POOL = 900
CHATS, TURNS = 12, 4


@pytest.mark.parametrize("overlap", [True, False])
def test_storm(checkpoint: Path, overlap: bool) -> None:
    """Follow-ups that are broken off, retracted and chunked lose no slot."""
    flags = [*COMPRESSING_FLAGS, "--enable-metrics", "--max-total-tokens", str(POOL)]
    flags += ["--chunked-prefill-size", "64", "--aircache-reuse", "compressed"]
    flags += [] if overlap else ["--disable-overlap-schedule"]
    env = {**STRICT_MEMORY_CHECKS, "SGLANG_TEST_RETRACT": "1"}
    with PreloadedServer(checkpoint, flags, env=env) as server:

        def abort(rid: str) -> None:
            server.request("POST", "/abort_request", {"rid": rid})

        def chat(seed: int) -> int:
            """Returns how many turns came to their end."""
            rng = random.Random(seed)
            prompt = user_prompt(picture(300 + seed % 3, 8, 9), words(5, seed=seed % 2))
            done = 0
            for turn in range(TURNS):
                rid, timer = f"storm-{seed}-{turn}", None
                if rng.random() < 0.3:
                    timer = threading.Timer(rng.random(), abort, (rid,))
                    timer.start()
                fields = {"max_new_tokens": rng.choice((2, 5, 40)), "rid": rid}
                try:
                    answer = ask(server, prompt, {"retention": 0.3}, **fields)
                except ServerError as error:
                    assert timer is not None and "abort" in str(error).lower(), error
                    continue
                finally:
                    if timer is not None:
                        timer.join()
                if answer["meta_info"]["finish_reason"]["type"] != "length":
                    continue
                done += 1
                text = answer["text"] + words(3 + turn, seed=seed)
                prompt = Prompt(prompt.text + text, prompt.images)
            return done

        with ThreadPoolExecutor(6) as pool:
            finished = sum(pool.map(chat, range(CHATS)))
        assert finished >= CHATS * TURNS // 2
        assert "etract" in server.log(), "this test needs retractions"
        deadline = time.monotonic() + 30
        while True:
            (dump,) = cache_view.fetch(server.url)
            state = dump["pool"]
            if state["free"] + state["evictable"] == POOL or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        assert state["free"] + state["evictable"] == state["size"] == POOL
        assert dump["totals"]["hit_tokens_compressed"] > 0


def test_packed_requests_make_room_at_once(checkpoint: Path) -> None:
    """A prefill's result admits the next requests; nobody has to leave first."""
    flags = [*COMPRESSING_FLAGS, "--max-total-tokens", str(POOL)]
    flags += ["--load-snapshot-publish-interval", "1"]
    with PreloadedServer(checkpoint, flags, env=STRICT_MEMORY_CHECKS) as server:

        def load(name: str) -> int:
            return int(server.get("/v1/loads")["loads"][0][name])

        def wait_for(name: str, count: int) -> None:
            deadline = time.monotonic() + 120
            while load(name) < count:
                assert time.monotonic() < deadline, f"{name} has not reached {count}"
                time.sleep(0.02)

        prompts = [user_prompt(picture(320 + i, 12, 12), words(4, seed=i)) for i in range(16)]
        with ThreadPoolExecutor(17) as pool:
            # Takes the pool until all of the others wait.
            fields = {"max_new_tokens": 400, "rid": "first", "sampling": {"ignore_eos": True}}
            pool.submit(server.generate, words(400, seed=9), **fields)
            wait_for("num_running_reqs", 1)
            answers = [pool.submit(ask, server, prompt, max_new_tokens=30) for prompt in prompts]
            wait_for("num_waiting_reqs", len(prompts))
            server.request("POST", "/abort_request", {"rid": "first"})
            most = 0
            while not all(answer.done() for answer in answers):
                most = max(most, load("num_running_reqs"))
            lengths = [answer.result()["meta_info"]["prompt_tokens"] for answer in answers]
        full = POOL // (min(lengths) + 30)
        assert full < 6 and most >= 2 * full, (full, most)
