# SPDX-License-Identifier: Apache-2.0
"""The pool on a real server, under SGLang's own strict checks: no slot is lost or owned twice.

With these checks a leak, a double free or a use after free ends the scheduler, idle or busy.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from aircache_sglang.testing import Server, ServerError
from aircache_sglang.testing.prompts import ask, picture, user_prompt
from tests.integration.conftest import STRICT_MEMORY_CHECKS
from tests.integration.storm import (
    PICTURE,
    Outcome,
    Prompt,
    Storm,
    assert_answered,
    fates,
    flush,
    loads,
    make_jobs,
    make_prompts,
    picture_url,
    visual_tokens,
    wait_idle,
)
from tests.support.preloaded import PreloadedServer

pytestmark = pytest.mark.server

POOL = 900
LONGEST = 100
FLAGS = [
    *("--device", "cpu", "--dtype", "float32", "--kv-policy", "aircache", "--aircache-gate", "off"),
    "--enable-metrics",
    *("--max-total-tokens", str(POOL), "--context-length", "1024", "--chunked-prefill-size", "128"),
    *("--max-running-requests", "12", "--load-snapshot-publish-interval", "1"),
    *("--schedule-conservativeness", "0.05"),
]
# Admission that hopes for short answers is what makes the scheduler retract.
ENV = STRICT_MEMORY_CHECKS | {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "8"}


@pytest.fixture(scope="module")
def small_server(checkpoint: Path) -> Iterator[Server]:
    """A pool for about five questions; overlap scheduling, chunked prefill, radix cache."""
    with PreloadedServer(checkpoint, FLAGS, env=ENV) as server:
        yield server


def assert_nothing_is_left(server: Server) -> None:
    """Every slot is free or evictable, and after a flush free."""
    wait_idle(server)
    assert loads(server)["num_used_tokens"] == 0
    metrics = settled_metrics(server, {"sglang:kv_used_tokens": 0})
    assert metrics["sglang:kv_available_tokens"] + metrics["sglang:kv_evictable_tokens"] == POOL
    assert metrics["sglang:aircache_columns_held"] == 0
    flush(server)
    # The gauges follow the next request; a short one leaves a few evictable tokens.
    server.generate("a", max_new_tokens=1)
    wait_idle(server)
    metrics = settled_metrics(server, {"sglang:kv_used_tokens": 0})
    assert metrics["sglang:kv_available_tokens"] >= POOL - 2
    assert metrics["sglang:kv_available_tokens"] + metrics["sglang:kv_evictable_tokens"] == POOL


def settled_metrics(server: Server, expected: dict[str, float]) -> dict[str, float]:
    """The gauges, once an idle scheduler, which publishes every 30 s, has published `expected`."""
    deadline = time.monotonic() + 40
    while True:
        metrics = server.metrics()
        if all(metrics[name] == value for name, value in expected.items()):
            return metrics
        if time.monotonic() > deadline:
            raise AssertionError({name: metrics[name] for name in expected})
        time.sleep(0.1)


def check_outcomes(outcomes: Sequence[Outcome], *, n_layers: int = 4) -> list[Outcome]:
    """No request failed that was not broken off, and every answer is whole; the whole answers.

    n_layers: of the model, those that attend.
    """
    assert_answered(outcomes)
    for outcome in outcomes:
        assert outcome.finished or outcome.job.fate != "finish", outcome
    finished = [outcome for outcome in outcomes if outcome.finished]
    for outcome in finished:
        assert outcome.answer is not None
        job, meta = outcome.job, outcome.answer["meta_info"]
        assert meta["completion_tokens"] == job.max_new_tokens == len(outcome.answer["output_ids"])
        info = meta["aircache"]
        assert (info is not None) == (job.prompt.compressible and job.max_new_tokens > 1), outcome
        if info is not None:
            assert info["visual_tokens"] == job.prompt.n_visual
            assert info["retention"] == (job.prompt.retention or 0.1)
            assert sum(info["layer_budgets"]) == n_layers * info["columns"]
            assert info["slots_freed"] == job.prompt.n_visual - info["columns"] > 0
    return finished


def references(server: Server, prompts: Sequence[Prompt]) -> dict[Prompt, dict[str, Any]]:
    """Answers without company, with the two likeliest tokens of each step."""
    fields = {"return_logprob": True, "top_logprobs_num": 2}
    with ThreadPoolExecutor(2) as pool:
        answers = pool.map(
            lambda prompt: server.post("/generate", prompt.body(LONGEST) | fields), prompts
        )
        return dict(zip(prompts, answers, strict=True))


def check_answers(finished: Sequence[Outcome], expected: dict[Prompt, dict[str, Any]]) -> int:
    """Answers of the storm are those without it; the number that was compared.

    Left out: compressed requests that were retracted, since what they had generated beside
    compressed KV is computed anew beside full KV.
    """
    compared = 0
    for outcome in finished:
        assert outcome.answer is not None
        meta = outcome.answer["meta_info"]
        if meta["aircache"] is not None and meta["num_retractions"]:
            continue
        reference = expected[outcome.job.prompt]
        got, want = outcome.answer["output_ids"], reference["output_ids"]
        if outcome.job.max_new_tokens == 1 and outcome.job.prompt.compressible:
            want = want[:1]
        compared += 1
        step = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), None)
        if step is None:
            continue
        # Batches of other sizes round differently in float32, which decides between equals.
        (first, *_), (second, *_) = reference["meta_info"]["output_top_logprobs"][step][:2]
        assert first - second < 1e-4, (outcome.job, step, first - second)
    return compared


@pytest.mark.slow
def test_a_storm_leaves_no_slot_behind(small_server: Server) -> None:
    prompts = make_prompts(1, 36)
    jobs = make_jobs(2, 500, prompts, longest=LONGEST)
    storm = Storm(small_server, concurrency=24)
    outcomes = storm.run(jobs, waves=5)
    assert len(outcomes) == 500
    assert storm.flushed == 5
    finished = check_outcomes(outcomes)
    broken_off = Counter(o.job.fate for o in outcomes if not o.finished)
    assert broken_off["abort"] >= 20
    assert broken_off["disconnect"] >= 10
    assert fates(finished)["finish"] >= 300
    retractions = sum(o.answer["meta_info"]["num_retractions"] for o in finished if o.answer)
    assert retractions >= 5, "the pool was too large to be a test"
    retracted = [o for o in finished if o.answer and o.answer["meta_info"]["num_retractions"]]
    assert any(o.answer and o.answer["meta_info"]["aircache"] for o in retracted)
    metrics = small_server.metrics()
    assert metrics["sglang:num_retracted_requests_total"] >= retractions
    assert metrics["sglang:evicted_tokens_total"] > POOL
    assert_nothing_is_left(small_server)
    # What was served in company was not mixed up.
    assert check_answers(finished, references(small_server, prompts)) >= 300
    assert_nothing_is_left(small_server)


@pytest.mark.slow
def test_a_storm_without_overlap_and_without_a_tree(checkpoint: Path) -> None:
    flags = [*FLAGS, "--disable-overlap-schedule", "--disable-radix-cache"]
    env = ENV | {
        # Without a tree SGLang plans the answers of such requests in full, and never retracts.
        "SGLANG_TEST_RETRACT": "1",
        "SGLANG_TEST_RETRACT_INTERVAL": "13",
    }
    with PreloadedServer(checkpoint, flags, env=env) as server:
        prompts = make_prompts(3, 24)
        jobs = make_jobs(4, 150, prompts, longest=40)
        outcomes = Storm(server, concurrency=16).run(jobs, waves=2)
        finished = check_outcomes(outcomes)
        assert sum(o.answer["meta_info"]["num_retractions"] for o in finished if o.answer) >= 5
        assert_nothing_is_left(server)
        for knob, overrides in (
            ("reuse", {"reuse": "compressed"}),
            ("session_columns", {"reuse": "compressed", "session_columns": 40}),
        ):
            with pytest.raises(ServerError, match=rf"HTTP 400.*aircache\.{knob} needs a radix"):
                ask(server, user_prompt(picture(1), "what?"), overrides)


class Stream(threading.Thread):
    """One streamed answer; `tokens` is how many have come so far."""

    def __init__(self, server: Server, body: dict[str, Any]) -> None:
        super().__init__()
        self.url, self.body = server.url, body | {"stream": True}
        self.tokens = 0
        self.answer: dict[str, Any] = {}

    def run(self) -> None:
        with requests.post(
            self.url + "/generate", json=self.body, stream=True, timeout=300
        ) as response:
            for line in response.iter_lines():
                if line.startswith(b"data: {"):
                    self.answer = json.loads(line.removeprefix(b"data: "))
                    self.tokens = self.answer["meta_info"]["completion_tokens"]


def tokens_in_use(server: Server, bodies: list[dict[str, Any]]) -> tuple[int, list[dict[str, Any]]]:
    """The most KV tokens that the server says are in use while all requests decode; the answers."""
    flush(server)
    streams = [Stream(server, body) for body in bodies]
    for stream in streams:
        stream.start()
    most = 0
    while any(stream.is_alive() for stream in streams):
        decoding = all(stream.tokens >= 20 for stream in streams)
        load = loads(server)
        if decoding and load["num_running_reqs"] == len(bodies):
            most = max(most, load["num_used_tokens"])
        time.sleep(0.02)
    for stream in streams:
        stream.join()
    assert most > 0, "the server was never seen while it decoded"
    return most, [stream.answer for stream in streams]


@pytest.mark.slow
def test_tokens_in_use_while_decoding(aircache_server: Server, stock_server: Server) -> None:
    generated = 400  # long enough to be seen on a busy machine
    bodies = [
        Prompt(f"look {PICTURE} and say what you see in it", (seed,), None).body(generated)
        for seed in (3, 5, 9, 11)
    ]
    used, answers = tokens_in_use(aircache_server, bodies)
    allowed, n_visual, columns = 0, 0, 0
    for answer in answers:
        meta = answer["meta_info"]
        info = meta["aircache"]
        text = meta["prompt_tokens"] - info["visual_tokens"]
        allowed += text + generated + info["columns"]
        n_visual += info["visual_tokens"]
        columns += info["columns"]
    assert used <= allowed
    stock_bodies = [
        body | {"sampling_params": body["sampling_params"] | {"custom_params": None}}
        for body in bodies
    ]
    stock_used, stock_answers = tokens_in_use(stock_server, stock_bodies)
    assert [a["meta_info"]["prompt_tokens"] for a in stock_answers] == [
        a["meta_info"]["prompt_tokens"] for a in answers
    ]
    # The generated part grows while it is looked at; the pictures make the difference.
    assert stock_used - used > 0.5 * (n_visual - columns)


def test_the_next_question_hits_the_picture(aircache_server: Server) -> None:
    flush(aircache_server)
    text = "one two " + PICTURE + " {}"
    url = [picture_url(5)]

    def ask(question: str) -> dict[str, Any]:
        meta: dict[str, Any] = aircache_server.post(
            "/generate",
            {
                "text": text.format(question),
                "image_data": url,
                "sampling_params": {"max_new_tokens": 4, "temperature": 0},
            },
        )["meta_info"]
        assert meta["aircache"]["visual_tokens"] == visual_tokens(5)
        return meta

    first = ask("what is it")
    assert first["cached_tokens"] == 0
    for question in ("where is it", "what is it"):
        again = ask(question)
        # All but the instruction, which is scored anew: what follows the last visual token.
        instruction = again["aircache"]["instruction_tokens"]
        assert again["cached_tokens"] == again["prompt_tokens"] - instruction
        assert again["aircache"]["layer_budgets"]
    assert again["aircache"]["layer_budgets"] == first["aircache"]["layer_budgets"]


def test_pictures_are_evicted_before_text(small_server: Server) -> None:
    flush(small_server)
    head = "the old man walks along the river and looks at the water " * 14
    question = {"max_new_tokens": 3, "temperature": 0}

    def ask(text: str, seed: int | None = None) -> dict[str, Any]:
        body: dict[str, Any] = {"text": text, "sampling_params": question}
        if seed is not None:
            body["image_data"] = [picture_url(seed)]
        meta: dict[str, Any] = small_server.post("/generate", body)["meta_info"]
        return meta

    first = ask(head + PICTURE + " what is it", 3)
    n_head = first["prompt_tokens"] - visual_tokens(3) - first["aircache"]["instruction_tokens"]
    assert n_head > 150
    evicted = small_server.metrics().get("sglang:evicted_tokens_total", 0)
    for seed in range(100, 118):
        ask(f"{PICTURE} is it number {seed}", seed)
    assert small_server.metrics()["sglang:evicted_tokens_total"] - evicted > visual_tokens(3)
    again = ask(head + PICTURE + " what is it", 3)
    assert again["cached_tokens"] == n_head, "the picture has gone, the text has stayed"
    assert again["aircache"]["layer_budgets"] == first["aircache"]["layer_budgets"]


def test_a_pool_too_small_for_the_columns(small_server: Server) -> None:
    """The prompt fits, its columns beside it do not: served as stock SGLang serves it."""
    flush(small_server)
    left_alone = Counter(
        {
            labels["reason"]: value
            for name, labels, value in small_server.metric_samples()
            if name == "sglang:aircache_requests_left_alone_total"
        }
    )
    # 504 visual tokens, 252 columns and 30 tokens of answer in a pool of 900; text does the rest.
    prompt = Prompt((PICTURE + " and ") * 3 + "so on " * 75, (5, 11, 17), 0.5)
    assert prompt.n_visual == 504
    answer = small_server.post("/generate", prompt.body(30))
    assert answer["meta_info"]["aircache"] is None
    assert answer["meta_info"]["completion_tokens"] == 30
    reasons = {
        labels["reason"]: value
        for name, labels, value in small_server.metric_samples()
        if name == "sglang:aircache_requests_left_alone_total"
    }
    assert reasons["pool_too_small"] == left_alone["pool_too_small"] + 1
    # Less text, fewer columns: it fits.
    fits = Prompt((PICTURE + " and ") * 3 + "so on", (5, 11, 17), 0.1)
    assert small_server.post("/generate", fits.body(30))["meta_info"]["aircache"]["columns"] == 50
    assert_nothing_is_left(small_server)


def test_columns_that_must_wait_for_room(small_server: Server) -> None:
    """Each fits alone, two do not: the second waits, or is served whole, and none is lost."""
    flush(small_server)
    prompts = [
        Prompt(
            f"{PICTURE} {PICTURE} {PICTURE} number {n}", (5 + 6 * n, 11 + 6 * n, 17 + 6 * n), 0.5
        )
        for n in range(4)
    ]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(
            pool.map(lambda prompt: small_server.post("/generate", prompt.body(40)), prompts)
        )
    for answer in answers:
        assert answer["meta_info"]["completion_tokens"] == 40
    assert any(answer["meta_info"]["aircache"] for answer in answers)
    assert_nothing_is_left(small_server)
