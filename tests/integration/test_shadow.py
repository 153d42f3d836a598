# SPDX-License-Identifier: Apache-2.0
"""Compressed answers compared with the full KV while the server is idle."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from aircache_sglang import audit, cache_view
from aircache_sglang.platform import has_accelerator
from aircache_sglang.runtime.agreement import Comparison
from aircache_sglang.testing import Server
from aircache_sglang.testing.oracle import Oracle, packs_of
from aircache_sglang.testing.prompts import Prompt, ask, picture, user_prompt, words
from aircache_sglang.testing.server import png_data_url
from benchmarks.documents.questions import evaluation_set
from tests.integration.conftest import COMPRESSING_FLAGS, STRICT_MEMORY_CHECKS
from tests.integration.storm import Storm, assert_answered, make_jobs, make_prompts
from tests.support.preloaded import PreloadedServer

pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.skipif(has_accelerator(), reason="SGLang would use the accelerator"),
]

DOCUMENTS = Path(__file__).resolve().parents[2] / "benchmarks" / "documents" / "checkpoint"
SHARE = 0.5
POOL = 3000
_numbers = itertools.count()


def rid(*, sampled: bool) -> str:
    """A request's id that is in the share, or is not."""
    while True:
        name = f"asked-{next(_numbers):06}"
        if (zlib.crc32(name.encode()) < SHARE * (1 << 32)) == sampled:
            return name


@pytest.fixture(scope="module")
def documents() -> Iterator[Server]:
    """The document model, one forward at a time, without a tree: a shadow encodes its picture
    anew. By default it keeps 5 % at random."""
    flags = ["--device", "cpu", "--dtype", "float32", "--kv-policy", "random"]
    flags += ["--aircache-retention", "0.05", "--aircache-gate", "off", "--enable-metrics"]
    flags += ["--aircache-shadow", str(SHARE), "--aircache-guard", "0.02"]
    flags += ["--disable-overlap-schedule", "--disable-radix-cache"]
    with PreloadedServer(DOCUMENTS, flags, env=STRICT_MEMORY_CHECKS) as server:
        yield server


@pytest.fixture(scope="module")
def chunked(checkpoint: Path) -> Iterator[Server]:
    """A small pool, overlap scheduling, 32 tokens of a prefill at a time."""
    flags = [*COMPRESSING_FLAGS, "--max-total-tokens", str(POOL), "--chunked-prefill-size", "32"]
    flags += ["--aircache-shadow", str(SHARE)]
    with PreloadedServer(checkpoint, flags, env=STRICT_MEMORY_CHECKS) as server:
        yield server


def shadow_of(server: Server) -> dict[str, Any]:
    (dump,) = cache_view.fetch(server.url)
    found: dict[str, Any] = dump["shadow"]
    return found


def compared(found: dict[str, Any]) -> int:
    return sum(row["requests"] for row in found["tallies"])


def settled(server: Server, at_least: int = 0) -> dict[str, Any]:
    """What the shadows have found, once none waits and so many answers have had theirs."""
    deadline = time.monotonic() + 120
    while True:
        found = shadow_of(server)
        ended = compared(found) + sum(found["dropped"].values())
        if found["waiting"] == 0 and ended >= at_least:
            return found
        assert time.monotonic() < deadline, (found, server.log_tail())
        # Each look is a request to the server, too.
        time.sleep(0.25)


def row_of(server: Server, policy: str, retention: str) -> dict[str, Any]:
    rows = audit.summary([shadow_of(server)])["rows"]
    (row,) = [r for r in rows if (r["policy"], r["retention"]) == (policy, retention)]
    return dict(row)


def questions(kind: str = "value") -> Iterator[Callable[..., Any]]:
    """Endless: each asks a server one question of the evaluation set."""
    for question in itertools.cycle(evaluation_set(kind, 200)):

        def put(server: Server, question: Any = question, **fields: Any) -> Any:
            return server.chat(question.prompt, images=question.images(), max_tokens=16, **fields)

        yield put


def check_against(oracle: Oracle, server: Server, prompts: Sequence[Prompt], n: int) -> None:
    """Answers of n tokens: the full KV's distributions along them, and the packed ones."""
    expected = {}
    for prompt, retention in zip(prompts, (0.02, 0.05, 0.1), strict=False):
        name = rid(sampled=True)
        overrides = {"policy": "aircache", "retention": retention, "return_selection": True}
        answer = ask(server, prompt, overrides, max_new_tokens=n, rid=name)
        tokens, inputs = answer["output_ids"], oracle.inputs(prompt)
        packs = packs_of(answer["meta_info"]["aircache"])
        full, packed = (
            [
                dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
                for top in (row.topk(20) for row in oracle.run(inputs, tokens, packs=p).logprobs)
            ]
            for p in ([], packs)
        )
        expected[name], _ = Comparison.of(full[1:], packed[1:], range(1, len(tokens)))
    found = {row["rid"]: row for row in settled(server, len(prompts))["worst"]}
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        row = found[name]
        assert (row["tokens"], row["differing"]) == (one.tokens, one.differing)
        assert row["first_difference"] == one.first
        assert row["mean_kl"] == pytest.approx(one.kl / one.tokens, abs=2e-4)
    assert max(one.kl for one in expected.values()) > 0.01, "all KV would do"


