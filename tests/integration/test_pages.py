# SPDX-License-Identifier: Apache-2.0
"""`--page-size` above 1 on real servers: the answers of page size 1, and slots by the page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aircache_sglang.platform import has_accelerator
from aircache_sglang.testing import Server
from aircache_sglang.testing.oracle import Oracle, assert_agrees, assert_policy_agrees
from aircache_sglang.testing.prompts import PICTURE, Prompt, ask, picture, user_prompt, words
from tests.integration.conftest import COMPRESSING_FLAGS, STRICT_MEMORY_CHECKS
from tests.integration.storm import Storm, assert_answered, make_jobs, make_prompts, wait_idle
from tests.integration.test_exactness import SHAPES
from tests.integration.test_memory import settled_metrics
from tests.integration.test_pressure import POOL, PRESSURE, ask_at_once, prompts
from tests.support.chats import cached, compressed_chat
from tests.support.preloaded import PreloadedServer

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(has_accelerator(), reason="SGLang would use the accelerator"),
]

SLOTS = 2048
FLAGS = (
    *(*COMPRESSING_FLAGS, "--enable-metrics", "--max-total-tokens", str(SLOTS)),
    *("--chunked-prefill-size", "128", "--max-running-requests", "16"),
    *("--load-snapshot-publish-interval", "1"),
)
# Long enough that a page of any size ends in it.
QUESTION = "what is above the small white house?" + words(70, seed=3)


@pytest.fixture(scope="module", params=[16, 64])
def page(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def paged(page: int, checkpoint: Path) -> Iterator[Server]:
    flags = [*FLAGS, "--page-size", str(page)]
    with PreloadedServer(checkpoint, flags, env=STRICT_MEMORY_CHECKS) as server:
        yield server


def whole_pages_of(oracle: Oracle, prompt: Prompt, page: int) -> int:
    """Pages that hold visual tokens alone."""
    types = oracle.inputs(prompt)["mm_token_type_ids"][0] != 0
    starts = range(0, len(types) - page + 1, page)
    return sum(bool(types[start : start + page].all()) for start in starts)


@pytest.mark.parametrize("retention", [0.5, 0.1, 0.02])
@pytest.mark.parametrize("shape", SHAPES)
def test_answers_are_those_of_single_slots(
    paged: Server, page: int, oracle: Oracle, shape: str, retention: float
) -> None:
    overrides = {"return_selection": True, "retention": retention}
    answer = ask(paged, SHAPES[shape], overrides, max_new_tokens=20)
    report = answer["meta_info"]["aircache"]
    given = whole_pages_of(oracle, SHAPES[shape], page)
    n_visual = int((oracle.inputs(SHAPES[shape])["mm_token_type_ids"][0] != 0).sum())
    m = max(1, round(retention * n_visual))
    taken = -(-m // page)
    if given <= taken:
        assert report is None and answer["meta_info"]["aircache_reason"] == "no_whole_pages"
        assert_agrees(oracle, SHAPES[shape], answer)
        return
    assert_policy_agrees(assert_agrees(oracle, SHAPES[shape], answer), report)
    # Columns are as many as without pages; slots go by the page.
    assert report["columns"] == m
    assert report["slots_freed"] == (given - taken) * page


def test_nothing_is_lost_at_retention_1(paged: Server, oracle: Oracle) -> None:
    for prompt in SHAPES.values():
        answer = ask(paged, prompt, {"retention": 1.0}, max_new_tokens=20)
        assert answer["meta_info"]["aircache_reason"] == "keeps_all"
        assert_agrees(oracle, prompt, answer)


def test_a_picture_is_shared_by_the_page(paged: Server, page: int, oracle: Oracle) -> None:
    """The next question finds the whole pages of head and picture, and scores anew."""
    paged.flush_cache()
    image = picture(8, 16, 16)
    first = ask(paged, user_prompt(image, "what is here?"), {"retention": 0.3})
    assert cached(first) == 0
    prompt = user_prompt(image, "what is on the left of the old bridge?")
    answer = ask(paged, prompt, {"retention": 0.3, "return_selection": True})
    types = oracle.inputs(prompt)["mm_token_type_ids"][0]
    end = int(types.nonzero()[-1]) + 1
    assert cached(answer) == end // page * page
    assert_policy_agrees(assert_agrees(oracle, prompt, answer), answer["meta_info"]["aircache"])


def test_a_chat_extends_its_replica(paged: Server, page: int, oracle: Oracle) -> None:
    paged.flush_cache()
    parts: tuple[Any, ...] = (picture(31, 12, 12), "and" + words(5), picture(32, 10, 10), QUESTION)
    compressed_chat(paged, oracle, user_prompt(*parts), 5, page=page)


def test_an_instruction_that_ends_no_page_leaves_no_replica(
    paged: Server, page: int, oracle: Oracle
) -> None:
    """Its page holds the picture's last tokens too; the next turn finds the exact picture."""
    paged.flush_cache()
    prompt, end = Prompt("", ()), 0
    for n in range(1, page):
        prompt = Prompt(words(n) + PICTURE + words(2), (picture(33, 12, 12),))
        types = oracle.inputs(prompt)["mm_token_type_ids"][0]
        end = int(types.nonzero()[-1]) + 1
        # With the answer, too.
        if end // page == (len(types) + 3) // page:
            break
    overrides = {"reuse": "compressed", "return_selection": True}
    for _ in range(2):
        answer = ask(paged, prompt, overrides, max_new_tokens=3)
        assert not answer["meta_info"]["aircache"]["reused"]
        assert_agrees(oracle, prompt, answer)
    assert cached(answer) == end // page * page


