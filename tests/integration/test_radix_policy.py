# SPDX-License-Identifier: Apache-2.0
"""The radix cache on a real server: sharing, eviction, refill and replicas change no answer.

One server holds a pool so small that pictures are evicted all the time, prefills 128 tokens at a
time and checks its memory after every step. Exact sharing is compared with a server without a
prefix cache, compressed sharing with Transformers under the mask of the first turn's selection.
"""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from aircache_sglang import cache_view
from aircache_sglang.platform import has_accelerator
from aircache_sglang.testing import Server
from aircache_sglang.testing.oracle import LOGPROB_TOLERANCE, Oracle
from aircache_sglang.testing.prompts import Prompt, picture, user_prompt, words
from tests.integration.conftest import COMPRESSING_FLAGS, STRICT_MEMORY_CHECKS
from tests.integration.storm import assert_equal_reports
from tests.support.chats import (
    RETENTION,
    cached,
    carried,
    compressed_chat,
    next_turn,
    question,
)
from tests.support.preloaded import PreloadedServer

pytestmark = [
    pytest.mark.server,
    pytest.mark.timeout(900),  # the first test waits for two servers
    pytest.mark.skipif(has_accelerator(), reason="SGLang would use the accelerator"),
]

POOL = 1100
TOLERANCE = 1e-4
CHAT_TURNS = 10
OLD_AND_NEW = ("/get_server_info", "/server_info")

SYSTEM = "you look at pictures." + words(240, seed=9)
GARDEN = picture(30, 10, 12)


def questions() -> list[Prompt]:
    """Eight questions on one picture."""
    return [user_prompt(GARDEN, words(4 + i, seed=40 + i)) for i in range(8)]


def few_shot() -> list[Prompt]:
    """A long shared system text and a picture of one's own, some with text between two."""
    prompts = []
    for i in range(6):
        parts = (picture(60 + i, 9, 9), words(5, seed=i))
        if i % 2:
            parts = (picture(60 + i, 9, 9), words(9, seed=80 + i), picture(70 + i, 8, 8), words(3))
        prompts.append(user_prompt(*parts, system=SYSTEM))
    return prompts


def long_question() -> Prompt:
    """More text behind the picture than is scored."""
    return user_prompt(GARDEN, words(560, seed=5))


def texts() -> list[Prompt]:
    """Long prompts without a picture, together nearly as large as the pool."""
    return [user_prompt(words(150, seed=300 + i)) for i in range(6)]


def assert_equal(answer: Any, reference: Any) -> None:
    assert answer["output_ids"] == reference["output_ids"]
    for one, other in zip(
        answer["meta_info"]["output_top_logprobs"],
        reference["meta_info"]["output_top_logprobs"],
        strict=True,
    ):
        for (left, token, _), (right, expected, _) in zip(one, other, strict=True):
            assert token == expected and abs(left - right) < TOLERANCE
    assert_equal_reports(answer, reference)


@dataclasses.dataclass
class Reference:
    """Answers of a compressing server without a prefix cache."""

    questions: list[Any]
    few_shot: list[Any]
    long_question: Any
    texts: list[Any]
    chat: list[tuple[Prompt, Any]]


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    with PreloadedServer(checkpoint, [*COMPRESSING_FLAGS, "--disable-radix-cache"]) as server:
        chat: list[tuple[Prompt, Any]] = []
        prompt = user_prompt(GARDEN, "what is in the garden?", system="be brief.")
        for turn in range(CHAT_TURNS):
            answer = question(server, prompt)
            chat.append((prompt, answer))
            prompt = next_turn(prompt, answer, turn)
        prompts = [*questions(), *few_shot(), long_question(), *texts()]
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda prompt: question(server, prompt), prompts))
        return Reference(answers[:8], answers[8:14], answers[14], answers[15:], chat)


@pytest.fixture(scope="module")
def server(checkpoint: Path, reference: Reference) -> Iterator[Server]:
    flags = [*COMPRESSING_FLAGS, "--enable-metrics", "--max-total-tokens", str(POOL)]
    flags += ["--chunked-prefill-size", "128"]
    with PreloadedServer(checkpoint, flags, env=STRICT_MEMORY_CHECKS) as server:
        yield server


