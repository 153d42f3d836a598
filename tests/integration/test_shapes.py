# SPDX-License-Identifier: Apache-2.0
"""Requests of every shape: chunked prefills, mixed batches, streams, samples, bad overrides."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from aircache_sglang.config import AirCacheConfig
from aircache_sglang.platform import has_accelerator
from aircache_sglang.runtime.choice import policy_of
from aircache_sglang.testing import Server, ServerError, png_data_url
from aircache_sglang.testing.oracle import (
    Oracle,
    assert_agrees,
    assert_keeps_the_best,
    assert_policy_agrees,
    policy_budgets,
    policy_states,
)
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

CHUNK = 128  # of serial_server
SELECTION = {"return_selection": True}
PICTURE = user_prompt(picture(21, 10, 9), "what is in the deep forest behind the house?")
TWO_PICTURES = user_prompt(picture(22, 7, 7), "and" + words(9), picture(23, 6, 9), "who is she?")
TEXT = user_prompt("where does the river end?")
TINY = user_prompt(picture(24, 3, 3), "what is this?" + words(20))


@pytest.fixture(params=["overlap", "serial"])
def server(
    request: pytest.FixtureRequest, aircache_server: Server, serial_server: Server
) -> Server:
    """Each test runs with overlap scheduling, and without it in chunks of 128 tokens."""
    return aircache_server if request.param == "overlap" else serial_server


# Where each boundary between chunks falls: the number of words before a picture of 100 tokens and
# after it, and what must be true of the boundaries for the picture's [start, end) in the prompt.
BOUNDARIES: dict[str, tuple[int, int, Callable[[list[int], int, int], bool]]] = {
    "in the text before": (125, 5, lambda cuts, start, end: cuts[0] < start and len(cuts) == 1),
    "at the picture's start": (121, 5, lambda cuts, start, end: cuts == [start]),
    "in the picture": (50, 20, lambda cuts, start, end: start < cuts[0] < end and len(cuts) == 1),
    "at the picture's end": (21, 20, lambda cuts, start, end: cuts == [end]),
    "in the instruction": (5, 60, lambda cuts, start, end: cuts[0] > end and len(cuts) == 1),
    "often in the instruction": (5, 420, lambda cuts, start, end: cuts[0] > end and len(cuts) == 4),
    "before a window of 512": (5, 560, lambda cuts, start, end: cuts[0] > end and len(cuts) == 5),
}


@pytest.mark.parametrize("place", BOUNDARIES)
def test_chunk_boundary(serial_server: Server, oracle: Oracle, place: str) -> None:
    before, after, as_wanted = BOUNDARIES[place]
    prompt = user_prompt(words(before, seed=4), picture(25), words(after, seed=5))
    serial_server.flush_cache()
    mark = len(serial_server.log())
    answer = ask(serial_server, prompt, {"retention": 0.1, **SELECTION})
    trace = assert_agrees(oracle, prompt, answer)
    assert_policy_agrees(trace, answer["meta_info"]["aircache"])

    length, start, end = trace.q.shape[1], int(trace.visual[0]), trace.instruction.start
    cuts = list(range(CHUNK, length, CHUNK))
    assert as_wanted(cuts, start, end), f"chunks end at {cuts}, the picture is [{start}, {end})"
    chunks = re.findall(r"Prefill batch.*?#new-token: (\d+)", serial_server.log()[mark:])
    assert [int(chunk) for chunk in chunks] == [CHUNK] * len(cuts) + [length - cuts[-1]]


@pytest.mark.parametrize("overrides", [{"policy": "h2o"}, {"window": "visual-32"}], ids=str)
def test_visual_queries_chunk_by_chunk(
    serial_server: Server, oracle: Oracle, overrides: dict[str, Any]
) -> None:
    """A chunk ends among the visual tokens, whose queries are looked at."""
    prompt = user_prompt(words(20, seed=4), picture(25), words(3), picture(30, 7, 7), words(20))
    answer = ask(serial_server, prompt, {"retention": 0.2, **overrides, **SELECTION})
    again = ask(serial_server, prompt, {"retention": 0.2, **overrides, **SELECTION})
    trace = assert_agrees(oracle, prompt, answer)
    chosen = policy_of(AirCacheConfig().with_overrides({"aircache": overrides}))
    states = policy_states(trace, visual_window=chosen.visual_window)
    scores = chosen.score(states)
    report = answer["meta_info"]["aircache"]
    statistics = chosen.statistics(states, scores)
    budgets = policy_budgets(chosen, statistics, scores, report["columns"])
    assert_keeps_the_best(report, scores, budgets.tolist())
    assert again["meta_info"]["aircache"] == report, "also when its pictures are in the tree"
    # All before the first query that is looked at; without a window, all before the pictures.
    assert again["meta_info"]["cached_tokens"] == int(trace.visual[-chosen.visual_window])


def test_chunks_after_a_prefix_hit(serial_server: Server, oracle: Oracle) -> None:
    shared = (words(40, seed=6), picture(26, 12, 12))
    serial_server.flush_cache()
    for question in (words(12, seed=7), words(150, seed=8)):
        prompt = user_prompt(*shared, question)
        answer = ask(serial_server, prompt, SELECTION)
        trace = assert_agrees(oracle, prompt, answer)
        assert_policy_agrees(trace, answer["meta_info"]["aircache"])
    assert answer["meta_info"]["cached_tokens"] == trace.instruction.start


def test_retention_1_without_overlap_is_stock(stock_server: Server, serial_server: Server) -> None:
    long_prompts = [
        user_prompt(words(150, seed=9)),
        user_prompt(words(100, seed=10), picture(27, 8, 9), words(50, seed=11)),
        user_prompt(picture(28, 13, 14), picture(29, 5, 5), "what do you see?"),
    ]
    prompts = [PICTURE, TEXT, TWO_PICTURES, TINY, *long_prompts]
    expected = [ask(stock_server, prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as threads:
        answers = threads.map(lambda prompt: ask(serial_server, prompt, {"retention": 1}), prompts)
        assert max_logprob_difference(expected, list(answers)) < 1e-5
    alone = [ask(serial_server, prompt, {"retention": 1}) for prompt in prompts]
    assert max_logprob_difference(expected, alone) < 1e-5


def test_a_batch_of_everything(server: Server, oracle: Oracle) -> None:
    """Text, tiny pictures, and compressed requests of different retentions decode together."""
    batch: list[tuple[Prompt, float | None, bool]] = [
        (TEXT, None, False),
        (PICTURE, 0.5, True),
        (TINY, 0.1, False),
        (TWO_PICTURES, 0.05, True),
        (user_prompt(words(60, seed=12)), None, False),
        (PICTURE, 1.0, False),
        (user_prompt(words(20, seed=13), picture(30, 9, 14), words(9)), None, True),
        (PICTURE, 0.02, True),
    ]
    overrides = [
        SELECTION | ({} if retention is None else {"retention": retention})
        for _, retention, _ in batch
    ]
    mark = len(server.log())
    answers = server.post(
        "/generate",
        {
            "text": [prompt.text for prompt, _, _ in batch],
            "image_data": [[png_data_url(image) for image in p.images] for p, _, _ in batch],
            "sampling_params": [
                {
                    "max_new_tokens": 100,
                    "temperature": 0,
                    "ignore_eos": True,
                    "custom_params": {"aircache": override},
                }
                for override in overrides
            ],
            "return_logprob": True,
            "top_logprobs_num": 5,
        },
    )
    for (prompt, retention, is_compressed), answer in zip(batch, answers, strict=True):
        report = answer["meta_info"]["aircache"]
        assert (report is not None) == is_compressed
        trace = assert_agrees(oracle, prompt, answer)
        if report is not None:
            assert report["retention"] == (0.1 if retention is None else retention)
            assert_policy_agrees(trace, report)
    running = re.findall(r"Decode batch.*?#running-req: (\d+)", server.log()[mark:])
    # Of the eight, four are compressed. Preprocessing may let one come late.
    assert max(map(int, running)) >= 6, "the requests did not decode together"


def test_one_token_is_left_alone(stock_server: Server, server: Server) -> None:
    expected = ask(stock_server, PICTURE, max_new_tokens=1)
    answer = ask(server, PICTURE, max_new_tokens=1)
    assert max_logprob_difference([expected], [answer]) < 1e-5


def test_two_tokens(server: Server, oracle: Oracle) -> None:
    answer = ask(server, PICTURE, SELECTION, max_new_tokens=2)
    assert answer["meta_info"]["aircache"]["columns"] == 9
    assert_agrees(oracle, PICTURE, answer)


def test_streaming(server: Server) -> None:
    expected = ask(server, PICTURE, SELECTION, max_new_tokens=12)
    sampling = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
    body = {
        "text": PICTURE.text,
        "image_data": [png_data_url(image) for image in PICTURE.images],
        "sampling_params": {**sampling, "custom_params": {"aircache": SELECTION}},
    }
    chunks = list(server.stream("/generate", body))
    assert len(chunks) > 1
    for chunk in chunks:
        assert chunk["meta_info"]["aircache"] == expected["meta_info"]["aircache"]
    assert chunks[-1]["text"] == expected["text"]

    text = {"text": TEXT.text, "sampling_params": sampling}
    assert {chunk["meta_info"]["aircache"] for chunk in server.stream("/generate", text)} == {None}


def test_parallel_samples(server: Server, oracle: Oracle) -> None:
    answers = ask(server, PICTURE, SELECTION, sampling={"n": 2})
    assert len(answers) == 2
    for answer in answers:
        trace = assert_agrees(oracle, PICTURE, answer)
        assert_policy_agrees(trace, answer["meta_info"]["aircache"])
    assert answers[0]["output_ids"] == answers[1]["output_ids"]


def test_seeded_sampling(server: Server, oracle: Oracle) -> None:
    answer = ask(server, PICTURE, SELECTION, temperature=1.0, sampling={"sampling_seed": 7})
    assert_agrees(oracle, PICTURE, answer, greedy=False)
    answer = ask(
        *(server, TWO_PICTURES, SELECTION),
        temperature=0.7,
        sampling={"top_p": 0.8, "top_k": 20, "sampling_seed": 8},
    )
    assert answer["meta_info"]["aircache"]["columns"] == 10
    assert len(answer["output_ids"]) == 16


def test_input_logprobs_are_stock(stock_server: Server, server: Server) -> None:
    """They come from the prefill, which sees every cell."""
    stock = ask(stock_server, TWO_PICTURES, logprob_start_len=0)["meta_info"]
    ours = ask(server, TWO_PICTURES, SELECTION, logprob_start_len=0)["meta_info"]
    assert ours["aircache"]["columns"] == 10
    for name in ("input_token_logprobs", "input_top_logprobs"):
        assert len(ours[name]) == len(stock[name]) == stock["prompt_tokens"]
    assert ours["input_token_logprobs"][0][0] is None
    for one, other in zip(
        stock["input_token_logprobs"][1:], ours["input_token_logprobs"][1:], strict=True
    ):
        assert other[1] == one[1] and other[0] == pytest.approx(one[0], abs=1e-5)


def test_chat(server: Server) -> None:
    """The OpenAI endpoint takes the same overrides and gives the same report and words."""
    question = "what is in the deep forest behind the house?"
    overrides = {"retention": 0.3, **SELECTION}
    native = ask(server, PICTURE, overrides, max_new_tokens=12)
    answer = server.chat(
        question,
        images=PICTURE.images,
        max_tokens=12,
        ignore_eos=True,
        custom_params={"aircache": overrides},
        return_meta_info=True,
        logprobs=True,
    )
    choice = answer["choices"][0]
    assert choice["message"]["content"] == native["text"]
    assert choice["meta_info"]["aircache"] == native["meta_info"]["aircache"]
    steps = native["meta_info"]["output_token_logprobs"]
    for content, step in zip(choice["logprobs"]["content"], steps, strict=True):
        assert content["logprob"] == pytest.approx(step[0], abs=1e-5)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"retention": 0}, ["aircache.retention", "got 0"]),
        ({"retention": 1.5}, ["aircache.retention", "got 1.5"]),
        ({"retention": "0.1"}, ["aircache.retention", "'0.1'"]),
        ({"retension": 0.1}, ["unknown key", "retension"]),
        ({"alpha": -1}, ["aircache.alpha", "got -1"]),
        ({"budget": "equal"}, ["aircache.budget", "equal"]),
        ({"window": "last-0"}, ["aircache.window", "last-0"]),
        ({"elite": "none"}, ["aircache.elite", "none"]),
        ({"min_visual_tokens": 0}, ["aircache.min_visual_tokens", "got 0"]),
        ({"ablation": {"rank": 2**31}}, ["aircache.ablation.rank", "got 2147483648"]),
        ({"return_selection": "yes"}, ["aircache.return_selection", "'yes'"]),
        ([0.1], ["must be an object", "[0.1]"]),
    ],
    ids=lambda value: None,
)
def test_bad_overrides(aircache_server: Server, overrides: Any, named: list[str]) -> None:
    for send in (
        lambda: ask(aircache_server, PICTURE, overrides),
        lambda: ask(aircache_server, TEXT, overrides),
        lambda: aircache_server.chat(
            "why?", images=PICTURE.images, custom_params={"aircache": overrides}
        ),
    ):
        with pytest.raises(ServerError, match="HTTP 400") as error:
            send()
        for part in named:
            assert part in str(error.value)


def test_a_bad_request_harms_no_other(server: Server) -> None:
    expected = ask(server, PICTURE, SELECTION, max_new_tokens=300)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(ask, server, PICTURE, SELECTION, max_new_tokens=300)
        for _ in range(5):
            for prompt in (PICTURE, TEXT):
                with pytest.raises(ServerError, match="HTTP 400"):
                    ask(server, prompt, {"retention": 7})
        assert not running.done(), "the long request was to run meanwhile"
        answer = running.result()
    assert answer["output_ids"] == expected["output_ids"]
    assert answer["meta_info"]["aircache"] == expected["meta_info"]["aircache"]


def test_servers_are_idle_and_well(server: Server) -> None:
    """Last of the file: the strict memory checks of an idle server have found nothing."""
    server.flush_cache()
    assert ask(server, TEXT)["meta_info"]["cached_tokens"] == 0
    assert server.is_running()