def test_the_comparison_is_that_of_transformers(documents: Server) -> None:
    asked = evaluation_set("line", 3)
    prompts = [user_prompt(*question.images(), question.prompt) for question in asked]
    check_against(Oracle(DOCUMENTS), documents, prompts, 12)


def test_so_it_is_in_chunks_behind_a_prefix_of_the_tree(chunked: Server, oracle: Oracle) -> None:
    check_against(oracle, chunked, [user_prompt(picture(4, 10, 10), "what is it")], 70)


def test_a_right_policy_is_cleared(documents: Server) -> None:
    before = compared(settled(documents))
    fields = {"custom_params": {"aircache": {"policy": "aircache", "retention": 0.5}}}
    ask_next = questions()
    for start in (0, 12):
        puts = list(itertools.islice(ask_next, 12))
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda put: put(documents, rid=rid(sampled=True), **fields), puts))
        settled(documents, before + start + 12)
    row = row_of(documents, "aircache", "0.5")
    assert row["requests"] == 24
    assert row["agreement"][1] > 0.85, row


def test_a_wrong_policy_is_found_and_the_guard_moves(documents: Server) -> None:
    """Within 200 requests, and with the first look at a window."""
    assert shadow_of(documents)["guard"]["retention"] == 0.05
    for n, put in enumerate(itertools.islice(questions(), 200), 1):
        put(documents, rid=rid(sampled=True))
        if n % 10 == 0 and settled(documents)["guard"]["raised"]:
            break
    row = row_of(documents, "random", "0.05")
    assert row["agreement"][2] < 0.95, row
    guard = shadow_of(documents)["guard"]
    assert (guard["raised"], guard["lowered"], guard["retention"]) == (1, 0, 0.1)
    assert "the guard has raised the retention, 0.05 to 0.1" in documents.log()

    def kept(**overrides: Any) -> float:
        prompt = user_prompt(picture(1, 16, 16), "what is it")
        meta = ask(documents, prompt, overrides, max_new_tokens=4)["meta_info"]
        return float(meta["aircache"]["retention"])

    assert (kept(), kept(retention=0.05)) == (0.1, 0.05)
    samples = documents.metric_samples()
    assert ("raised", 1.0) in [
        (labels["direction"], value)
        for name, labels, value in samples
        if name == "sglang:aircache_guard_moves_total"
    ]
    assert [v for name, _, v in samples if name == "sglang:aircache_guard_retention"] == [0.1]
    tallies = settled(documents)["tallies"]
    totals = documents.metrics()
    assert totals["sglang:aircache_shadow_tokens_total"] == sum(row["n"] for row in tallies)
    assert totals["sglang:aircache_shadow_kl_count"] == sum(row["n"] for row in tallies)
    assert totals["sglang:aircache_shadow_requests_total"] == compared(shadow_of(documents))


def without_times(answer: Any) -> Any:
    """An answer without what differs between two runs of any server."""
    if isinstance(answer, dict):
        ends = ("id", "created", "_ts", "_time", "_latency", "_throughput", "_wait")
        return {k: without_times(v) for k, v in answer.items() if not k.endswith(ends)}
    return [without_times(v) for v in answer] if isinstance(answer, list) else answer