@pytest.fixture(autouse=True)
def nothing_is_lost(server: Server) -> Iterator[None]:
    """Every test starts with an empty tree and ends with every slot accounted for."""
    server.flush_cache()
    yield
    pool = tree(server)["pool"]
    assert pool["free"] + pool["evictable"] == pool["size"] == POOL
    assert pool["protected"] == pool["private"] == 0


def tree(server: Server) -> dict[str, Any]:
    """The dump of an idle server."""
    deadline = time.monotonic() + 30
    while True:
        (dump,) = cache_view.fetch(server.url)
        if not (dump["pool"]["protected"] or dump["pool"]["private"]):
            return dump
        assert time.monotonic() < deadline, dump["pool"]
        time.sleep(0.1)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def nodes(server: Server, kind: str) -> list[dict[str, Any]]:
    return [node for node in tree(server)["nodes"] if node["kind"] == kind]


def test_questions_one_after_another(server: Server, reference: Reference) -> None:
    answers = [question(server, prompt) for prompt in questions()]
    for answer, expected in zip(answers, reference.questions, strict=True):
        assert_equal(answer, expected)
    assert cached(answers[0]) == 0
    # All but the question itself.
    report = answers[1]["meta_info"]["aircache"]
    for answer in answers[1:]:
        report = answer["meta_info"]["aircache"]
        expected = answer["meta_info"]["prompt_tokens"] - report["instruction_tokens"]
        assert cached(answer) == expected


def test_questions_at_once(server: Server, reference: Reference) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda prompt: question(server, prompt), questions()))
    for answer, expected in zip(answers, reference.questions, strict=True):
        assert_equal(answer, expected)
    # The picture is prefilled once; the others wait for it or share it.
    assert sum(cached(answer) > 100 for answer in answers) >= 6
    assert len(nodes(server, "visual")) == 1


def test_shared_system_text(server: Server, reference: Reference) -> None:
    for _ in range(2):
        answers = [question(server, prompt) for prompt in few_shot()]
        for answer, expected in zip(answers, reference.few_shot, strict=True):
            assert_equal(answer, expected)
        assert all(cached(answer) > 240 for answer in answers[1:])


def test_text_behind_the_picture_is_a_hit_up_to_its_scored_end(
    server: Server, reference: Reference
) -> None:
    first, second = (question(server, long_question()) for _ in range(2))
    for answer in (first, second):
        assert_equal(answer, reference.long_question)
    assert cached(second) == second["meta_info"]["prompt_tokens"] - 512


def test_everything_is_evicted_and_refilled(server: Server, reference: Reference) -> None:
    asked = [*questions()[:3], *few_shot(), *texts()]
    expected = [*reference.questions[:3], *reference.few_shot, *reference.texts]
    before, counted = tree(server)["totals"], server.metric_samples()
    rng = random.Random(1)
    for flushed in (False, True, False):
        if flushed:
            tree(server)  # idle, or SGLang refuses
            server.flush_cache()
        order = rng.sample(range(len(asked)), len(asked))
        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(lambda i: question(server, asked[i]), order))
        for index, answer in zip(order, answers, strict=True):
            assert_equal(answer, expected[index])
    tree(server)
    server.flush_cache()
    # A question asked twice is pinned; its picture yields to others, and is then prefilled again.
    for index in (0, 0, *range(3, 10), 0):
        assert_equal(question(server, asked[index]), expected[index])
    after = tree(server)["totals"]
    grown = {name: after[name] - before[name] for name in after}
    assert grown["evicted_slots_visual"] > POOL
    for name in ("evicted_slots_prompt", "evicted_slots_generated", "refilled_slots"):
        assert grown[name] > 0, name
    # The shared text outlives the pictures that pass through.
    assert nodes(server, "prompt")

    def sampled(samples: list[tuple[str, dict[str, str], float]]) -> dict[str, float]:
        found = {"refilled_slots": 0.0}
        for name, labels, value in samples:
            if name == "sglang:aircache_refilled_slots_total":
                found["refilled_slots"] += value
            if name == "sglang:aircache_evicted_slots_total":
                found[f"evicted_slots_{labels['kind']}"] = value
        return found

    first, last = sampled(counted), sampled(server.metric_samples())
    for name, value in last.items():
        assert value - first.get(name, 0.0) == grown[name], name
    assert {name for name, value in grown.items() if value and "slots" in name} <= set(last)


