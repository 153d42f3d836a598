# SPDX-License-Identifier: Apache-2.0
"""N-gram speculation beside a policy: answers are those of Transformers, token by token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from aircache_sglang.platform import has_accelerator
from aircache_sglang.testing import Server
from aircache_sglang.testing.oracle import Oracle, assert_agrees, assert_policy_agrees
from aircache_sglang.testing.prompts import Prompt, ask, picture, user_prompt, words
from tests.integration.conftest import COMPRESSING_FLAGS, STRICT_MEMORY_CHECKS
from tests.integration.storm import Storm, flush, loads, make_jobs, make_prompts, wait_idle
from tests.integration.test_exactness import SHAPES
from tests.integration.test_memory import check_answers, check_outcomes, references
from tests.support.chats import compressed_chat
from tests.support.compiler import needs_compiler
from tests.support.preloaded import PreloadedServer

pytestmark = [
    pytest.mark.server,
    needs_compiler,
    pytest.mark.skipif(has_accelerator(), reason="SGLang would use the accelerator"),
]

POOL = 900
SPECULATION = ("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", "8")
FLAGS = [
    *(*COMPRESSING_FLAGS, *SPECULATION, "--max-total-tokens", str(POOL)),
    *("--context-length", "1024", "--chunked-prefill-size", "128", "--max-running-requests", "12"),
    *("--load-snapshot-publish-interval", "1", "--schedule-conservativeness", "0.05"),
]
# Admission that hopes for short answers is what makes the scheduler retract.
ENV = STRICT_MEMORY_CHECKS | {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "8"}


@pytest.fixture(scope="module")
def speculating_server(checkpoint: Path) -> Iterator[Server]:
    with PreloadedServer(checkpoint, FLAGS, env=ENV) as server:
        assert server.info()["speculative_algorithm"] == "NGRAM"
        yield server


def assert_nothing_is_left(server: Server) -> None:
    """No slot is in use, and none is lost: strict checks end a server that loses one."""
    wait_idle(server)
    assert loads(server)["num_used_tokens"] == 0
    flush(server)
    server.generate("a", max_new_tokens=1)
    wait_idle(server)


def tokens_a_step(answer: Any) -> float:
    """Accepted tokens of a verify step, the one included that a decode step would give."""
    meta = answer["meta_info"]
    return float((meta["completion_tokens"] - 1) / meta["spec_verify_ct"])


@pytest.mark.parametrize("retention", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_answers_and_logprobs(
    speculating_server: Server, oracle: Oracle, shape: str, retention: float
) -> None:
    asked = {"retention": retention, "return_selection": True}
    answer = ask(speculating_server, SHAPES[shape], asked, max_new_tokens=24)
    report = answer["meta_info"]["aircache"]
    assert (report is None) == (retention == 1.0)
    trace = assert_agrees(oracle, SHAPES[shape], answer)
    if report is not None:
        assert_policy_agrees(trace, report)


@pytest.mark.parametrize("retention", [1.0, 0.1])
def test_a_repetitive_answer_takes_fewer_steps(
    speculating_server: Server, oracle: Oracle, retention: float
) -> None:
    """What was said before is drafted, and is right: by this answer, and by one to another."""
    prompt = user_prompt(picture(40 + int(10 * retention), 9, 9), "what is this?")
    asked = {"retention": retention, "return_selection": True}
    first, second = (ask(speculating_server, prompt, asked, max_new_tokens=100) for _ in range(2))
    for answer in (first, second):
        assert_agrees(oracle, prompt, answer)
    assert first["output_ids"] == second["output_ids"]
    assert tokens_a_step(first) > 1.0 and tokens_a_step(second) > 4.0


def test_packed_and_other_requests_in_one_batch(speculating_server: Server, oracle: Oracle) -> None:
    flush(speculating_server)
    prompts = [
        user_prompt("what colour is the sea?"),
        SHAPES["one picture"],
        user_prompt(picture(12, 3, 3), words(40, seed=2)),
        SHAPES["pictures between texts"],
        user_prompt(words(60, seed=1)),
    ]
    asked = [None, {"retention": 0.3}, {}, {"retention": 0.05}, None]

    def one(prompt: Prompt, overrides: Any) -> Any:
        overrides = None if overrides is None else overrides | {"return_selection": True}
        return ask(speculating_server, prompt, overrides, max_new_tokens=40)

    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(one, prompts, asked))
    packed = [answer["meta_info"]["aircache"] is not None for answer in answers]
    assert packed == [False, True, False, True, False]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_agrees(oracle, prompt, answer)


def test_an_answer_ends_within_a_run(speculating_server: Server) -> None:
    """By its length, by a stop word, and broken off; streamed and not."""
    server, prompt = speculating_server, SHAPES["one picture"]
    long = ask(server, prompt, {"retention": 0.1}, max_new_tokens=64)
    assert tokens_a_step(long) > 1.0
    for n in (1, 2, 3, 20, 37, 63):
        answer = ask(server, prompt, {"retention": 0.1}, max_new_tokens=n)
        assert answer["output_ids"] == long["output_ids"][:n]
        assert len(answer["meta_info"]["output_token_logprobs"]) == n
    counts = Counter(long["text"].split())
    stop = next(word for word in long["text"].split()[8:] if counts[word] == max(counts.values()))
    answer = ask(server, prompt, {"retention": 0.1}, max_new_tokens=64, sampling={"stop": stop})
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert answer["text"] == long["text"][: long["text"].index(stop)]
    sampling = {"max_new_tokens": 64, "temperature": 0, "ignore_eos": True}
    body = {"text": words(30, seed=9), "sampling_params": sampling}
    chunks = list(server.stream("/generate", body))
    whole = server.post("/generate", body)
    assert chunks[-1]["text"] == whole["text"]
    assert_nothing_is_left(server)


def test_a_sampled_answer_beside_a_greedy_one(speculating_server: Server) -> None:
    """In one batch: the greedy answer is what it is alone, and the other is none twice."""
    prompt = SHAPES["one picture"]
    alone = ask(speculating_server, prompt, {"retention": 0.1}, max_new_tokens=40)

    def one(temperature: float) -> Any:
        sampling = {"top_p": 0.9, "top_k": 50} if temperature else {}
        return ask(
            *(speculating_server, prompt, {"retention": 0.1}),
            max_new_tokens=40,
            temperature=temperature,
            sampling=sampling,
        )

    with ThreadPoolExecutor(3) as pool:
        greedy, *sampled = pool.map(one, (0.0, 1.0, 1.0))
    assert greedy["output_ids"] == alone["output_ids"]
    assert sampled[0]["output_ids"] != sampled[1]["output_ids"]


def test_a_conversation_extends_its_replica(speculating_server: Server, oracle: Oracle) -> None:
    flush(speculating_server)
    prompt = user_prompt(picture(31, 8, 9), "what is this?")
    compressed_chat(speculating_server, oracle, prompt, 3, speculates=True)


def test_packing_under_pressure(speculating_server: Server, oracle: Oracle) -> None:
    """More pictures than the pool holds whole: some are packed between two verify steps."""
    flush(speculating_server)
    prompts = [user_prompt(picture(50 + i, 12, 14), "what is this?") for i in range(6)]
    asked = {"when": "pressure", "retention": 0.2, "return_selection": True}
    lengths = [30, 40, 50, 60, 45, 35]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(
            pool.map(
                lambda pair: ask(speculating_server, pair[0], asked, max_new_tokens=pair[1]),
                zip(prompts, lengths, strict=True),
            )
        )
    packs = [answer["meta_info"]["aircache"].get("packs") for answer in answers]
    assert any(packs), "this test needs a smaller pool"
    assert any(step["packed_at"] > 1 for steps in packs if steps for step in steps)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_agrees(oracle, prompt, answer)
    assert_nothing_is_left(speculating_server)


def test_a_storm_leaves_no_slot_behind(speculating_server: Server) -> None:
    """Retractions, aborts and disconnects among packed and other requests."""
    prompts = make_prompts(1, 24)
    jobs = make_jobs(2, 160, prompts, longest=100)
    outcomes = Storm(speculating_server, concurrency=24).run(jobs, waves=1)
    finished = check_outcomes(outcomes)
    broken_off = Counter(o.job.fate for o in outcomes if not o.finished)
    assert broken_off["abort"] >= 3 and broken_off["disconnect"] >= 3
    retractions = sum(o.answer["meta_info"]["num_retractions"] for o in finished if o.answer)
    assert retractions >= 1, "the pool was too large to be a test"
    assert_nothing_is_left(speculating_server)
    assert check_answers(finished, references(speculating_server, prompts)) >= 100
    assert_nothing_is_left(speculating_server)


@pytest.fixture(scope="module")
def triton_server(checkpoint: Path) -> Iterator[Server]:
    """SGLang's Triton attention, which verifies drafts itself, and our kernels, interpreted."""
    flags = [*COMPRESSING_FLAGS, "--attention-backend", "triton", "--skip-server-warmup"]
    flags += ["--max-total-tokens", "700", "--speculative-algorithm", "NGRAM"]
    flags += ["--speculative-num-draft-tokens", "5"]
    env = {**STRICT_MEMORY_CHECKS, "TRITON_INTERPRET": "1"}
    with Server(checkpoint, flags, env=env) as server:
        yield server


def test_kernels_verify_drafts(triton_server: Server, oracle: Oracle) -> None:
    """Two packed requests beside one that is left alone, which then goes on by itself."""
    one = user_prompt(picture(1, 8, 9), "what is above the house?")
    two = user_prompt(picture(2, 8, 8), "and", picture(3, 6, 5), "how many birds?")
    asked = [
        (one, {"retention": 0.3, "return_selection": True}, 12),
        (two, {"retention": 0.1, "return_selection": True}, 12),
        (one, {"retention": 1.0}, 30),
    ]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(
            pool.map(lambda a: ask(triton_server, a[0], a[1], max_new_tokens=a[2]), asked)
        )
    for (prompt, _, _), answer in zip(asked, answers, strict=True):
        assert_agrees(oracle, prompt, answer)
    assert any(tokens_a_step(answer) > 1.0 for answer in answers)