def test_the_client_sees_no_difference(documents: Server) -> None:
    """With logprobs and without, streamed, and by OpenAI's endpoint."""
    prompt = user_prompt(picture(3, 12, 12), "what is it")
    body = Prompt(prompt.text, prompt.images)
    overrides = {"retention": 0.2, "policy": "aircache"}
    greedy = {"ignore_eos": True, "custom_params": {"aircache": overrides}}
    before = compared(settled(documents))

    def native(name: str, **fields: Any) -> Any:
        return documents.generate(
            body.text, images=body.images, sampling=greedy, max_new_tokens=6, rid=name, **fields
        )

    def chat(name: str, **fields: Any) -> Any:
        fields = {"custom_params": {"aircache": overrides}, "max_tokens": 6, **fields}
        return documents.chat("what is it", images=body.images, rid=name, **fields)

    native(rid(sampled=False))  # so that every other finds the same prefix
    chat(rid(sampled=False))
    asked: list[Callable[[str], Any]] = [
        native,
        lambda name: native(name, return_logprob=True, top_logprobs_num=3),
        lambda name: native(name, return_logprob=True, logprob_start_len=0, top_logprobs_num=2),
        chat,
        lambda name: chat(name, logprobs=True, top_logprobs=2),
        lambda name: list(
            documents.stream(
                "/generate",
                {
                    "text": body.text,
                    "image_data": [png_data_url(body.images[0])],
                    "sampling_params": {"max_new_tokens": 6, "temperature": 0.0, **greedy},
                    "rid": name,
                },
            )
        ),
    ]
    for put in asked:
        with_shadow, without = (put(rid(sampled=sampled)) for sampled in (True, False))
        assert without_times(with_shadow) == without_times(without)
    assert compared(settled(documents, before + len(asked))) == before + len(asked)


def test_the_command(documents: Server, chunked: Server) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "aircache_patches.cli", "audit", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    settled(documents)
    shown = run("--url", documents.url)
    assert shown.returncode == 0 and shown.stderr == ""
    assert "aircache  0.2" in shown.stdout and "guard: bound 0.02" in shown.stdout
    report = json.loads(run("--url", documents.url, "--json").stdout)
    assert report == audit.summary([shadow_of(documents)])
    assert run("--url", chunked.url).returncode == 0
    silent = run("--url", "http://127.0.0.1:9")
    assert silent.returncode == 2 and silent.stdout == ""
    assert (
        silent.stderr.startswith("aircache audit: no server answers at")
        and silent.stderr.count("\n") == 1
    )


def test_a_request_that_comes_is_served_and_the_shadow_dropped(chunked: Server) -> None:
    """An answer of 150 tokens takes 5 chunks, behind which nobody waits."""
    prompt = user_prompt(picture(5, 10, 10), "what is it")
    expected = None
    for _ in range(40):
        ask(chunked, prompt, {"retention": 0.2}, max_new_tokens=150, rid=rid(sampled=True))
        for _ in range(3):
            said = chunked.generate(words(6, seed=4), max_new_tokens=2)["text"]
            expected = said if expected is None else expected
            assert said == expected
        if settled(chunked)["dropped"].get("request_came"):
            break
    assert shadow_of(chunked)["dropped"]["request_came"] > 0
    # Left alone it has its turn.
    before = compared(shadow_of(chunked))
    ask(chunked, prompt, {"retention": 0.2}, max_new_tokens=150, rid=rid(sampled=True))
    deadline = time.monotonic() + 60
    while compared(shadow_of(chunked)) == before:
        assert time.monotonic() < deadline, shadow_of(chunked)
        time.sleep(0.25)


def test_what_waits_goes_with_the_cache(chunked: Server) -> None:
    """And a flush is not refused since a shadow runs."""
    prompt = user_prompt(picture(6, 10, 10), "what is it")
    before = settled(chunked)
    ask(chunked, prompt, {"retention": 0.2}, max_new_tokens=100, rid=rid(sampled=True))
    chunked.flush_cache()
    found = settled(chunked)
    assert compared(found) + sum(found["dropped"].values()) == 1 + compared(before) + sum(
        before["dropped"].values()
    )


def test_a_storm_loses_no_slot(chunked: Server) -> None:
    jobs = make_jobs(22, 45, make_prompts(22, 24), longest=24)
    before = shadow_of(chunked)
    outcomes = Storm(chunked, concurrency=6).run(jobs, waves=2)
    assert_answered(outcomes)
    found = settled(chunked)
    ended = compared(found) + sum(found["dropped"].values())
    assert ended > compared(before) + sum(before["dropped"].values()), "none was sampled"
    (dump,) = cache_view.fetch(chunked.url)
    state = dump["pool"]
    assert state["free"] + state["evictable"] == state["size"] == POOL


def test_the_answer_after_all_that_is_stock(chunked: Server, checkpoint: Path) -> None:
    """Nothing of a shadow is left in the tree or in the pool."""
    chunked.flush_cache()
    prompt = user_prompt(picture(7, 10, 10), "what is it")
    whole = [ask(chunked, prompt, {"policy": "none"}, max_new_tokens=8) for _ in range(2)]
    trace = Oracle(checkpoint)
    run = trace.run(trace.inputs(prompt), whole[0]["output_ids"])
    for answer in whole:
        said = torch.tensor([row[0] for row in answer["meta_info"]["output_token_logprobs"]])
        tokens = torch.tensor(answer["output_ids"])
        torch.testing.assert_close(
            run.logprobs[torch.arange(len(tokens)), tokens], said, atol=1e-4, rtol=0.0
        )
