# SPDX-License-Identifier: Apache-2.0
"""Qwen3.5: the attending layers are compressed; recurrent states are their requests', or cached.

In test_families.py its answers are Transformers'; here many run at once on little memory, under
SGLang's own strict checks of both pools, without a radix cache and with one.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from aircache_sglang.platform import has_accelerator
from aircache_sglang.testing import Server, ServerError
from aircache_sglang.testing.checkpoints import make_qwen3_5
from aircache_sglang.testing.oracle import (
    Oracle,
    assert_agrees,
    assert_policy_agrees,
    logprob_error,
)
from aircache_sglang.testing.prompts import Prompt, ask, max_logprob_difference
from tests.integration.conftest import COMMON_FLAGS, COMPRESSING_FLAGS, STRICT_MEMORY_CHECKS
from tests.integration.storm import (
    TOKEN_SIDE,
    Storm,
    fates,
    flush,
    loads,
    make_jobs,
    make_prompts,
    picture,
    wait_idle,
)
from tests.integration.test_memory import check_outcomes, settled_metrics
from tests.support.families.qwen import HYBRID_ENV, HYBRID_FLAGS, QWEN_IMAGE, HybridReader
from tests.support.preloaded import PreloadedServer

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(has_accelerator(), reason="SGLang would use the accelerator"),
]

POOL, LONGEST = 1200, 40
FLAGS = [
    *(*COMPRESSING_FLAGS, "--enable-metrics", *HYBRID_FLAGS, "--max-total-tokens", str(POOL)),
    *("--context-length", "1024", "--chunked-prefill-size", "128", "--max-running-requests", "8"),
    *("--load-snapshot-publish-interval", "1", "--schedule-conservativeness", "0.05"),
]
SANITY = "SGLANG_ENABLE_TREE_CACHE_SANITY_CHECK"
# 24 states, of which SGLang gives the 8 requests one each.
CACHING = [
    *(flag for flag in FLAGS if flag != "--disable-radix-cache"),
    *("--mamba-radix-cache-strategy", "no_buffer", "--disable-overlap-schedule"),
    *("--max-mamba-cache-size", "24"),
]
# Without a tree SGLang plans answers in full, and never retracts.
ENV = STRICT_MEMORY_CHECKS | HYBRID_ENV
RETRACTING = ENV | {
    "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "8",
    "SGLANG_TEST_RETRACT": "1",
    "SGLANG_TEST_RETRACT_INTERVAL": "17",
}


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_5(tmp_path_factory.mktemp("hybrid") / "model", patch=TOKEN_SIDE // 2)


class LongReader(HybridReader):
    """Over 100 tokens; stock SGLang's are up to 1.8e-4 away, packed ones up to 3.1e-4."""

    tolerance = 1e-3


@pytest.fixture(scope="module")
def reader(hybrid: Path) -> Oracle:
    return LongReader(hybrid)


def prompt_of(*seeds: int, question: str = "what is it?") -> Prompt:
    text = "".join(f"picture {seed} {QWEN_IMAGE} " for seed in seeds)
    return Prompt(
        f"<|im_start|>user\n{text}{question}<|im_end|>\n<|im_start|>assistant\n",
        tuple(picture(seed) for seed in seeds),
    )


@pytest.fixture(scope="module")
def server(hybrid: Path) -> Iterator[Server]:
    with PreloadedServer(hybrid, FLAGS, env=RETRACTING) as server:
        yield server


@pytest.fixture(scope="module")
def caching(hybrid: Path) -> Iterator[Server]:
    """Idle, it looks at a sample of its answers again; SGLang looks at the tree."""
    flags, env = [*CACHING, "--aircache-shadow", "0.3"], {SANITY: "1"}
    with PreloadedServer(hybrid, flags, env=RETRACTING | env) as server:
        yield server


def assert_nothing_is_left(server: Server) -> None:
    """An idle scheduler ends where a state is lost (invariant_checker.py, _check_mamba_pool)."""
    wait_idle(server)
    flush(server)
    assert loads(server)["num_used_tokens"] == 0


