# SPDX-License-Identifier: Apache-2.0
"""Two tensor-parallel ranks: each scores and packs its own KV heads, both agree on the budgets."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from aircache_sglang.platform import has_accelerator
from aircache_sglang.policy import get_policy
from aircache_sglang.testing import Server
from aircache_sglang.testing.oracle import (
    Oracle,
    assert_agrees,
    assert_keeps_the_best,
    assert_policy_agrees,
    policy_states,
)
from aircache_sglang.testing.prompts import ask, picture, user_prompt, words
from tests.support.chats import compressed_chat

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(has_accelerator(), reason="SGLang would use the accelerator"),
]

PROMPTS = {
    "one picture": user_prompt(picture(41, 12, 11), "what is above the small white house?"),
    "three pictures": user_prompt(
        *(picture(42, 5, 8), "a bird", picture(43, 9, 9), "a dog" + words(5), picture(44, 6, 6)),
        "how many birds do you see?",
    ),
}


@pytest.mark.parametrize("budget", ["global", "aircache"])
@pytest.mark.parametrize("retention", [0.5, 0.1])
@pytest.mark.parametrize("shape", PROMPTS)
def test_logprobs_selection_and_budgets(
    parallel_server: Server, oracle: Oracle, shape: str, retention: float, budget: str
) -> None:
    """The budgets are those that Transformers' scores of all heads give on one rank."""
    prompt = PROMPTS[shape]
    overrides = {"retention": retention, "budget": budget, "return_selection": True}
    answer = ask(parallel_server, prompt, overrides, max_new_tokens=20)
    report = answer["meta_info"]["aircache"]
    assert [len(heads) for heads in report["selection"]] == [2] * 4
    assert len(set(report["layer_budgets"])) > 1, "this test needs uneven budgets"
    assert any(first != second for first, second in report["selection"])
    assert_policy_agrees(assert_agrees(oracle, prompt, answer), report, budget=budget)


def test_ranks_share_one_selection(parallel_server: Server, oracle: Oracle) -> None:
    prompt = PROMPTS["three pictures"]
    overrides = {"policy": "prefixkv", "retention": 0.1, "return_selection": True}
    answer = ask(parallel_server, prompt, overrides)
    report = answer["meta_info"]["aircache"]
    assert all(first == second for first, second in report["selection"])
    trace, prefixkv = assert_agrees(oracle, prompt, answer), get_policy("prefixkv")
    states = policy_states(trace)
    scores = prefixkv.score(states)
    assert not torch.allclose(scores[:, 0], scores[:, 1]), "this test needs heads that differ"
    scores = scores.mean(dim=1, keepdim=True).expand_as(scores)
    statistics = prefixkv.statistics(states, scores)
    budgets = prefixkv.budgets(statistics, len(trace.visual), report["columns"]).tolist()
    assert_keeps_the_best(report, scores, budgets)


def test_a_prefix_hit(parallel_server: Server, oracle: Oracle) -> None:
    parallel_server.flush_cache()
    image = picture(45, 9, 9)
    for question in ("what is on the left?", "how many flowers are there?" + words(9)):
        prompt = user_prompt(image, question)
        answer = ask(parallel_server, prompt, {"return_selection": True})
        trace = assert_agrees(oracle, prompt, answer)
        assert_policy_agrees(trace, answer["meta_info"]["aircache"])
    assert answer["meta_info"]["cached_tokens"] == trace.instruction.start


def test_retention_1_is_the_whole_model(parallel_server: Server, oracle: Oracle) -> None:
    for prompt in (*PROMPTS.values(), user_prompt("what colour is the sea?")):
        answer = ask(parallel_server, prompt, {"retention": 1})
        assert answer["meta_info"]["aircache"] is None
        assert_agrees(oracle, prompt, answer)


def test_a_mixed_batch(parallel_server: Server, oracle: Oracle) -> None:
    prompts = [*PROMPTS.values(), user_prompt("what colour is the sea?"), *PROMPTS.values()]
    retentions = [0.2, 0.05, 1.0, 1.0, 0.3]
    with ThreadPoolExecutor(len(prompts)) as threads:
        answers = threads.map(
            lambda prompt, retention: ask(
                parallel_server, prompt, {"retention": retention, "return_selection": True}
            ),
            prompts,
            retentions,
        )
        for prompt, answer in zip(prompts, answers, strict=True):
            assert_agrees(oracle, prompt, answer)


def test_replicas_on_two_ranks(parallel_server: Server, oracle: Oracle) -> None:
    """Each rank holds one KV head; both find, extend and keep the same replicas."""
    prompt = user_prompt(picture(310, 9, 10), "what is this?" + words(3), picture(311, 8, 8), "?")
    compressed_chat(parallel_server, oracle, prompt, 3)