def test_ten_turns_in_exact_mode(server: Server, reference: Reference) -> None:
    hits = []
    for prompt, expected in reference.chat:
        answer = question(server, prompt)
        assert_equal(answer, expected)
        hits.append(cached(answer))
        question(server, questions()[0])  # another user's picture, sometimes in the way
    assert hits[0] == 0 and max(hits) > 120, "a turn has found the picture"


def test_ten_turns_in_compressed_mode(server: Server, oracle: Oracle) -> None:
    compressed_chat(server, oracle, user_prompt(GARDEN, "what grows here?"), CHAT_TURNS)
    assert len(nodes(server, "packed")) == 1


def test_compressed_turns_on_pictures_between_texts(server: Server, oracle: Oracle) -> None:
    prompt = user_prompt(
        *("first", picture(90, 8, 8), "then" + words(6), picture(91, 6, 8), "what has changed?"),
        system="be brief.",
    )
    compressed_chat(server, oracle, prompt, 4)


def test_a_long_follow_up_is_prefilled_in_chunks(server: Server, oracle: Oracle) -> None:
    compressed_chat(server, oracle, user_prompt(GARDEN, "what is this?"), 4, long_turn=1)


def test_a_replica_outlives_its_picture(server: Server, oracle: Oracle) -> None:
    """The picture's exact KV is evicted; no token of it is prefilled again."""
    first = user_prompt(GARDEN, "what do you see?")
    overrides = {"reuse": "compressed", "return_selection": True}
    answer = question(server, first, **overrides)
    selection = answer["meta_info"]["aircache"]["selection"]
    before = tree(server)["totals"].get("evicted_slots_visual", 0)
    for i in range(20):
        question(server, user_prompt(picture(200 + i, 8, 8), words(4)))
        if tree(server)["totals"].get("evicted_slots_visual", 0) > before:
            break
    assert tree(server)["totals"]["evicted_slots_visual"] == before + 120
    second = next_turn(first, answer, 2)
    answer = question(server, second, **overrides)
    assert answer["meta_info"]["aircache"]["reused"] and cached(answer) > 120
    assert carried(oracle, first, second, answer, selection) < LOGPROB_TOLERANCE
    # Exact mode knows nothing of the replica.
    exact = question(server, second)
    assert not exact["meta_info"]["aircache"]["reused"] and cached(exact) < 20


def test_variants_of_one_picture(server: Server, oracle: Oracle) -> None:
    first = user_prompt(GARDEN, "what do you see?")
    overrides = {"reuse": "compressed", "return_selection": True}
    for retention in (0.1, 0.4):
        answer = question(server, first, retention=retention, **overrides)
        assert not answer["meta_info"]["aircache"]["reused"]
    assert [node["columns"] for node in nodes(server, "packed")] == [12, 48]
    for retention in (0.1, 0.4):
        # The second turn of the last answer; the text of the other variant is computed anew.
        second = next_turn(first, answer, 1)
        turn = question(server, second, retention=retention, **overrides)
        report = turn["meta_info"]["aircache"]
        assert report["reused"] and report["retention"] == retention
        assert report["columns"] == round(retention * 120)
        error = carried(oracle, first, second, turn, report["selection"])
        assert error < LOGPROB_TOLERANCE


