# SPDX-License-Identifier: Apache-2.0
"""The Prometheus metrics of the contract, under SGLang's `--enable-metrics`."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from aircache_sglang.policy.registry import policy_names
from aircache_sglang.testing import Server
from tests.integration.storm import PICTURE, Prompt, visual_tokens

pytestmark = pytest.mark.server

PREFIX = "sglang:aircache_"
COUNTERS = ("requests_compressed", "visual_tokens", "slots_freed", "seconds")


def counters(server: Server) -> dict[str, float]:
    totals = server.metrics()
    return {name: totals.get(f"{PREFIX}{name}_total", 0.0) for name in COUNTERS}


def left_alone(server: Server) -> dict[str, float]:
    return {
        labels["reason"]: value
        for name, labels, value in server.metric_samples()
        if name == f"{PREFIX}requests_left_alone_total"
    }


def ask(server: Server, prompt: Prompt, n: int = 4) -> dict[str, Any]:
    meta: dict[str, Any] = server.post("/generate", prompt.body(n))["meta_info"]
    return meta


def test_what_a_compressed_request_adds(aircache_server: Server) -> None:
    before = counters(aircache_server)
    infos = [
        ask(aircache_server, Prompt(f"{PICTURE} what {seed}", (seed,), retention))["aircache"]
        for seed, retention in ((1, None), (3, 0.3), (5, 0.02))
    ]
    after = counters(aircache_server)
    added = {name: after[name] - before[name] for name in COUNTERS}
    assert added["requests_compressed"] == 3
    assert added["visual_tokens"] == sum(visual_tokens(seed) for seed in (1, 3, 5))
    assert added["slots_freed"] == sum(info["slots_freed"] for info in infos)
    assert 0 < added["seconds"] < 60


def test_columns_are_held_while_the_request_runs_and_no_longer(aircache_server: Server) -> None:
    held = f"{PREFIX}columns_held"
    prompt = Prompt(f"{PICTURE} say more", (5,), 0.25)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, aircache_server, prompt, 400)
        seen: set[float] = set()
        while not answer.done():
            seen.add(aircache_server.metrics().get(held, 0.0))
    columns = answer.result()["aircache"]["columns"]
    assert columns == round(0.25 * visual_tokens(5))
    assert seen <= {0.0, float(columns)}
    assert float(columns) in seen
    deadline = time.monotonic() + 10
    while aircache_server.metrics()[held] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert aircache_server.metrics()[held] == 0


@pytest.mark.parametrize(
    ("prompt", "n", "reason"),
    [
        (Prompt(f"{PICTURE} what", (0,), None), 4, "few_visual_tokens"),
        (Prompt(f"{PICTURE} what", (1,), 1.0), 4, "keeps_all"),
        (Prompt(f"{PICTURE} what", (1,), None), 1, "no_decode"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_why_a_request_was_left_alone(
    aircache_server: Server, prompt: Prompt, n: int, reason: str
) -> None:
    before, compressed = left_alone(aircache_server), counters(aircache_server)
    assert ask(aircache_server, prompt, n)["aircache"] is None
    after = left_alone(aircache_server)
    added = {name: value - before.get(name, 0.0) for name, value in after.items()}
    assert {name: value for name, value in added.items() if value} == {reason: 1.0}
    assert counters(aircache_server) == compressed


def test_text_is_not_counted(aircache_server: Server) -> None:
    before = (left_alone(aircache_server), counters(aircache_server))
    assert ask(aircache_server, Prompt("what is it", (), None))["aircache"] is None
    assert (left_alone(aircache_server), counters(aircache_server)) == before


def test_labels(aircache_server: Server) -> None:
    ask(aircache_server, Prompt(f"{PICTURE} what", (1,), None))
    samples = [s for s in aircache_server.metric_samples() if s[0].startswith(PREFIX)]
    names = {name for name, _, _ in samples}
    assert {f"{PREFIX}{name}_total" for name in COUNTERS} <= names
    assert f"{PREFIX}columns_held" in names
    for _, labels, _ in samples:
        # Of a server that others have asked, too, for other policies.
        assert labels["policy"] in policy_names()
        assert labels["model_name"] == aircache_server.model


def test_a_bad_override_counts_as_nothing(aircache_server: Server) -> None:
    before = (left_alone(aircache_server), counters(aircache_server))
    body = Prompt(f"{PICTURE} what", (1,), None).body(4)
    body["sampling_params"]["custom_params"] = {"aircache": {"retention": 7}}
    response = aircache_server.request("POST", "/generate", body)
    assert response.status_code == 400
    assert "aircache.retention must be a number with 0 < x <= 1, got 7" in response.text
    assert (left_alone(aircache_server), counters(aircache_server)) == before
