# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode on different servers, over Mooncake and TCP: what travels, and what is said.

Mooncake listens on all interfaces, so all of it happens in a network of its own.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from aircache_sglang.platform import has_accelerator
from aircache_sglang.testing import Server, ServerError, png_data_url
from aircache_sglang.testing.network import own_network
from aircache_sglang.testing.oracle import Oracle, assert_agrees
from aircache_sglang.testing.pair import ENV, Pair, Unavailable, packages
from aircache_sglang.testing.prompts import (
    Prompt,
    ask,
    max_logprob_difference,
    picture,
    user_prompt,
    words,
)
from aircache_sglang.testing.router import Router
from aircache_sglang.testing.server import free_port
from tests.integration.storm import assert_equal_reports
from tests.support.preloaded import PreloadedServer

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(has_accelerator(), reason="SGLang would use the accelerator"),
]

STRICT = {
    # Seconds for which a server waits where the other one has given a request up.
    "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": "40",
    "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": "60",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}
FLAGS = (
    *("--device", "cpu", "--dtype", "float32", "--enable-cache-report", "--enable-metrics"),
    *("--kv-policy", "aircache", "--aircache-gate", "off"),
)
# Longer prompts are prefilled in parts. Both pools are small, so that a lost slot is missed.
PREFILL = ("--chunked-prefill-size", "96", "--max-total-tokens", "4000")
DECODE = ("--max-total-tokens", "2000", "--num-reserved-decode-tokens", "16")
BYTES_PER_SLOT = 4 * 2 * 2 * 16 * 4  # layers, K and V, KV heads, their size, float32
SHAPES = {
    "one picture": user_prompt(picture(1, 12, 11), "what is above the small white house?"),
    "three pictures": user_prompt(
        *("here is a garden:", picture(5, 8, 8), "here is a river", words(20), picture(6, 7, 9)),
        "and last the sea" + words(7),
        *(picture(7, 6, 11), "tell me what you see in the second picture."),
        system="you look at pictures and say what is in them.",
    ),
}
TEXT = user_prompt("hello, how are you" + words(110))


@pytest.fixture(scope="module")
def network() -> Iterator[None]:
    try:
        with own_network():
            yield
    except OSError as error:
        pytest.skip(f"a network namespace is not permitted here: {error}")


@pytest.fixture(scope="module")
def env(network: None) -> dict[str, str]:
    """Of all servers here: one template for all of them."""
    try:
        return {**ENV, **STRICT, "PYTHONPATH": str(packages())}
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def pair(checkpoint: Path, env: dict[str, str]) -> Iterator[Pair]:
    with Pair(
        checkpoint, FLAGS, prefill=PREFILL, decode=DECODE, env=env, server=PreloadedServer
    ) as servers:
        yield servers
        idle(servers)


@pytest.fixture(scope="module")
def single(checkpoint: Path, env: dict[str, str]) -> Iterator[Server]:
    """The same on one server."""
    flags = (*FLAGS, *PREFILL, "--disable-overlap-schedule")
    with PreloadedServer(checkpoint, flags, env=env) as server:
        yield server


def idle(pair: Pair) -> None:
    """Both pools are whole: SGLang counts them where nothing runs, and ends a server that errs."""
    for server in (pair.prefill, pair.decode):
        deadline = time.monotonic() + 60
        while server.request("POST", "/flush_cache").status_code != 200:
            assert time.monotonic() < deadline, server.log_tail()
            time.sleep(0.2)
        time.sleep(1)
        assert server.is_running(), server.log_tail()


def slots_of(pair: Pair, prompt: Prompt, overrides: dict[str, Any], **fields: Any) -> Any:
    """An answer, and the slots that its transfer took."""
    count = "sglang:kv_transfer_total_mb_count"
    before = pair.prefill.metrics()
    answer = ask(pair, prompt, overrides, **fields)
    deadline = time.monotonic() + 30
    while True:
        after = pair.prefill.metrics()
        if after.get(count, 0) > before.get(count, 0):
            break
        assert time.monotonic() < deadline, "no transfer was counted"
        time.sleep(0.05)
    name = "sglang:kv_transfer_total_mb_sum"
    sent = (after[name] - before.get(name, 0)) * 2**20
    return answer, round(sent / BYTES_PER_SLOT, 3)


