# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters beside a policy: two of them and none, on one picture.

Each answer is that of a model with the adapter merged into its weights, under the mask of what the
answer says was kept: nothing that another adapter has computed may have been used.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from aircache_sglang.testing import Server
from aircache_sglang.testing.oracle import (
    LOGPROB_TOLERANCE,
    Oracle,
    assert_agrees,
    assert_policy_agrees,
)
from aircache_sglang.testing.prompts import Prompt, ask, picture, user_prompt, words
from tests.integration.conftest import COMPRESSING_FLAGS, STRICT_MEMORY_CHECKS
from tests.integration.storm import wait_idle
from tests.support.adapters import Under, make_adapter, merged
from tests.support.chats import cached, carried, compressed_chat, next_turn, question
from tests.support.preloaded import PreloadedServer

pytestmark = pytest.mark.server

ADAPTERS = (None, "one", "two")
# About four of the prompts below, whole.
POOL = 1000
ONE_PICTURE = user_prompt(picture(1, 12, 11), "what is above the small white house?")

Oracles = dict[str | None, Oracle]


@pytest.fixture(scope="module")
def adapters(
    checkpoint: Path, oracle: Oracle, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "one": make_adapter(folder / "one", oracle, seed=1, rank=4),
        "two": make_adapter(folder / "two", oracle, seed=2, rank=8, targets=("q_proj", "v_proj")),
    }


@pytest.fixture(scope="module")
def oracles(checkpoint: Path, oracle: Oracle, adapters: dict[str, Path]) -> Oracles:
    return {None: oracle, **{name: merged(checkpoint, path) for name, path in adapters.items()}}


@pytest.fixture(scope="module")
def server(checkpoint: Path, adapters: dict[str, Path]) -> Iterator[Server]:
    flags = [
        *(*COMPRESSING_FLAGS, "--max-total-tokens", str(POOL), "--context-length", "900"),
        *("--lora-paths", *(f"{name}={path}" for name, path in adapters.items())),
    ]
    with PreloadedServer(checkpoint, flags, env=STRICT_MEMORY_CHECKS) as server:
        yield server


@pytest.mark.parametrize("overrides", [{"retention": 1.0}, {}, {"policy": "none"}])
def test_each_answers_as_if_it_were_merged(
    server: Server, oracles: Oracles, overrides: dict[str, Any]
) -> None:
    """Twice in turn: computed by each alone, then from its own exact KV."""
    server.flush_cache()
    said, kept = {}, []
    for turn in range(2):
        for name in ADAPTERS:
            wanted = {"return_selection": True, **overrides}
            answer = ask(Under(server, name), ONE_PICTURE, wanted, max_new_tokens=12)
            trace = assert_agrees(oracles[name], ONE_PICTURE, answer)
            assert (cached(answer) > 132) == bool(turn), (name, cached(answer))
            report = answer["meta_info"]["aircache"]
            assert (report is None) == bool(overrides)
            if report is not None:
                assert_policy_agrees(trace, report)
                kept.append(report["selection"])
            assert said.setdefault(name, answer["output_ids"]) == answer["output_ids"]
    assert len({tuple(ids) for ids in said.values()}) == 3, "adapters that change nothing"
    if kept:
        assert kept[:3] == kept[3:] and kept[0] != kept[1] != kept[2]


def test_a_chat_of_each(server: Server, oracles: Oracles) -> None:
    """Follow-up turns extend the replica of their own adapter."""
    server.flush_cache()
    for name in ADAPTERS:
        asked: Any = Under(server, name)
        compressed_chat(asked, oracles[name], ONE_PICTURE, turns=3)


def test_a_chat_that_changes_its_adapter(server: Server, oracles: Oracles) -> None:
    """The turn before is no replica to another adapter: its picture is computed and packed anew."""
    server.flush_cache()
    wanted = {"reuse": "compressed", "return_selection": True}
    first: Any = question(Under(server, "one"), ONE_PICTURE, **wanted)  # type: ignore[arg-type]
    second = next_turn(ONE_PICTURE, first, 1)
    for name, reused in (("two", False), (None, False), ("one", True)):
        asked: Any = Under(server, name)
        answer = question(asked, second, **wanted)
        report = answer["meta_info"]["aircache"]
        assert report["reused"] == reused and (cached(answer) > 0) == reused
        if reused:
            selection = first["meta_info"]["aircache"]["selection"]
            error = carried(oracles[name], ONE_PICTURE, second, answer, selection)
            assert error < LOGPROB_TOLERANCE
        else:
            assert_agrees(oracles[name], second, answer)


def test_all_at_once_and_under_pressure(server: Server, oracles: Oracles) -> None:
    """In shared batches, packed after the prefill and when slots are short."""
    server.flush_cache()
    asked: list[tuple[str | None, Prompt, dict[str, Any]]] = []
    for place in range(9):
        prompt = user_prompt(picture(20 + place // 6, 12, 12), "what is this?" + words(place))
        when = "prefill" if place % 4 == 1 else "pressure"
        asked.append((ADAPTERS[place % 3], prompt, {"when": when, "return_selection": True}))
    with ThreadPoolExecutor(len(asked)) as threads:
        answers = list(
            threads.map(
                # Long enough that three of them speak at once on a slow machine, too.
                lambda one: ask(Under(server, one[0]), one[1], one[2], max_new_tokens=120),
                asked,
            )
        )
    for (name, prompt, _), answer in zip(asked, answers, strict=True):
        assert_agrees(oracles[name], prompt, answer)
    packed_at = [answer["meta_info"]["aircache"]["packed_at"] for answer in answers]
    assert max(at or 0 for at in packed_at) > 1, f"nobody was packed while it spoke: {packed_at}"
    wait_idle(server)
