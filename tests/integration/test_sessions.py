# SPDX-License-Identifier: Apache-2.0
"""`--aircache-session-columns` on real servers: conversations that bring pictures in every turn."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aircache_sglang.testing import Server
from aircache_sglang.testing.oracle import LOGPROB_TOLERANCE, Oracle, Selection, logprob_error
from aircache_sglang.testing.prompts import Prompt, ask, picture, user_prompt
from tests.integration.conftest import COMPRESSING_FLAGS, STRICT_MEMORY_CHECKS
from tests.integration.storm import wait_idle
from tests.integration.test_memory import settled_metrics
from tests.support.chats import next_turn
from tests.support.preloaded import PreloadedServer

pytestmark = pytest.mark.server

# The whole prompt has to be shorter than the pool, as in SGLang.
BOUND, POOL = 40, 1600
FLAGS = [
    *(*COMPRESSING_FLAGS, "--enable-metrics", "--aircache-reuse", "compressed"),
    *("--aircache-session-columns", str(BOUND), "--aircache-rungs", "0.3,0.15,0.05"),
    *("--max-total-tokens", str(POOL), "--context-length", "2000"),
]
MODES = {
    "overlap": [],
    "serial chunked": ["--disable-overlap-schedule", "--chunked-prefill-size", "64"],
    "two ranks": ["--tp-size", "2"],
}


@pytest.fixture(scope="module", params=MODES)
def bounded(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[Server]:
    start = Server if request.param == "two ranks" else PreloadedServer
    with start(checkpoint, [*FLAGS, *MODES[request.param]], env=STRICT_MEMORY_CHECKS) as server:
        yield server


def assert_conversation_agrees(oracle: Oracle, prompt: Prompt, turns: list[Any]) -> None:
    """The last answer agrees with Transformers, where all that follows a turn's prompt has seen
    what that turn had kept of the pictures before it, and of its own."""
    inputs, answer = oracle.inputs(prompt), turns[-1]
    n_prompt = inputs["input_ids"].shape[1]
    assert answer["meta_info"]["prompt_tokens"] == n_prompt
    n_visual = turns[-1]["meta_info"]["aircache"]["visual_tokens"]
    packs: list[tuple[int, Selection]] = []
    for turn in turns:
        meta = turn["meta_info"]
        seen = meta["aircache"]["visual_tokens"]
        later = list(range(seen, n_visual))
        selection = [[[*kept, *later] for kept in layer] for layer in meta["aircache"]["selection"]]
        packs.append((meta["prompt_tokens"] - n_prompt + 1, selection))
    trace = oracle.run(inputs, answer["output_ids"], packs=packs)
    error = logprob_error(trace, answer["meta_info"])
    assert error < LOGPROB_TOLERANCE, f"turn {len(turns)}: logprobs differ by {error:.2e}"


@pytest.mark.slow
def test_a_conversation_with_a_picture_a_turn(bounded: Server, oracle: Oracle) -> None:
    """Columns within the bound, the oldest pictures at last without any, and every logprob."""
    bounded.flush_cache()
    prompt = user_prompt(picture(1, 8, 9), "what is this?", system="you look at pictures.")
    wanted = {"return_selection": True}
    turns: list[Any] = []
    for turn in range(7):
        answer = ask(bounded, prompt, wanted, max_new_tokens=6)
        report = answer["meta_info"]["aircache"]
        assert report["columns"] <= BOUND
        if turn:
            session = report["session"]
            assert sum(part["columns"] for part in session) == report["columns"]
            assert sum(part["visual_tokens"] for part in session) == report["visual_tokens"]
            # All of the last turn but its last token is extended.
            before = turns[-1]["meta_info"]
            told = before["prompt_tokens"] + before["completion_tokens"] - 1
            assert answer["meta_info"]["cached_tokens"] == told
        turns.append(answer)
        assert_conversation_agrees(oracle, prompt, turns)
        images = [picture(20 + turn, 8, 8 + turn % 3)]
        if turn == 3:
            images.append(picture(50, 8, 8))
        if turn == 4:
            # A turn without a picture extends the replica as ever.
            images = []
        prompt = next_turn(prompt, answer, turn, *images)
    last = turns[-1]["meta_info"]["aircache"]
    assert last["session"][0]["columns"] == 0, "this test needs a picture that is gone"
    assert last["visual_tokens"] > 450
    wait_idle(bounded)
    metrics = settled_metrics(bounded, {"sglang:kv_used_tokens": 0})
    assert metrics["sglang:kv_available_tokens"] + metrics["sglang:kv_evictable_tokens"] == POOL


@pytest.mark.parametrize("bounded", ["overlap"], indirect=True)
@pytest.mark.parametrize("sent", [[], ["--resend"]], ids=["session", "resend"])
def test_the_example(bounded: Server, sent: list[str]) -> None:
    bounded.flush_cache()
    watch = [sys.executable, "-m", "examples.watch", bounded.url, *sent]
    printed = subprocess.run(
        [*watch, "--turns", "3", "--tokens", "3"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert printed.returncode == 0, printed.stderr
    rows = [line.split()[:4] for line in printed.stdout.splitlines()[1:4]]
    assert [int(turn) for turn, *_ in rows] == [1, 2, 3]
    # A page is 256 visual tokens; a turn computes its own tokens alone.
    assert all(256 < int(anew) < 330 for _, _, anew, _ in rows)
    assert all(0 < int(columns) <= BOUND for *_, columns in rows)
