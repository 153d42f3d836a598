# SPDX-License-Identifier: Apache-2.0
"""Several follow-up turns in one prefill, alone and beside new pictures, against Transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from aircache_sglang.platform import has_accelerator
from aircache_sglang.testing import Server
from aircache_sglang.testing.oracle import LOGPROB_TOLERANCE, Oracle, assert_agrees
from aircache_sglang.testing.prompts import Prompt, picture, user_prompt, words
from tests.support.batches import at_once
from tests.support.chats import carried, next_turn, question

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(has_accelerator(), reason="SGLang would use the accelerator"),
]

COMPRESSED = {"reuse": "compressed", "return_selection": True}
ATTEMPTS = 6

Chat = tuple[Prompt, Prompt, Any]


def chats(server: Server, seeds: Sequence[int]) -> list[Chat]:
    """Of each chat the first prompt, the second one, and what was kept of the picture."""
    found = []
    for seed in seeds:
        first = user_prompt(picture(seed, 9, 8 + seed % 3), "what is this?" + words(4, seed=seed))
        answer = question(server, first, **COMPRESSED)
        selection = answer["meta_info"]["aircache"]["selection"]
        found.append((first, next_turn(first, answer, seed), selection))
    return found


def assert_carried(oracle: Oracle, chat: Chat, answer: Any) -> None:
    first, second, selection = chat
    report = answer["meta_info"]["aircache"]
    assert report["reused"] and report["selection"] == selection
    assert carried(oracle, first, second, answer, selection) < LOGPROB_TOLERANCE


def test_follow_ups_alone(aircache_server: Server, oracle: Oracle) -> None:
    for attempt in range(ATTEMPTS):
        begun = chats(aircache_server, [500 + 10 * attempt + i for i in range(3)])
        answers, sizes = at_once(
            aircache_server,
            [lambda p=chat[1]: question(aircache_server, p, **COMPRESSED) for chat in begun],
        )
        if len(answers) in sizes:
            break
    assert len(answers) in sizes, "the follow-ups were not prefilled together"
    for chat, answer in zip(begun, answers, strict=True):
        assert_carried(oracle, chat, answer)


def test_follow_ups_beside_new_pictures_and_texts(aircache_server: Server, oracle: Oracle) -> None:
    for attempt in range(ATTEMPTS):
        begun = chats(aircache_server, [600 + 10 * attempt + i for i in range(2)])
        new = [
            user_prompt(picture(650 + attempt, 8, 9), "how many trees?" + words(9, seed=attempt)),
            user_prompt("which colour?" + words(30, seed=60 + attempt)),
        ]
        prompts = [begun[0][1], new[0], begun[1][1], new[1]]
        answers, sizes = at_once(
            aircache_server,
            [lambda p=prompt: question(aircache_server, p, **COMPRESSED) for prompt in prompts],
        )
        if len(answers) in sizes:
            break
    assert len(answers) in sizes, "the requests were not prefilled together"
    for chat, answer in zip(begun, answers[::2], strict=True):
        assert_carried(oracle, chat, answer)
    for prompt, answer in zip(new, answers[1::2], strict=True):
        assert_agrees(oracle, prompt, answer)


def test_logprobs_of_a_follow_up_prompt(aircache_server: Server, oracle: Oracle) -> None:
    """The rows of the prompt's own tokens, not of its last one alone."""
    ((first, second, selection),) = chats(aircache_server, [700])
    head = oracle.encode(first.text, first.images)
    ids = oracle.encode(second.text, second.images)["input_ids"][0].tolist()
    n_head = head["input_ids"].shape[1]
    start = n_head + 8  # behind the first answer, which is in the tree
    sampling = {"custom_params": {"aircache": {"retention": 0.3, **COMPRESSED}}}
    answer = aircache_server.generate(
        second.text,
        images=second.images,
        max_new_tokens=2,
        sampling=sampling,
        return_logprob=True,
        logprob_start_len=start,
    )
    assert answer["meta_info"]["aircache"]["reused"]
    trace = oracle.run(head, ids[n_head:] + answer["output_ids"], selection)
    scored = answer["meta_info"]["input_token_logprobs"]
    assert len(scored) == len(ids) - start > 4
    for position, (value, token, _) in zip(range(start, len(ids)), scored, strict=True):
        assert token == ids[position]
        if value is not None:  # of the first, SGLang gives none
            expected = float(trace.logprobs[position - n_head, token])
            assert abs(value - expected) < LOGPROB_TOLERANCE