def storm(server: Server, seed: int) -> list[dict[str, Any]]:
    """What is said of the answers to 200 mixed requests, some broken off, some retracted."""
    prompts = make_prompts(seed, 24)
    jobs = make_jobs(seed + 1, 200, prompts, longest=LONGEST)
    outcomes = Storm(server, concurrency=16).run(jobs, waves=2)
    finished = check_outcomes(outcomes, n_layers=2)
    assert fates(finished)["finish"] >= 100
    assert sum(not o.finished for o in outcomes) >= 10, "nothing was broken off"
    metas = [o.answer["meta_info"] for o in finished if o.answer]
    assert any(meta["num_retractions"] and meta["aircache"] for meta in metas)
    assert_nothing_is_left(server)
    return metas


def many_at_once(
    server: Server, when: str, max_new_tokens: int
) -> tuple[list[Prompt], list[dict[str, Any]]]:
    """Six questions about two pictures each, the first picture the same; and their answers."""
    prompts = [prompt_of(3, seed) for seed in (4, 5, 8, 9, 10, 11)]
    overrides = {"retention": 0.1, "when": when, "return_selection": True}
    with ThreadPoolExecutor(len(prompts)) as threads:
        answers = threads.map(
            lambda each: ask(server, each, overrides, max_new_tokens=max_new_tokens), prompts
        )
        return prompts, list(answers)


def test_a_storm_loses_no_slot_and_no_state(server: Server) -> None:
    storm(server, 5)


@pytest.mark.parametrize("when", ["prefill", "pressure"])
def test_many_at_once_are_as_alone(server: Server, reader: Oracle, when: str) -> None:
    """Chunked, retracted and resumed, packed after the prefill or when slots are short."""
    prompts, answers = many_at_once(server, when, 100)
    packed = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        trace = assert_agrees(reader, prompt, answer)
        report = answer["meta_info"]["aircache"]
        if report["packed_at"] is None:
            continue
        packed += 1
        assert len(report["selection"]) == 2, "the layers that attend"
        if when == "prefill" and not answer["meta_info"]["num_retractions"]:
            assert_policy_agrees(trace, report)
    assert packed == len(prompts) if when == "prefill" else packed
    assert_nothing_is_left(server)


def test_nothing_is_left(server: Server) -> None:
    """The last test of this server."""
    server.generate("a", max_new_tokens=1)
    assert_nothing_is_left(server)
    metrics = settled_metrics(server, {"sglang:kv_used_tokens": 0, "sglang:mamba_usage": 0})
    assert metrics["sglang:kv_available_tokens"] == POOL
    assert metrics["sglang:aircache_columns_held"] == 0


def cached(answer: Any) -> int:
    return int(answer["meta_info"]["cached_tokens"])


def up_to_the_picture(answer: Any) -> int:
    """Tokens of a prompt up to the end of its last picture."""
    meta = answer["meta_info"]
    return int(meta["prompt_tokens"] - meta["aircache"]["instruction_tokens"])


@pytest.mark.parametrize("retention", [0.5, 0.1, 0.02])
def test_the_next_question_hits_the_pictures(
    caching: Server, reader: Oracle, retention: float
) -> None:
    flush(caching)
    overrides = {"retention": retention, "return_selection": True}
    for turn, question in enumerate(("what is it?", "where are they now?", "what is it?")):
        prompt = prompt_of(3, 5, question=question)
        answer = ask(caching, prompt, overrides)
        assert cached(answer) == (up_to_the_picture(answer) if turn else 0)
        trace = assert_agrees(reader, prompt, answer)
        assert trace.logprobs.shape[0] == 16
        error = logprob_error(trace, answer["meta_info"])
        assert error < HybridReader.tolerance, f"logprobs differ by {error:.2e}"
        assert_policy_agrees(trace, answer["meta_info"]["aircache"])
    assert_nothing_is_left(caching)


def test_a_turn_behind_an_answer_hits_the_prompt(caching: Server, reader: Oracle) -> None:
    """What was said was computed beside columns: a state stands where the prompt ends."""
    flush(caching)
    overrides = {"retention": 0.1, "return_selection": True}
    first = prompt_of(3)
    answer = ask(caching, first, overrides)
    turn = dataclasses.replace(
        first, text=f"{first.text}a tree<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n"
    )
    following = ask(caching, turn, overrides)
    assert_agrees(reader, turn, following)
    assert cached(following) == up_to_the_picture(answer), "what is scored is computed anew"
    plain = ask(caching, turn, {"policy": "none"})
    assert_agrees(reader, turn, plain)
    assert cached(plain) >= answer["meta_info"]["prompt_tokens"]
    assert_nothing_is_left(caching)


