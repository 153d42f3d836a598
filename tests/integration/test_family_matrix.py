# SPDX-License-Identifier: Apache-2.0
"""`make test-families`: every model family beside stock SGLang and Transformers, in all shapes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from aircache_sglang.platform import has_accelerator
from aircache_sglang.testing.oracle import assert_agrees
from aircache_sglang.testing.prompts import max_logprob_difference, picture
from tests.support.chats import cached, carried, next_turn
from tests.support.families import FAMILIES
from tests.support.families.served import QUESTION, Served, serve

pytestmark = [
    pytest.mark.server,
    pytest.mark.families,
    pytest.mark.skipif(has_accelerator(), reason="SGLang would use the accelerator"),
    pytest.mark.timeout(1800),
]

# Of logprobs between two servers that do the same; they may have found other prefixes cached.
TOLERANCES = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-1}


@pytest.fixture(scope="module", params=FAMILIES)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("family")
    with serve(FAMILIES[request.param], folder, beside_stock=True) as served:
        yield served


def test_retention_1_is_stock(served: Served) -> None:
    for name, prompt in served.prompts.items():
        answers = served.ask(prompt, stock=True), served.ask(prompt, retention=1)
        difference = max_logprob_difference([answers[0]], [answers[1]])
        assert difference < TOLERANCES[served.family.dtype], f"{name}: {difference:.1e}"


def test_compressed(served: Served) -> None:
    for prompt in served.prompts.values():
        for retention in (0.5, 0.1, 0.02):
            served.check(prompt, retention)


def test_the_same_pictures_again(served: Served) -> None:
    """A second question finds the pictures cached, where the model's server has a tree."""
    prompts = [
        served.family.prompt([picture(21, 12, 12), "and", picture(22, 9, 9), question])
        for question in (QUESTION, "how many birds do you see?")
    ]
    first, second = (served.check(prompt, 0.1) for prompt in prompts)
    if served.family.has_tree:
        # Other prompts begin with the same few words.
        assert cached(first) < 20
        assert cached(second) >= second["meta_info"]["aircache"]["visual_tokens"]


def test_follow_ups(served: Served) -> None:
    """The next turn is compressed anew, or extends what the turn before has kept."""
    first = served.family.prompt([picture(31, 12, 10), QUESTION])
    answer = served.check(first, 0.3)
    served.check(next_turn(first, answer, 1), 0.1)
    if not served.family.has_tree:
        return
    prompt, selection = first, None
    for turn in range(3):
        answer = served.ask(prompt, retention=0.3, reuse="compressed", return_selection=True)
        report = answer["meta_info"]["aircache"]
        assert report["reused"] == (turn > 0)
        selection = selection or report["selection"]
        if served.reader is not None:
            error = carried(served.reader, first, prompt, answer, selection)
            assert error < 1e-4, f"turn {turn}: {error:.1e}"
        prompt = next_turn(prompt, answer, turn)


def test_a_short_storm(served: Served) -> None:
    """Many at once, whole and compressed, and every answer is the one that it gets alone."""
    prompts = [
        served.family.prompt([picture(seed, 6 + seed % 5, 10), f"what is it? {seed}"])
        for seed in range(40, 52)
    ]
    retentions = [(0.1, 0.4, 1)[i % 3] for i in range(len(prompts))]
    with ThreadPoolExecutor(12) as pool:
        answers = list(
            pool.map(
                lambda p, r: served.ask(p, retention=r, return_selection=True), prompts, retentions
            )
        )
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["meta_info"]["completion_tokens"] == len(answer["output_ids"])
        if served.reader is not None:
            assert_agrees(served.reader, prompt, answer)


def test_no_slot_is_lost(served: Served) -> None:
    served.assert_no_slot_is_lost()