@pytest.mark.parametrize("retention", [0.5, 0.1, 0.02])
@pytest.mark.parametrize("shape", SHAPES)
def test_survivors_alone_travel(
    pair: Pair, single: Server, oracle: Oracle, shape: str, retention: float
) -> None:
    """Text + m slots, and the logprobs of Transformers under the mask of what was kept."""
    prompt = SHAPES[shape]
    answer, sent = slots_of(pair, prompt, {"retention": retention}, max_new_tokens=16)
    report = answer["meta_info"]["aircache"]
    n_visual, m = report["visual_tokens"], max(1, round(retention * report["visual_tokens"]))
    assert report["columns"] == m and report["slots_freed"] == n_visual - m
    assert sent == answer["meta_info"]["prompt_tokens"] - n_visual + m
    assert_same(single, oracle, prompt, answer, retention)


def assert_same(
    single: Server, oracle: Oracle, prompt: Prompt, answer: Any, retention: float
) -> None:
    """An answer of a pair is that of one server, and of Transformers under the same mask."""
    overrides = {"retention": retention, "return_selection": True}
    same = ask(single, prompt, overrides, max_new_tokens=len(answer["output_ids"]))
    report, theirs = answer["meta_info"]["aircache"], same["meta_info"]["aircache"]
    selection = theirs.pop("selection")
    assert report == theirs and answer["output_ids"] == same["output_ids"]
    report["selection"] = selection
    assert_agrees(oracle, prompt, answer)


@pytest.mark.parametrize("overrides", [{"retention": 1.0}, {"policy": "none"}])
def test_a_whole_picture_is_stock(pair: Pair, single: Server, overrides: dict[str, Any]) -> None:
    prompt = SHAPES["one picture"]
    answer, sent = slots_of(pair, prompt, overrides, max_new_tokens=16)
    assert sent == answer["meta_info"]["prompt_tokens"]
    alone = ask(single, prompt, {"policy": "none"}, max_new_tokens=16)
    assert max_logprob_difference([alone], [answer]) < 1e-4


def test_text_alone(pair: Pair, single: Server) -> None:
    answer, sent = slots_of(pair, TEXT, {}, max_new_tokens=16)
    assert sent == answer["meta_info"]["prompt_tokens"]
    assert max_logprob_difference([ask(single, TEXT, {}, max_new_tokens=16)], [answer]) < 1e-4


@pytest.mark.parametrize("policy", ["snapkv", "h2o", "prefixkv"])
def test_other_policies(pair: Pair, single: Server, policy: str) -> None:
    prompt, overrides = SHAPES["three pictures"], {"policy": policy}
    answers = [ask(server, prompt, overrides, max_new_tokens=16) for server in (pair, single)]
    assert answers[0]["meta_info"]["aircache"] == answers[1]["meta_info"]["aircache"]
    assert answers[0]["output_ids"] == answers[1]["output_ids"]


def test_a_hit_on_the_prefill_side(pair: Pair) -> None:
    """A second question about one picture: little is computed, and as much is sent."""
    seen = picture(31, 12, 12)
    first = user_prompt("look:", seen, "what is this?")
    second = user_prompt("look:", seen, "who is this, and where?")
    fresh, sent = slots_of(pair, first, {}, max_new_tokens=4)
    hit, again = slots_of(pair, second, {}, max_new_tokens=4)
    assert hit["meta_info"]["cached_tokens"] > 144
    longer = hit["meta_info"]["prompt_tokens"] - fresh["meta_info"]["prompt_tokens"]
    assert again == sent + longer


@pytest.mark.parametrize(
    "overrides",
    [
        {"min_visual_mass": 0.9},
        {"return_selection": True},
        {"reuse": "compressed"},
        {"when": "pressure"},
        {"ablation": {"audience": "all"}},
    ],
    ids=lambda overrides: next(iter(overrides)),
)
def test_what_cannot_travel_is_refused(pair: Pair, overrides: dict[str, Any]) -> None:
    prompt = SHAPES["one picture"]
    for server in (pair.prefill, pair.decode):
        body = {
            "text": prompt.text,
            "sampling_params": {"custom_params": {"aircache": overrides}},
            **pair.at(),
        }
        refused = server.request("POST", "/generate", body)
        assert refused.status_code == 400, refused.text
        assert "needs one server for prefill and decode" in refused.text


