# SPDX-License-Identifier: Apache-2.0
"""A compressing server against Transformers under the mask of its selection, and against stock."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from aircache_sglang.platform import has_accelerator
from aircache_sglang.testing import Server
from aircache_sglang.testing.oracle import Oracle, assert_agrees, assert_policy_agrees
from aircache_sglang.testing.prompts import (
    Prompt,
    ask,
    max_logprob_difference,
    picture,
    user_prompt,
    words,
)

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(has_accelerator(), reason="SGLang would use the accelerator"),
]

ONE_PICTURE = user_prompt(picture(1, 12, 11), "what is above the small white house?")
THREE_PICTURES = user_prompt(
    *(picture(2, 5, 8), picture(3, 12, 12), picture(4, 6, 6)), "how many birds do you see?"
)
PICTURES_BETWEEN_TEXTS = user_prompt(
    *("here is a garden:", picture(5, 8, 8), "here is a river", words(20), picture(6, 7, 9)),
    "and last the sea" + words(7),
    *(picture(7, 6, 11), "tell me what you see in the second picture."),
    system="you look at pictures and say what is in them.",
)
SHAPES = {
    "one picture": ONE_PICTURE,
    "three pictures": THREE_PICTURES,
    "pictures between texts": PICTURES_BETWEEN_TEXTS,
}


def compressed(server: Server, prompt: Prompt, **overrides: Any) -> Any:
    answer = ask(server, prompt, {"return_selection": True, **overrides}, max_new_tokens=20)
    assert answer["meta_info"]["aircache"] is not None
    return answer


def test_the_oracle_without_a_selection_is_transformers(oracle: Oracle) -> None:
    inputs = oracle.inputs(THREE_PICTURES)
    model = oracle.stock_model()
    output = model.generate(
        **inputs,
        max_new_tokens=8,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    logprobs = torch.cat(output.logits).log_softmax(dim=-1)
    torch.testing.assert_close(oracle.run(inputs, tokens).logprobs, logprobs, rtol=0.0, atol=5e-5)


@pytest.mark.parametrize("retention", [0.5, 0.1, 0.02])
@pytest.mark.parametrize("shape", SHAPES)
def test_logprobs_selection_and_budgets(
    aircache_server: Server, oracle: Oracle, shape: str, retention: float
) -> None:
    answer = compressed(aircache_server, SHAPES[shape], retention=retention)
    report = answer["meta_info"]["aircache"]
    trace = assert_agrees(oracle, SHAPES[shape], answer)
    assert_policy_agrees(trace, report)

    n_visual, budgets = len(trace.visual), report["layer_budgets"]
    m = max(1, round(retention * n_visual))
    assert report["columns"] == m and report["slots_freed"] == n_visual - m
    assert sum(budgets) == len(budgets) * m
    assert len(set(budgets)) > 1, "this test needs uneven budgets"
    assert any(first != second for first, second in report["selection"])


def test_hiding_the_wrong_cells_is_noticed(aircache_server: Server, oracle: Oracle) -> None:
    """The oracle's tolerance is small against what one other cell a head does to the answer."""
    answer = compressed(aircache_server, ONE_PICTURE, retention=0.1)
    for heads in answer["meta_info"]["aircache"]["selection"]:
        for kept in heads:
            kept[0] = min(set(range(132)) - set(kept))
    with pytest.raises(AssertionError, match="logprobs differ"):
        assert_agrees(oracle, ONE_PICTURE, answer)


