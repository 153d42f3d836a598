# SPDX-License-Identifier: Apache-2.0
"""`--aircache-when pressure` on real servers: stock's answers while there is room, and packing,
rung by rung, before anything is retracted; strict memory checks on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from aircache_sglang.testing import Server
from aircache_sglang.testing.oracle import (
    Oracle,
    assert_agrees,
)
from aircache_sglang.testing.prompts import (
    Prompt,
    ask,
    picture,
    user_prompt,
    words,
)
from aircache_sglang.testing.server import png_data_url
from tests.integration.conftest import COMPRESSING_FLAGS, STRICT_MEMORY_CHECKS
from tests.integration.storm import Storm, assert_answered, make_jobs, make_prompts, wait_idle
from tests.integration.test_memory import settled_metrics
from tests.support.preloaded import PreloadedServer
from tests.support.prometheus import DASHBOARD, Prometheus, panels

pytestmark = pytest.mark.server

RUNGS = (0.5, 0.25, 0.1)
# Three of the prompts below fit whole, with their answers.
POOL = 640
PRESSURE = [
    *(*COMPRESSING_FLAGS, "--enable-metrics", "--aircache-when", "pressure"),
    *("--aircache-rungs", ",".join(map(str, RUNGS)), "--max-total-tokens", str(POOL)),
    *("--context-length", "600", "--max-running-requests", "12"),
]
# What is retracted is what admission has hoped too much for.
HOPEFUL = STRICT_MEMORY_CHECKS | {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "8"}
HOPEFUL_FLAGS = [*PRESSURE, "--schedule-conservativeness", "0.05"]

MODES = {
    "overlap": [],
    "serial chunked": ["--disable-overlap-schedule", "--chunked-prefill-size", "128"],
    "no tree": ["--disable-radix-cache"],
    "two ranks": ["--tp-size", "2"],
}


@pytest.fixture(scope="module", params=MODES)
def pressed(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[Server]:
    start = Server if request.param == "two ranks" else PreloadedServer
    flags = [*HOPEFUL_FLAGS, *MODES[request.param]]
    with start(checkpoint, flags, env=HOPEFUL) as server:
        yield server


@pytest.fixture(scope="module")
def roomy(checkpoint: Path) -> Iterator[Server]:
    with PreloadedServer(checkpoint, PRESSURE, env=STRICT_MEMORY_CHECKS) as server:
        yield server


def prompts(seed: int) -> list[Prompt]:
    """Six prompts of one picture, of several, and of pictures between texts."""
    question = "what do you see behind the small white house?"
    return [
        user_prompt(picture(seed, 12, 11), question),
        user_prompt(picture(seed + 1, 5, 8), picture(seed + 2, 9, 9), question + words(5)),
        user_prompt(
            *("here is a garden:", picture(seed + 3, 8, 8), "and a river" + words(9)),
            *(picture(seed + 4, 7, 9), "tell me what is in the second picture."),
        ),
        user_prompt(picture(seed + 5, 12, 12), "how many birds are there?"),
        user_prompt(picture(seed + 6, 10, 13), "what is the colour of the door?" + words(12)),
        user_prompt(picture(seed + 7, 11, 11), "is there a bridge?"),
    ]


def ask_at_once(
    server: Server, questions: Sequence[Prompt], lengths: Sequence[int], **overrides: Any
) -> list[Any]:
    wanted = {"return_selection": True, **overrides}
    with ThreadPoolExecutor(len(questions)) as pool:
        pairs = zip(questions, lengths, strict=True)
        return list(pool.map(lambda p: ask(server, p[0], wanted, max_new_tokens=p[1]), pairs))


def check_report(answer: Any) -> dict[str, Any]:
    """The report adds up, and its rungs are nested."""
    meta = answer["meta_info"]
    report: dict[str, Any] = meta["aircache"]
    assert report["when"] == "pressure"
    n_visual, packs = report["visual_tokens"], report.get("packs", [])
    if not packs:
        assert meta["aircache_reason"] == "no_pressure"
        assert report["rung"] is report["packed_at"] is None
        assert report["slots_freed"] == report["columns"] == 0
        return report
    assert meta["aircache_reason"] is None
    assert report["packed_at"] == packs[-1]["packed_at"]
    above = None
    for step in packs:
        assert step["retention"] == RUNGS[step["rung"]]
        assert step["columns"] == round(step["retention"] * n_visual)
        assert sum(step["layer_budgets"]) == len(step["layer_budgets"]) * step["columns"]
        if above is not None:
            assert step["rung"] > above["rung"] and step["packed_at"] >= above["packed_at"]
            for mine, theirs in zip(step["layer_budgets"], above["layer_budgets"], strict=True):
                assert mine <= theirs
            for mine, theirs in zip(step["selection"], above["selection"], strict=True):
                assert all(set(a) <= set(b) for a, b in zip(mine, theirs, strict=True))
        above = step
    assert report["slots_freed"] == n_visual - packs[-1]["columns"]
    return report


@pytest.mark.slow
def test_answers_agree_with_transformers_at_every_rung(pressed: Server, oracle: Oracle) -> None:
    """The mask of the oracle changes where the server says that it packed."""
    rungs: set[tuple[int, ...]] = set()
    for round_, n_tokens in enumerate((60, 90)):
        questions = prompts(100 * round_ + 1)
        lengths = [n_tokens + 7 * i for i in range(len(questions))]
        answers = ask_at_once(pressed, questions, lengths)
        for prompt, answer in zip(questions, answers, strict=True):
            report = check_report(answer)
            assert_agrees(oracle, prompt, answer)
            rungs.add(tuple(step["rung"] for step in report.get("packs", [])))
    assert any(len(steps) > 1 for steps in rungs), rungs
    wait_idle(pressed)
    assert settled_metrics(pressed, {"sglang:kv_used_tokens": 0})["sglang:aircache_packs_total"] > 0


def test_what_fits_no_more_once_retracted_stays_whole(pressed: Server) -> None:
    """Prompt and columns fit, but not with what was said until SGLang took the slots back."""
    prompt = user_prompt(picture(61, 16, 21), "what do you see?" + words(85))
    whole = ask(pressed, prompt, {"retention": 1.0}, max_new_tokens=100)
    assert whole["meta_info"]["prompt_tokens"] + 100 < 600 < POOL < 600 + RUNGS[0] * 16 * 21
    for _ in range(8):
        pressed.flush_cache()
        last = retracted_at(pressed, prompt, 40, max_new_tokens=100)
        assert last["output_ids"] == whole["output_ids"]
        if last["meta_info"]["num_retractions"]:
            assert last["meta_info"]["aircache_reason"] == "pool_too_small"
            return
    pytest.fail("every answer was there before it could be retracted")


def retracted_at(
    server: Server, prompt: Prompt, n_said: int, *, max_new_tokens: int
) -> dict[str, Any]:
    """The last chunk of an answer that is retracted once so many tokens have been seen."""
    sampling = {
        "max_new_tokens": max_new_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "custom_params": {"aircache": {"retention": RUNGS[0]}},
    }
    body = {
        "text": prompt.text,
        "image_data": [png_data_url(image) for image in prompt.images],
        "sampling_params": sampling,
    }
    last: dict[str, Any] = {}
    retracted = False
    for last in server.stream("/generate", body):
        if last["meta_info"]["completion_tokens"] >= n_said and not retracted:
            retracted = True
            assert server.request("POST", "/pause_generation", {"mode": "retract"}).ok
            assert server.request("POST", "/continue_generation", {}).ok
    return last


def test_alone_answers_are_those_of_stock(roomy: Server, stock_server: Server) -> None:
    roomy.flush_cache()
    packs = "sglang:aircache_packs_total"
    before = roomy.metrics().get(packs, 0)
    for prompt in prompts(11):
        mine, theirs = (ask(s, prompt, max_new_tokens=40) for s in (roomy, stock_server))
        assert mine["output_ids"] == theirs["output_ids"]
        steps = (answer["meta_info"]["output_token_logprobs"] for answer in (mine, theirs))
        assert max(abs(a[0] - b[0]) for a, b in zip(*steps, strict=True)) < 1e-5
        assert check_report(mine)["columns"] == 0
    assert roomy.metrics().get(packs, 0) == before


def test_what_fits_alone_stays_whole(roomy: Server) -> None:
    """Prompt and answer fill all but a few slots, fewer than the columns would take."""
    prompt = user_prompt(picture(31, 20, 20), "what do you see?" + words(3))
    n_prompt = ask(roomy, prompt, max_new_tokens=2)["meta_info"]["prompt_tokens"]
    roomy.flush_cache()
    answer = ask(roomy, prompt, max_new_tokens=590 - n_prompt)
    assert answer["meta_info"]["completion_tokens"] == 590 - n_prompt
    assert check_report(answer)["columns"] == 0


def test_one_picture_of_many_is_packed_when_all_who_hold_it_are(
    roomy: Server, oracle: Oracle
) -> None:
    """Whole it is shared: packing one of them wins nothing, packing all does."""
    roomy.flush_cache()
    image = picture(41, 16, 20)
    same = [user_prompt(image, f"what is {what}?") for what in ("here", "there", "above")]
    ask(roomy, same[0], max_new_tokens=2)
    others = [user_prompt(picture(42, 12, 12), "what do you see?")]
    lengths = [70, 70, 70, 60]
    answers = ask_at_once(roomy, [*same, *others], lengths)
    for prompt, answer in zip([*same, *others], answers, strict=True):
        check_report(answer)
        assert_agrees(oracle, prompt, answer)


def test_a_request_may_ask_for_either(roomy: Server, oracle: Oracle) -> None:
    prompt = prompts(51)[0]
    answer = ask(roomy, prompt, {"when": "prefill", "return_selection": True}, max_new_tokens=20)
    report = answer["meta_info"]["aircache"]
    assert (report["when"], report["rung"], report["packed_at"]) == ("prefill", 0, 1)
    assert report["retention"] == RUNGS[-1]
    assert_agrees(oracle, prompt, answer)


def test_the_dashboard_shows_what_happens(roomy: Server, tmp_path: Path) -> None:
    """Every panel of examples/monitoring has numbers in a real Prometheus that scrapes it."""
    dashboard = json.loads(DASHBOARD.read_text())
    # Nothing is retracted here, no picture comes back to a node that has lost it, no shadow runs.
    without = ("sglang:num_retracted_requests_total", "sglang:aircache_refilled_slots_total")
    without += ("sglang:aircache_shadow_", "sglang:aircache_guard_")
    missing = {each for each in panels(dashboard) if not any(name in each[1] for name in without)}
    with Prometheus(tmp_path, [roomy.url.removeprefix("http://")]) as prometheus:
        deadline = time.monotonic() + 240
        while missing:
            assert time.monotonic() < deadline, sorted(missing)
            ask_at_once(roomy, prompts(1), [50 + 7 * i for i in range(6)])
            missing = {each for each in missing if not prometheus.numbers(each[1])}
        for _, expression in panels(dashboard):
            prometheus.numbers(expression)  # asserts that it is no error
        [target] = prometheus.get("targets")["activeTargets"]
        assert target["health"] == "up", target
        rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
        assert [rule["health"] for rule in rules] == ["ok"] * len(rules)
        for label in ("instance", "model_name"):
            match = {"match[]": "sglang:num_running_reqs"}
            assert len(prometheus.get(f"label/{label}/values", **match)) == 1
    wait_idle(roomy)


BAD = {
    "when must be one of prefill, pressure": {"when": "never"},
    "unknown key 'rungs'": {"rungs": [0.5, 0.1]},
    "when pressure does not go with aircache.min_visual_mass 0.5": {"min_visual_mass": 0.5},
    "when pressure does not go with aircache.ablation merge above 0": {"ablation": {"merge": 0.5}},
}


@pytest.mark.parametrize("message", BAD)
def test_what_makes_no_sense_is_an_http_400(roomy: Server, message: str) -> None:
    body = {
        "text": "what is this?",
        "sampling_params": {"custom_params": {"aircache": BAD[message]}, "max_new_tokens": 2},
    }
    response = roomy.request("POST", "/generate", body)
    assert response.status_code == 400
    assert message in response.text


@pytest.fixture(scope="module")
def conversations(checkpoint: Path) -> Iterator[Server]:
    flags = [*COMPRESSING_FLAGS, "--enable-metrics", "--aircache-when", "pressure"]
    flags += ["--aircache-reuse", "compressed", "--max-total-tokens", "420"]
    flags += ["--context-length", "400", "--aircache-retention", "0.1"]
    with PreloadedServer(checkpoint, flags, env=STRICT_MEMORY_CHECKS) as server:
        yield server


def test_a_turn_leaves_what_it_was_decoded_from(conversations: Server) -> None:
    """Never packed it leaves exact KV; packed, a replica that the next turn extends."""
    image, question = picture(61, 12, 12), "what is on the left?"
    first = user_prompt(image, question)
    whole = ask(conversations, first, max_new_tokens=12)
    assert check_report(whole)["columns"] == 0
    again = user_prompt(image, question + words(4))
    answer = ask(conversations, again, max_new_tokens=12)
    # Of the exact prompt all up to the last picture is a hit.
    assert answer["meta_info"]["cached_tokens"] >= 144
    assert not answer["meta_info"]["aircache"]["reused"]

    conversations.flush_cache()
    other = user_prompt(picture(62, 12, 12), "what is on the right?")
    # The second fits once the first is packed.
    packed = ask_at_once(conversations, [first, other], [60, 60], return_selection=False)
    assert sum("packs" in answer["meta_info"]["aircache"] for answer in packed) >= 1
    for prompt, answer in zip((first, other), packed, strict=True):
        if "packs" not in answer["meta_info"]["aircache"]:
            continue
        turn = Prompt(prompt.text + answer["text"] + " and then?", prompt.images)
        following = ask(conversations, turn, max_new_tokens=8)["meta_info"]
        assert following["aircache"]["reused"]
        assert following["aircache"]["columns"] == 14


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["overlap", "no tree"])
def test_a_storm_under_pressure_leaves_no_slot_behind(checkpoint: Path, kind: str) -> None:
    """Aborts at every moment, packs for every cause, retractions where all are packed."""
    flags = [*HOPEFUL_FLAGS, "--chunked-prefill-size", "128", *MODES[kind]]
    flags += ["--load-snapshot-publish-interval", "1"]
    with PreloadedServer(checkpoint, flags, env=HOPEFUL) as server:
        jobs = make_jobs(4, 300, make_prompts(3, 36), longest=100)
        outcomes = Storm(server, concurrency=24).run(jobs, waves=3)
        assert_answered(outcomes)
        finished = [outcome for outcome in outcomes if outcome.finished]
        for outcome in finished:
            assert outcome.answer is not None
            meta = outcome.answer["meta_info"]
            assert meta["completion_tokens"] == outcome.job.max_new_tokens
            if meta["aircache"] is not None:
                assert meta["aircache"]["visual_tokens"] == outcome.job.prompt.n_visual
        wait_idle(server)
        metrics = settled_metrics(server, {"sglang:kv_used_tokens": 0})
        free = metrics["sglang:kv_available_tokens"] + metrics["sglang:kv_evictable_tokens"]
        assert free == POOL
        assert metrics["sglang:aircache_columns_held"] == 0
        text = server.request("GET", "/metrics").text
        for cause in ("decode", "admission", "low_water"):
            assert f'cause="{cause}"' in text, "this storm needs every cause"
        for line in text.splitlines():
            if line.startswith("sglang:aircache_requests_at_rung{"):
                assert float(line.split()[-1]) == 0, line
