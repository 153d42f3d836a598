# SPDX-License-Identifier: Apache-2.0
"""`--enable-hierarchical-cache` on real servers: pictures go to host memory and come back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aircache_sglang.platform import has_accelerator
from aircache_sglang.testing import Server
from aircache_sglang.testing.oracle import Oracle, assert_agrees, assert_policy_agrees
from aircache_sglang.testing.prompts import Prompt, ask, picture, user_prompt, words
from tests.integration.conftest import COMPRESSING_FLAGS, STRICT_MEMORY_CHECKS
from tests.integration.test_memory import settled_metrics
from tests.integration.test_pages import storm
from tests.support.chats import cached, compressed_chat
from tests.support.compiler import needs_compiler
from tests.support.preloaded import PreloadedServer

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(has_accelerator(), reason="SGLang would use the accelerator"),
]

SLOTS, PAGE = 1024, 16
FLAGS = (
    *(*COMPRESSING_FLAGS, "--enable-metrics", "--max-total-tokens", str(SLOTS)),
    *("--page-size", str(PAGE), "--chunked-prefill-size", "128", "--max-running-requests", "16"),
    *("--load-snapshot-publish-interval", "1", "--enable-hierarchical-cache"),
    *("--hicache-ratio", "6"),
)
LOADED = "sglang:load_back_tokens_total"
QUESTION = "what is above the small white house?"


@pytest.fixture(scope="module", params=["write_through", "write_back"])
def tiered(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[Server]:
    flags = [*FLAGS, "--hicache-write-policy", str(request.param)]
    with PreloadedServer(checkpoint, flags, env=STRICT_MEMORY_CHECKS) as server:
        yield server


def tree_of(server: Server) -> Any:
    return server.get("/server_info")["internal_states"][0]["aircache"]


def push_out(server: Server, seeds: range) -> None:
    """Other pictures, until the device has none of the earlier ones."""
    for seed in seeds:
        ask(server, user_prompt(picture(seed, 12, 12), "why?"), max_new_tokens=1)


def tokens_by_tier(answer: Any) -> tuple[int, int]:
    """Tokens of the prompt that were found on the device, and in host memory."""
    details = answer["meta_info"]["cached_tokens_details"] or {"device": 0, "host": 0}
    return details["device"], details["host"]


def visual_end(oracle: Oracle, prompt: Prompt) -> int:
    return int(oracle.inputs(prompt)["mm_token_type_ids"][0].nonzero()[-1]) + 1


@pytest.mark.parametrize("retention", [1.0, 0.3])
def test_a_picture_comes_back(tiered: Server, oracle: Oracle, retention: float) -> None:
    """The answer is that of Transformers before it went, after it came, and equal."""
    tiered.flush_cache()
    prompt = user_prompt(picture(5, 12, 12), "and" + words(5), picture(6, 10, 10), QUESTION)
    overrides = {"retention": retention, "return_selection": True}
    first = ask(tiered, prompt, overrides, max_new_tokens=20)
    assert cached(first) == 0
    before = tiered.metrics()
    push_out(tiered, range(40, 52))
    again = ask(tiered, prompt, overrides, max_new_tokens=20)
    device, host = tokens_by_tier(again)
    whole = visual_end(oracle, prompt) // PAGE * PAGE
    if retention < 1:
        # The instruction is computed anew, since it is scored.
        assert device + host == cached(again) == whole
    assert host >= 200 and device < PAGE * 3
    for answer in (first, again):
        trace = assert_agrees(oracle, prompt, answer)
        if retention < 1:
            assert_policy_agrees(trace, answer["meta_info"]["aircache"])
    assert again["output_ids"] == first["output_ids"] and again["text"] == first["text"]
    # A second question on it finds it on the device.
    other = user_prompt(picture(5, 12, 12), "and" + words(5), picture(6, 10, 10), "why is it so?")
    answer = ask(tiered, other, overrides, max_new_tokens=5)
    assert tokens_by_tier(answer) == (whole, 0)
    assert_agrees(oracle, other, answer)
    metrics = settled_metrics(tiered, {"sglang:kv_used_tokens": 0})
    assert metrics[LOADED] - before.get(LOADED, 0) >= 200
    assert metrics["sglang:hicache_host_used_tokens"] >= SLOTS


def test_nothing_lossy_is_written(tiered: Server, oracle: Oracle) -> None:
    """A chat on a replica: host memory gets its exact picture, and no column."""
    tiered.flush_cache()
    pool = tree_of(tiered)["pool"]
    assert pool["host_free"] == pool["host_size"]
    prompt = user_prompt(picture(31, 12, 12), "and" + words(5), picture(32, 10, 10), words(40))
    compressed_chat(tiered, oracle, prompt, 3, page=PAGE)
    push_out(tiered, range(60, 72))
    nodes = tree_of(tiered)["nodes"]
    kinds = {node["kind"] for node in nodes if node["host_slots"]}
    assert "visual" in kinds and not kinds & {"packed", "lossy"}
    pool = tree_of(tiered)["pool"]
    held = sum(node["host_slots"] for node in nodes)
    assert pool["host_size"] - pool["host_free"] == held


@pytest.mark.slow
def test_a_storm_leaves_no_slot_behind(tiered: Server) -> None:
    tiered.flush_cache()
    before = tiered.metrics().get(LOADED, 0)
    storm(tiered, 7, SLOTS)
    metrics = tiered.metrics()
    assert metrics[LOADED] > before
    dump = tree_of(tiered)
    held = sum(node["host_slots"] for node in dump["nodes"])
    assert dump["pool"]["host_size"] - dump["pool"]["host_free"] == held
    assert dump["pool"]["protected"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        *("pressure", "compressed", "single slots", "two ranks", "mixed"),
        pytest.param("drafts", marks=needs_compiler),
    ],
)
def test_beside_other_flags(checkpoint: Path, oracle: Oracle, kind: str) -> None:
    flags = {
        "pressure": ["--aircache-when", "pressure", "--aircache-rungs", "0.5,0.2,0.05"],
        "compressed": ["--aircache-reuse", "compressed"],
        "single slots": ["--page-size", "1", "--hicache-mem-layout", "layer_first"],
        "two ranks": ["--tp-size", "2"],
        "mixed": ["--enable-mixed-chunk"],
        # SGLang takes trees of drafts with single slots alone.
        "drafts": [
            *("--speculative-algorithm", "NGRAM", "--disable-overlap-schedule"),
            *("--page-size", "1"),
        ],
    }[kind]
    start = Server if kind == "two ranks" else PreloadedServer
    with start(checkpoint, [*FLAGS, *flags], env=STRICT_MEMORY_CHECKS) as server:
        prompt = user_prompt(picture(5, 12, 12), QUESTION)
        overrides = {"return_selection": True} if kind != "pressure" else None
        answers = [ask(server, prompt, overrides, max_new_tokens=8)]
        push_out(server, range(40, 52))
        answers.append(ask(server, prompt, overrides, max_new_tokens=8))
        for answer in answers:
            assert_agrees(oracle, prompt, answer)
        assert tokens_by_tier(answers[1])[1] >= 128
        if kind in ("pressure", "compressed"):
            storm(server, 11, SLOTS)
        assert server.metrics()[LOADED] > 0