# A request's overrides, and what they are to the policy's functions.
OVERRIDES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alpha 0": ({"alpha": 0.0}, {"alpha": 0.0}),
    "alpha 0.3": ({"alpha": 0.3}, {"alpha": 0.3}),
    "alpha 1": ({"alpha": 1}, {"alpha": 1.0}),
    "budget uniform": ({"budget": "uniform"}, {"budget": "uniform"}),
    "budget strength": ({"budget": "strength"}, {"budget": "strength"}),
    "budget skewness": ({"budget": "skewness"}, {"budget": "skewness"}),
    "window all": ({"window": "all"}, {"alpha": 0.0}),
    "window last-1": ({"window": "last-1"}, {"alpha": 0.0, "window": 1}),
    "window last-8": ({"window": "last-8"}, {"alpha": 0.0, "window": 8}),
    "elite shared": ({"elite": "shared", "alpha": 0.5}, {"elite": "shared", "alpha": 0.5}),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_overrides(aircache_server: Server, oracle: Oracle, name: str) -> None:
    overrides, options = OVERRIDES[name]
    answer = compressed(aircache_server, PICTURES_BETWEEN_TEXTS, retention=0.15, **overrides)
    report = answer["meta_info"]["aircache"]
    trace = assert_agrees(oracle, PICTURES_BETWEEN_TEXTS, answer)
    assert_policy_agrees(trace, report, **options)
    usual = compressed(aircache_server, PICTURES_BETWEEN_TEXTS, retention=0.15)
    if name != "alpha 1":
        assert report["selection"] != usual["meta_info"]["aircache"]["selection"]
    if name == "budget uniform":
        assert len(set(report["layer_budgets"])) == 1


def test_another_question_after_a_prefix_hit(aircache_server: Server, oracle: Oracle) -> None:
    """The picture's KV is reused; the new instruction is scored anew."""
    image = picture(8, 12, 12)
    questions = [
        user_prompt(image, "what is on the left of the old bridge?"),
        user_prompt(image, "how many yellow flowers do you count in the garden, and why?"),
    ]
    aircache_server.flush_cache()
    answers = [compressed(aircache_server, prompt) for prompt in questions]
    again = compressed(aircache_server, questions[0])
    selections = []
    for prompt, answer in zip([*questions, questions[0]], [*answers, again], strict=True):
        report = answer["meta_info"]["aircache"]
        assert_policy_agrees(assert_agrees(oracle, prompt, answer), report)
        selections.append(report["selection"])
    inputs = oracle.inputs(questions[0])
    end_of_picture = int(inputs["mm_token_type_ids"].nonzero()[-1, 1]) + 1
    assert answers[0]["meta_info"]["cached_tokens"] == 0
    assert answers[1]["meta_info"]["cached_tokens"] == end_of_picture
    assert again["meta_info"]["cached_tokens"] == end_of_picture
    assert selections[0] == selections[2] != selections[1]
    assert again["output_ids"] == answers[0]["output_ids"]


def test_a_prefix_hit_on_the_first_of_two_pictures(aircache_server: Server, oracle: Oracle) -> None:
    shared = ("look at the river:", picture(9, 9, 9), "then at the mountain:")
    first = user_prompt(*shared, picture(10, 8, 9), "are they near the sea?")
    second = user_prompt(*shared, picture(11, 10, 6), "which one is higher?")
    aircache_server.flush_cache()
    compressed(aircache_server, first)
    answer = compressed(aircache_server, second)
    assert answer["meta_info"]["cached_tokens"] > 81
    trace = assert_agrees(oracle, second, answer)
    assert_policy_agrees(trace, answer["meta_info"]["aircache"])


MIXED = [
    user_prompt("what colour is the sea?"),
    ONE_PICTURE,
    user_prompt(words(150, seed=1)),
    THREE_PICTURES,
    PICTURES_BETWEEN_TEXTS,
    user_prompt(picture(12, 3, 3), words(40, seed=2)),
    user_prompt(words(30, seed=3), picture(13, 16, 15)),
]


def one_by_one(send: Callable[[Prompt], Any]) -> list[Any]:
    return [send(prompt) for prompt in MIXED]


def concurrently(send: Callable[[Prompt], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(MIXED)) as threads:
        return list(threads.map(send, MIXED))


@pytest.mark.parametrize("order", [one_by_one, concurrently])
def test_retention_1_is_stock(
    stock_server: Server, aircache_server: Server, order: Callable[..., list[Any]]
) -> None:
    stock_server.flush_cache()
    aircache_server.flush_cache()
    expected = one_by_one(lambda prompt: ask(stock_server, prompt, max_new_tokens=24))
    answers = order(
        lambda prompt: ask(aircache_server, prompt, {"retention": 1.0}, max_new_tokens=24)
    )
    assert max_logprob_difference(expected, answers) < 1e-5
