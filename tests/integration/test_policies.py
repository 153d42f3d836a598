# SPDX-License-Identifier: Apache-2.0
"""One server serves every policy, request by request; attention mass and what it promises."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from aircache_sglang import policy
from aircache_sglang.config import MASS_LADDER, AirCacheConfig
from aircache_sglang.platform import has_accelerator
from aircache_sglang.policy import policy_names
from aircache_sglang.runtime.choice import policy_of
from aircache_sglang.testing import Server, ServerError
from aircache_sglang.testing.oracle import (
    Oracle,
    assert_agrees,
    assert_keeps_the_best,
    policy_budgets,
    policy_states,
)
from aircache_sglang.testing.prompts import ask, picture, user_prompt, words

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(has_accelerator(), reason="SGLang would use the accelerator"),
]

PROMPT = user_prompt(
    *("here is a garden:", picture(21, 8, 9), "and here is the sea:", picture(22, 7, 8)),
    "which of the two is above the old bridge?" + words(20),
)
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"policy": name} for name in policy_names()},
    "snapkv last-16 unpooled": {
        "policy": "snapkv",
        "window": "last-16",
        "ablation": {"kernel": 1},
    },
    "visual window": {"window": "visual-32"},
    "pyramid": {"budget": "pyramid"},
    "eq. 11": {"budget": "aircache"},
    "half of it even": {"ablation": {"floor": 0.5}},
    "shared selection": {"ablation": {"selection": "shared"}},
    "text too": {"ablation": {"audience": "all"}},
    "text too, last-16": {"window": "last-16", "ablation": {"audience": "all"}},
    "h2o, text too": {"policy": "h2o", "ablation": {"audience": "all"}},
}


def asked(overrides: dict[str, Any]) -> dict[str, Any]:
    return {"retention": 0.15, "return_selection": True, **overrides}


@pytest.fixture(scope="module")
def answers(aircache_server: Server) -> dict[str, Any]:
    """All settings in one batch, on one picture."""
    aircache_server.flush_cache()
    ask(aircache_server, PROMPT, {"retention": 1}, max_new_tokens=1)  # what may be shared, is
    with ThreadPoolExecutor(len(SETTINGS)) as threads:
        found = threads.map(
            lambda overrides: ask(aircache_server, PROMPT, asked(overrides), max_new_tokens=4),
            SETTINGS.values(),
        )
        return dict(zip(SETTINGS, found, strict=True))


@pytest.mark.parametrize(
    "overrides",
    [
        {"ablation": {"rank": 2**31 - 1}},
        {"policy": "snapkv", "ablation": {"kernel": 2**16 - 1}},
        {"policy": "streaming", "ablation": {"sinks": 2**31 - 1}},
        {"policy": "random", "ablation": {"seed": 2**31 - 1}},
    ],
    ids=str,
)
def test_the_largest_numbers_serve(
    aircache_server: Server, oracle: Oracle, overrides: dict[str, Any]
) -> None:
    answer = ask(aircache_server, PROMPT, asked(overrides), max_new_tokens=4)
    assert_agrees(oracle, PROMPT, answer)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_policy_serves(answers: dict[str, Any], oracle: Oracle, name: str) -> None:
    answer, config = (
        answers[name],
        AirCacheConfig().with_overrides({"aircache": asked(SETTINGS[name])}),
    )
    report = answer["meta_info"]["aircache"]
    assert report["policy"] == config.policy
    trace = assert_agrees(oracle, PROMPT, answer)
    chosen = policy_of(config)
    states = policy_states(trace, visual_window=chosen.visual_window)
    if config.policy != "random":  # whose scores are drawn from SGLang's own padded prompt
        scores = chosen.score(states)
        mean = scores.mean(dim=1, keepdim=True).expand_as(scores)
        if chosen.shares_selection:
            scores = mean
        statistics = chosen.statistics(states, scores)
        budgets = policy_budgets(chosen, statistics, scores, report["columns"])
        if config.ablation.selection == "shared":
            scores = mean
        assert_keeps_the_best(report, scores, budgets.tolist())
    importance = policy.importance_batched(
        states.q_text, states.k_text, states.k_visual, unified=states.unified
    )
    shares = [
        float(row[kept].sum() / row.sum())
        for layer, heads in zip(importance, report["selection"], strict=True)
        for row, kept in zip(layer, heads, strict=True)
    ]
    assert report["visual_mass"] == pytest.approx(sum(shares) / len(shares), abs=1e-4)


def test_policies_differ(answers: dict[str, Any]) -> None:
    found = [answer["meta_info"]["aircache"]["selection"] for answer in answers.values()]
    assert all(one != other for i, one in enumerate(found) for other in found[:i])


def test_what_scores_visual_queries_computes_them_anew(answers: dict[str, Any]) -> None:
    cached = {name: answer["meta_info"]["cached_tokens"] for name, answer in answers.items()}
    n_visual = 8 * 9 + 7 * 8
    assert cached["h2o"] < cached["snapkv"] - n_visual, "none of the pictures"
    assert cached["h2o"] == cached["elastic"] == cached["prefixkv"]
    assert cached["visual window"] == cached["snapkv"] - 32
    assert cached["h2o, text too"] == 0, "nor the text before them"
    names = ("snapkv", "aircache", "mixkv", "random", "tgvkv", "vlcache", "text too")
    assert len({cached[name] for name in names}) == 1


def test_policy_none_leaves_a_request_alone(aircache_server: Server, oracle: Oracle) -> None:
    answer = ask(aircache_server, PROMPT, {"policy": "none"}, max_new_tokens=4)
    assert answer["meta_info"]["aircache"] is None
    assert_agrees(oracle, PROMPT, answer)


def test_a_promised_mass(aircache_server: Server, oracle: Oracle) -> None:
    """The smallest size that suffices, or the whole picture; slots are counted while it runs."""
    ladder = [
        ask(aircache_server, PROMPT, {"retention": r}, max_new_tokens=2)["meta_info"]["aircache"]
        for r in MASS_LADDER
    ]
    masses = [report["visual_mass"] for report in ladder]
    assert masses == sorted(masses) and masses[-1] < 0.99
    promises = [masses[0] / 2, (masses[1] + masses[2]) / 2, masses[4], 0.999]
    with ThreadPoolExecutor(len(promises)) as threads:
        found = list(
            threads.map(
                lambda mass: ask(
                    aircache_server,
                    PROMPT,
                    {"min_visual_mass": mass, "return_selection": True},
                    max_new_tokens=12,
                ),
                # a little less than what was reported, which is rounded
                [mass - 2e-6 for mass in promises],
            )
        )
    for rung, answer in zip((0, 2, 4, None), found, strict=True):
        assert_agrees(oracle, PROMPT, answer)
        report = answer["meta_info"]["aircache"]
        if rung is None:
            assert report is None
        else:
            assert {key: report[key] for key in ladder[rung]} == ladder[rung]
    aircache_server.flush_cache()
    assert aircache_server.is_running(), "the strict checks would have ended it"


def test_merged_keys_change_the_answer_and_not_the_selection(
    aircache_server: Server, oracle: Oracle
) -> None:
    dropped, *merged = (
        ask(aircache_server, PROMPT, asked({"policy": "elastic", "ablation": knobs}))
        for knobs in ({"merge": 0.0}, {"merge": 1.0}, {"merge": 1.0, "merge_by": "similar"})
    )
    assert_agrees(oracle, PROMPT, dropped)
    for answer in merged:
        assert answer["meta_info"]["aircache"] == dropped["meta_info"]["aircache"]
        with pytest.raises(AssertionError, match="logprobs differ"):
            assert_agrees(oracle, PROMPT, answer)
    first, second = (answer["meta_info"]["output_token_logprobs"] for answer in merged)
    assert first != second, "the nearest is not always the most similar"


def test_a_bad_policy_is_refused(aircache_server: Server) -> None:
    for overrides, message in (
        ({"policy": "snap"}, "aircache.policy must be one of none, aircache, elastic"),
        ({"policy": "snapkv", "budget": "strength"}, "aircache.budget is a knob of aircache"),
        ({"ablation": {"mege": 1}}, "aircache.ablation has the unknown key 'mege'"),
        ({"policy": "snapkv", "ablation": {"audience": "all"}}, "does not go with aircache.policy"),
    ):
        with pytest.raises(ServerError, match=rf"HTTP 400.*{message}"):
            ask(aircache_server, PROMPT, overrides)