def test_a_request_that_comes_back(pair: Pair, single: Server) -> None:
    """Answers that outgrow the decode server's pool: some are retracted, and none is changed."""
    prompts = [
        user_prompt(picture(50 + i, 10, 12), f"what is it?{words(20, i)}") for i in range(12)
    ]
    length = {"max_new_tokens": 240, "top_logprobs_num": 0}
    count = "sglang:aircache_requests_compressed_total"
    before = pair.decode.metrics().get(count, 0)
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: ask(pair, prompt, {}, **length), prompts))
    assert "Retract requests" in pair.decode.log()
    assert pair.decode.metrics()[count] == before + len(prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["meta_info"]["aircache"]["columns"] == 12
        alone = ask(single, prompt, {}, **length)
        assert answer["output_ids"] == alone["output_ids"]
    idle(pair)
    assert pair.decode.metrics()["sglang:aircache_columns_held"] == 0


def job(pair: Pair, number: int) -> tuple[Prompt, dict[str, Any], int, float | None]:
    """A prompt, its overrides, the length of its answer, and when it is broken off."""
    draw = random.Random(number)
    images = [
        picture(100 + draw.randrange(8), *draw.choice([(4, 4), (8, 8), (10, 12), (9, 15)]))
        for _ in range(draw.choice([0, 1, 1, 1, 2]))
    ]
    prompt = user_prompt("look" + words(draw.randrange(40), number), *images, "and say" + words(9))
    overrides = {"retention": draw.choice([0.02, 0.1, 0.5, 1.0])}
    broken_off = draw.choice([None, None, None, 0.02, 0.1, 0.3, 0.8])
    return prompt, overrides, draw.choice([1, 2, 16, 60]), broken_off


def run(pair: Pair, number: int) -> Any:
    """Its answer, or the error."""
    prompt, overrides, length, broken_off = job(pair, number)
    rid = f"storm-{number:03}"  # SGLang aborts all that begin with it
    timers = []
    if broken_off is not None:
        servers = [pair.prefill, pair.decode] if number % 8 else [pair.decode]
        timers = [threading.Timer(broken_off, abort, (server, rid)) for server in servers]
    for timer in timers:
        timer.start()
    try:
        return ask(pair, prompt, overrides, max_new_tokens=length, rid=rid)
    except ServerError as error:
        return str(error)
    finally:
        for timer in timers:
            timer.join()


def abort(server: Server, rid: str) -> None:
    with contextlib.suppress(requests.RequestException):  # it may have been stopped
        server.request("POST", "/abort_request", {"rid": rid})


def check(pair: Pair, single: Server, answers: list[Any], may_fail: set[int]) -> int:
    """How many have finished; the others were broken off or may fail."""
    finished = 0
    for number, answer in enumerate(answers):
        prompt, overrides, length, broken_off = job(pair, number)
        reason = {} if isinstance(answer, str) else answer["meta_info"]["finish_reason"]
        if isinstance(answer, str) or reason["type"] == "abort":
            assert broken_off is not None or number in may_fail, answer
            continue
        finished += 1
        if number % 4 == 0:
            alone = ask(single, prompt, overrides, max_new_tokens=length)
            assert answer["output_ids"] == alone["output_ids"][: len(answer["output_ids"])]
            assert_equal_reports(answer, alone)
    return finished


def test_a_storm(pair: Pair, single: Server) -> None:
    """Mixed requests, some broken off at either server: each ends with an answer or an error."""
    n_jobs = 80
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: run(pair, number), range(n_jobs)))
    idle(pair)
    assert check(pair, single, answers, set()) > n_jobs // 2