@pytest.mark.parametrize("name", ["session_columns", "ablation.audience"])
def test_what_moves_single_slots_is_an_http_400(paged: Server, page: int, name: str) -> None:
    overrides: dict[str, Any] = {"ablation": {"audience": "all"}}
    if name == "session_columns":
        overrides = {"reuse": "compressed", "session_columns": 64}
    body = {
        "text": "what is this?",
        "sampling_params": {"custom_params": {"aircache": overrides}, "max_new_tokens": 2},
    }
    response = paged.request("POST", "/generate", body)
    assert response.status_code == 400
    assert f"aircache.{name} needs --page-size 1, and this server has {page}" in response.text


@pytest.mark.slow
def test_a_storm_leaves_no_page_behind(paged: Server, page: int) -> None:
    # Most pictures of the storm fill no more pages of 64 than their columns would.
    storm(paged, page, SLOTS, compressed=15 if page == 16 else 3)


def storm(server: Server, seed: int, slots: int, *, compressed: int = 15) -> None:
    """At least so many of its requests are compressed."""
    jobs = make_jobs(seed, 120, make_prompts(seed + 1, 36), longest=60)
    outcomes = Storm(server, concurrency=16).run(jobs, waves=2)
    assert_answered(outcomes)
    finished = [outcome for outcome in outcomes if outcome.finished]
    n_compressed = 0
    for outcome in finished:
        assert outcome.answer is not None
        meta = outcome.answer["meta_info"]
        assert meta["completion_tokens"] == outcome.job.max_new_tokens
        n_compressed += meta["aircache"] is not None
    assert len(finished) >= 60 and n_compressed >= compressed
    wait_idle(server)
    metrics = settled_metrics(server, {"sglang:kv_used_tokens": 0})
    free = metrics["sglang:kv_available_tokens"] + metrics["sglang:kv_evictable_tokens"]
    assert free == slots
    assert metrics["sglang:aircache_columns_held"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pressure", "no tree"])
def test_pages_under_pressure_and_without_a_tree(
    checkpoint: Path, oracle: Oracle, kind: str
) -> None:
    flags = [*PRESSURE, "--page-size", "16", "--load-snapshot-publish-interval", "1"]
    if kind == "no tree":
        flags = [*FLAGS, "--page-size", "16", "--disable-radix-cache"]
    with PreloadedServer(checkpoint, flags, env=STRICT_MEMORY_CHECKS) as server:
        questions = prompts(3)
        answers = ask_at_once(server, questions, [60 + 7 * i for i in range(len(questions))])
        for prompt, answer in zip(questions, answers, strict=True):
            assert_agrees(oracle, prompt, answer)
        if kind == "pressure":
            assert any("packs" in answer["meta_info"]["aircache"] for answer in answers)
        storm(server, 5, POOL if kind == "pressure" else SLOTS)