def test_nothing_kept_back_equals_stock(caching: Server, hybrid: Path) -> None:
    """Texts, pictures and what follows them, each twice: the logprobs and hits of stock SGLang."""
    said = "the old man walks along the river and looks at the water " * 8
    asked = [
        Prompt(f"<|im_start|>user\n{said}?<|im_end|>\n"),
        Prompt(f"<|im_start|>user\n{said}?<|im_end|>\n<|im_start|>assistant\nyes"),
        prompt_of(3, 5),
        prompt_of(3, 5, question="what is it? tell me more"),
    ]
    flags = [*COMMON_FLAGS, *CACHING[len(COMPRESSING_FLAGS) :]]
    with PreloadedServer(hybrid, flags, env=RETRACTING) as stock:
        expected = [ask(stock, prompt) for prompt in (*asked, *asked)]
    flush(caching)
    answers = [ask(caching, prompt, {"retention": 1}) for prompt in (*asked, *asked)]
    assert max_logprob_difference(expected, answers) < 1e-5
    for stock_answer, ours in zip(expected, answers, strict=True):
        assert cached(ours) >= cached(stock_answer)
    assert sum(map(cached, expected)) > 0
    assert_nothing_is_left(caching)


@pytest.mark.parametrize("when", ["prefill", "pressure"])
def test_many_at_once_on_few_states(caching: Server, reader: Oracle, when: str) -> None:
    """Hits, retracted and resumed; states and pictures are evicted meanwhile."""
    prompts, answers = many_at_once(caching, when, 60)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_agrees(reader, prompt, answer)
    assert any(map(cached, answers))
    assert_nothing_is_left(caching)


def test_a_storm_on_a_tree_loses_no_slot_and_no_state(caching: Server) -> None:
    metas = storm(caching, 7)
    assert sum(meta["cached_tokens"] for meta in metas) > 0
    pool = caching.info()["internal_states"][0]["aircache"]["pool"]
    assert (pool["states_free"], pool["states"], pool["free"]) == (24, 0, POOL)


def test_a_replica_is_refused(caching: Server) -> None:
    with pytest.raises(ServerError, match=r"HTTP 400.*has no recurrent state to go on from"):
        ask(caching, prompt_of(3), {"reuse": "compressed"})


def test_two_ranks(hybrid: Path, reader: Oracle) -> None:
    """With a tree on each, which hits alike."""
    with Server(hybrid, [*CACHING, "--tp-size", "2"], env=ENV) as ranks:
        for retention in (1, 0.3, 0.05):
            prompt = prompt_of(3, 5)
            answer = ask(ranks, prompt, {"retention": retention, "return_selection": True})
            trace = assert_agrees(reader, prompt, answer)
            if retention < 1:
                assert_policy_agrees(trace, answer["meta_info"]["aircache"])
        assert cached(answer) == up_to_the_picture(answer)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ((), "add --mamba-radix-cache-strategy no_buffer --disable-overlap-schedule, or serve it"),
        (
            (*HYBRID_FLAGS, "--speculative-algorithm", "NGRAM", "--disable-overlap-schedule"),
            "does not work with Qwen3_5ForConditionalGeneration and --speculative-algorithm NGRAM",
        ),
    ],
    ids=["overlap", "drafts"],
)
def test_refused(hybrid: Path, flags: tuple[str, ...], sentence: str) -> None:
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(hybrid)]
    command += ["--device", "cpu", "--dtype", "float32", "--kv-policy", "aircache", *flags]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode != 0 and sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_kernels_see_the_planes_of_attending_layers(hybrid: Path, reader: Oracle) -> None:
    """The GPU's path, interpreted: SGLang's Triton attention, our pass and our decode."""
    flags = [*FLAGS, "--attention-backend", "triton", "--skip-server-warmup"]
    with Server(hybrid, flags, env=ENV | {"TRITON_INTERPRET": "1"}) as server:
        prompt = prompt_of(2)
        overrides = {"retention": 0.3, "return_selection": True}
        answer = ask(server, prompt, overrides, max_new_tokens=4)
        assert_policy_agrees(assert_agrees(reader, prompt, answer), answer["meta_info"]["aircache"])