def test_figures_are_truthful(server: Server) -> None:
    before, totals = server.metrics(), tree(server)["totals"]
    prompts = [*questions()[:3], *few_shot()[:2]]
    answers = [question(server, prompt) for prompt in prompts]
    chat = [question(server, questions()[0], reuse="compressed")]
    chat.append(question(server, next_turn(questions()[0], chat[0], 1), reuse="compressed"))
    now = tree(server)["totals"]

    def grown(name: str) -> int:
        return int(now.get(name, 0) - totals.get(name, 0))

    assert grown("hit_tokens_exact") == sum(map(cached, (*answers, chat[0])))
    assert grown("hit_tokens_compressed") == cached(chat[1]) > 120
    after = server.metrics()

    def counted(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    assert counted("sglang:aircache_hit_tokens_total") == sum(map(cached, (*answers, *chat)))
    assert counted("sglang:cached_tokens_total") == sum(map(cached, (*answers, *chat)))
    prompt_tokens = sum(a["meta_info"]["prompt_tokens"] for a in (*answers, *chat))
    assert counted("sglang:prompt_tokens_total") == prompt_tokens
    # SGLang's gauge is of its last prefill: all of this prompt but what is scored.
    answer = question(server, questions()[0])
    rate = cached(answer) / answer["meta_info"]["prompt_tokens"]
    assert rate > 0.8
    wait_until(lambda: abs(server.metrics()["sglang:cache_hit_rate"] - rate) < 1e-6)
    old, new = (server.get(path)["internal_states"][0] for path in OLD_AND_NEW)
    assert old["aircache"]["pool"] == new["aircache"]["pool"]
    for info in (old, new):
        assert info["memory_usage"]["token_capacity"] == info["aircache"]["pool"]["size"] == POOL
    server.flush_cache()
    assert tree(server)["nodes"] == [] and tree(server)["pool"]["free"] == POOL
    assert cached(question(server, prompts[0])) == 0


def test_a_dump_while_a_request_decodes(server: Server) -> None:
    """It holds its text, and for itself its columns and what it has said."""
    prompt = questions()[0]
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(
            server.generate,
            prompt.text,
            images=prompt.images,
            max_new_tokens=600,
            sampling={
                "ignore_eos": True,
                "custom_params": {"aircache": {"retention": RETENTION}},
            },
        )
        dumps = []
        while not answer.done():
            (dump,) = cache_view.fetch(server.url)
            dumps.append((dump["pool"], dump["nodes"]))
        info = answer.result()["meta_info"]
    text = info["prompt_tokens"] - info["aircache"]["visual_tokens"]
    columns = info["aircache"]["columns"]
    running = [(pool, nodes) for pool, nodes in dumps if pool["protected"] == text]
    assert len(running) >= 2
    said = [pool["private"] - columns for pool, _ in running]
    assert said == sorted(said) and 0 < said[0] < said[-1] <= 600
    for pool, held in running:
        assert pool["evictable"] == info["aircache"]["visual_tokens"]
        locks = {(node["kind"], node["locks"]) for node in held}
        assert locks == {("prompt", 1), ("visual", 0)}


def test_the_console_draws_the_tree(server: Server) -> None:
    question(server, questions()[0], reuse="compressed")
    (dump,) = cache_view.fetch(server.url)
    drawn = cache_view.draw(dump)
    for kind in ("prompt", "visual", "packed", "lossy"):
        assert f"- {kind}" in drawn
    assert "(36 columns)" in drawn and f"pool {POOL} slots" in drawn
    # The subcommand in a process of its own, without SGLang.
    code = (
        "import sys; from aircache_patches.cli import main; code = main(); "
        "assert 'sglang' not in sys.modules; sys.exit(code)"
    )
    argv = [sys.executable, "-c", code, "cache", "--url", server.url, "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["pool"] == dump["pool"]
    argv[argv.index(server.url)] = "http://127.0.0.1:1"
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "no server answers at http://127.0.0.1:1" in done.stderr


def test_the_oracle_notices_a_turn_on_the_full_picture(server: Server, oracle: Oracle) -> None:
    """The comparison above fails where the follow-up sees more than what was kept."""
    first = user_prompt(GARDEN, "what grows here?")
    answer = question(server, first, return_selection=True, retention=0.05)
    selection = answer["meta_info"]["aircache"]["selection"]
    second = next_turn(first, answer, 1)
    full = question(server, second, retention=1.0)
    assert carried(oracle, first, second, full, selection) > 10 * LOGPROB_TOLERANCE
    assert torch.isfinite(torch.tensor(full["meta_info"]["output_token_logprobs"][0][0]))