@pytest.mark.parametrize("n_jobs", [48, pytest.param(400, marks=pytest.mark.long)])
def test_a_prefill_server_that_is_started_again(
    pair: Pair, single: Server, checkpoint: Path, env: dict[str, str], n_jobs: int
) -> None:
    """In the middle of a storm: what was on its way fails in a sentence, and the rest goes on."""
    done: set[int] = set()

    def one(number: int) -> Any:
        answer = run(pair, number)
        done.add(number)
        return answer

    # Half of them meets a server that is gone, the other half the new one.
    half = n_jobs // 2
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(one, number) for number in range(half)]
        wait_until(lambda: len(done) >= half // 2)
        lost = {*range(half)} - done
        pair.prefill.terminate()
        flags = flags_of("prefill", pair.bootstrap_port)
        pair.prefill = PreloadedServer(checkpoint, flags, env=env)
        pair.prefill.start()
        answers = [future.result() for future in running]
        answers += pool.map(one, range(half, n_jobs))
    idle(pair)
    assert check(pair, single, answers, lost) > n_jobs // 3
    errors = {answer for answer in answers if isinstance(answer, str)}
    assert all(len(error) > 30 and "Traceback" not in error for error in errors), errors
    answer = ask(pair, SHAPES["one picture"], {}, max_new_tokens=4)
    assert answer["meta_info"]["aircache"]["columns"] == 13


def wait_until(what: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def flags_of(role: str, port: int) -> list[str]:
    """Of one server of a pair; port: its bootstrap port."""
    return [
        *(*FLAGS, "--disaggregation-transfer-backend", "mooncake_tcp"),
        *("--disaggregation-mode", role, "--disaggregation-bootstrap-port", str(port)),
        *(PREFILL if role == "prefill" else DECODE),
    ]


@contextlib.contextmanager
def replaced(pair: Pair, role: str, server: Server, port: int | None = None) -> Iterator[None]:
    """Within, another server has a role; port: its bootstrap port, if it prefills."""
    before = getattr(pair, role), pair.bootstrap_port
    setattr(pair, role, server)
    pair.bootstrap_port = pair.bootstrap_port if port is None else port
    try:
        yield
    finally:
        setattr(pair, role, before[0])
        pair.bootstrap_port = before[1]


@pytest.mark.slow
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_more_ranks_on_one_side(
    pair: Pair, single: Server, oracle: Oracle, checkpoint: Path, env: dict[str, str], role: str
) -> None:
    """Two ranks send to one, and one to two; each has one of the two KV heads."""
    port = free_port() if role == "prefill" else pair.bootstrap_port
    flags = [*flags_of(role, port), "--tp-size", "2"]
    with Server(checkpoint, flags, env=env) as server, replaced(pair, role, server, port):
        for prompt in SHAPES.values():
            for retention in (0.5, 0.1):
                answer = ask(pair, prompt, {"retention": retention}, max_new_tokens=16)
                assert answer["meta_info"]["aircache"]["columns"] > 0
                assert_same(single, oracle, prompt, answer, retention)
        whole = ask(pair, SHAPES["one picture"], {"retention": 1.0}, max_new_tokens=16)
        idle(pair)
    alone = ask(single, SHAPES["one picture"], {"policy": "none"}, max_new_tokens=16)
    assert max_logprob_difference([alone], [whole]) < 1e-4


@pytest.mark.parametrize("kind", ["router", "mini-lb"])
def test_through_a_router(pair: Pair, kind: str) -> None:
    """The decode server's report comes back; overrides go through `--mini-lb` alone."""
    prompt = SHAPES["one picture"]
    asked = {"retention": 0.25}
    taken = {} if kind == "router" else asked
    alone = ask(pair, prompt, taken, max_new_tokens=8)
    with Router(pair, ["--mini-lb"] if kind == "mini-lb" else []) as router:
        routed = ask(router, prompt, asked, max_new_tokens=8)
        assert routed["output_ids"] == alone["output_ids"]
        assert routed["meta_info"]["aircache"] == alone["meta_info"]["aircache"]
        body = {
            "text": prompt.text,
            "image_data": [png_data_url(prompt.images[0])],
            "sampling_params": {
                **{"max_new_tokens": 8, "temperature": 0.0, "ignore_eos": True},
                "custom_params": {"aircache": asked},
            },
        }
        *_, last = router.stream("/generate", body)
        assert last["meta_info"]["aircache"] == alone["meta_info"]["aircache"]
        freed = "sglang:aircache_slots_freed_total"
        before = pair.decode.metrics()[freed]
        fields = {"custom_params": {"aircache": asked}, "return_meta_info": True}
        chat = router.chat("what is this?", images=[picture(41, 12, 11)], **fields)["choices"][0]
        assert chat["message"]["content"]
        m = 13 if kind == "router" else 33
        assert pair.decode.metrics()[freed] == before + 132 - m
        assert ("meta_info" in chat) == (kind == "mini-lb")
    idle(pair)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            [*FLAGS, "--aircache-retention", "0.3"],
            "has retention 0.1 and this decode server 0.3; start both with the same",
        ),
        (
            [*FLAGS[:6], "--kv-policy", "none"],
            "the decode server has none, or other metadata; start both with the",
        ),
    ],
    ids=["retention", "no policy"],
)
def test_unequal_servers(
    pair: Pair, checkpoint: Path, env: dict[str, str], flags: list[str], sentence: str
) -> None:
    """A request fails with one sentence; both servers go on."""
    more = ["--disaggregation-transfer-backend", "mooncake_tcp", "--disaggregation-mode", "decode"]
    port = ["--disaggregation-bootstrap-port", str(pair.bootstrap_port)]
    prompt = SHAPES["one picture"]
    with PreloadedServer(checkpoint, [*flags, *more, *port, *DECODE], env=env) as other:
        with replaced(pair, "decode", other):
            for _ in range(2):
                with pytest.raises(RuntimeError, match=sentence):
                    ask(pair, prompt, None, max_new_tokens=4)
        assert other.is_running()
    assert ask(pair, prompt, {}, max_new_tokens=4)["meta_info"]["aircache"] is not None
    idle(pair)
