# SPDX-License-Identifier: Apache-2.0
"""Comparisons of distributions, their sums, their intervals, and the guard."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from aircache_sglang.runtime.agreement import Comparison, Tally, kl_bound, wilson
from aircache_sglang.runtime.guard import LOOK, MOST_PATIENCE, WINDOW, Guard


def logs(weights: dict[int, float]) -> dict[int, float]:
    return {token: math.log(weight) for token, weight in weights.items()}


def one(tokens: int, differing: int, kl: float = 0.0) -> Comparison:
    return Comparison(tokens, differing, kl, 0 if differing else None)


def test_the_divergence_of_whole_distributions_is_exact() -> None:
    p, q = {1: 0.5, 2: 0.3, 3: 0.2}, {1: 0.25, 2: 0.25, 3: 0.5}
    expected = sum(p[t] * math.log(p[t] / q[t]) for t in p)
    assert kl_bound(logs(p), logs(q)) == pytest.approx(expected)
    assert kl_bound(logs(p), logs(p)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_the_divergence_of_top_lists_is_a_lower_bound(seed: int) -> None:
    rng = random.Random(seed)
    weights = [[rng.random() ** 6 + 1e-9 for _ in range(50)] for _ in range(2)]
    p, q = ({t: w / sum(ws) for t, w in enumerate(ws)} for ws in weights)
    whole = sum(p[t] * math.log(p[t] / q[t]) for t in p)
    last = 0.0
    for k in (1, 5, 20, 50):
        tops = [dict(sorted(d.items(), key=lambda i: -i[1])[:k]) for d in (p, q)]
        bound = kl_bound(*map(logs, tops))
        assert 0 <= bound <= whole + 1e-9
        last = bound
    assert last == pytest.approx(whole)


def test_lists_without_a_common_token_bound_nothing() -> None:
    assert kl_bound(logs({1: 0.9}), logs({2: 0.9})) == 0
    # A rest that rounding has made empty is no infinity.
    assert math.isfinite(kl_bound(logs({1: 0.5}), {1: 0.0}))


def test_a_comparison_counts_other_arg_maxima() -> None:
    same, other = logs({7: 0.8, 8: 0.1}), logs({8: 0.6, 7: 0.3})
    found, bounds = Comparison.of([same, same, same], [same, other, other], [1, 4, 5])
    assert (found.tokens, found.differing, found.first) == (3, 2, 4)
    assert found.kl == pytest.approx(sum(bounds)) and bounds[0] == 0 < bounds[1]


def test_wilson_is_that_of_the_textbook() -> None:
    """Newcombe 1998, table I: 81 of 263 and 0 of 20."""
    assert wilson(81 / 263, 263, 1.959964) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0.0, 20, 1.959964) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(0.0, 0, 1.96) == (0.0, 1.0)


def test_tokens_of_one_request_are_not_independent() -> None:
    spread, clustered = Tally(), Tally()
    for i in range(100):
        spread.add(one(10, 1))
        clustered.add(one(10, 10 if i < 10 else 0))
    for tally in (spread, clustered):
        assert tally.differing()[0] == pytest.approx(0.1)
    _, low, high = clustered.differing()
    # As 100 coins, not as 1,000.
    assert (low, high) == pytest.approx(wilson(0.1, 99, 1.959964), abs=1e-4)
    none = Tally()
    for _ in range(50):
        none.add(one(10, 0))
    assert none.differing()[1:] == pytest.approx(wilson(0.0, 50, 1.959964), abs=1e-6)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.2])
def test_the_interval_holds_the_truth(share: float) -> None:
    """In 95 of 100 samples, a little less where few differ; requests differ in kind."""
    rng, held = random.Random(5), 0
    for _ in range(300):
        tally = Tally()
        for _ in range(150):
            tokens = rng.choice((3, 8, 20))
            bad = rng.random() < 0.25
            tally.add(one(tokens, sum(rng.random() < 4 * share * bad for _ in range(tokens))))
        _, low, high = tally.differing()
        held += low <= share <= high
    assert held / 300 > 0.9


def test_mean_kl_has_an_interval_over_requests() -> None:
    tally = Tally()
    tally.add(one(4, 0, 0.4))
    assert tally.mean_kl() == (pytest.approx(0.1), 0.0, math.inf)
    for _ in range(49):
        tally.add(one(4, 0, 0.4))
    assert tally.mean_kl() == pytest.approx((0.1, 0.1, 0.1))
    tally.add(one(4, 0, 40.0))
    mean, low, high = tally.mean_kl()
    assert low < mean < high


def test_tallies_add_up() -> None:
    left, right, both = Tally(), Tally(), Tally()
    for i in range(9):
        for tally in (left if i % 2 else right, both):
            tally.add(one(i + 1, i % 3, 0.1 * i))
    parts = [dataclasses.asdict(tally) for tally in (left, right)]
    total = dataclasses.asdict(Tally.total(parts))
    assert total == pytest.approx(dataclasses.asdict(both))


def moves(guard: Guard, differing: int, requests: int, tokens: int = 10) -> list[str]:
    found = (guard.compared(one(tokens, differing)) for _ in range(requests))
    return [move for move in found if move is not None]


def test_the_guard_raises_to_the_top_and_no_further() -> None:
    guard = Guard(0.02, 0.1)
    assert moves(guard, 5, LOOK - 1) == []
    assert moves(guard, 5, 1) == ["raised"] and guard.retention == 0.2
    assert moves(guard, 5, 2 * LOOK) == ["raised", "raised"] and guard.retention == 1.0
    assert moves(guard, 5, 5 * WINDOW) == [] and guard.raised == 3


def test_the_guard_begins_at_the_servers_own_retention() -> None:
    assert Guard(0.02, 0.3).retention == 0.3
    guard = Guard(0.02, 0.3)
    moves(guard, 5, LOOK)
    assert guard.retention == 0.5


def test_few_differences_move_nothing() -> None:
    rng, guard = random.Random(1), Guard(0.05, 0.1)
    for _ in range(20 * WINDOW):
        assert guard.compared(one(10, int(rng.random() < 0.3))) is None
    assert guard.retention == 0.1


def test_the_bound_itself_raises_seldom() -> None:
    """The share of windows that raise where the truth is the bound is at most one in twenty."""
    rng, raised = random.Random(2), 0
    for _ in range(400):
        guard = Guard(0.1, 0.1)
        for _ in range(WINDOW):
            raised += (
                guard.compared(one(10, sum(rng.random() < 0.1 for _ in range(10)))) is not None
            )
            if guard.raised:
                break
    assert raised / 400 < 0.07


def test_a_lower_rung_is_tried_less_and_less_often() -> None:
    """At 0.1 all differ, at 0.2 none: each trial fails, and the next waits twice as long."""
    guard, waits, since = Guard(0.02, 0.1), [], 0
    for _ in range(60_000):
        before = guard.retention
        bad = before == 0.1
        guard.compared(one(10, 10 if bad else 0))
        since += not bad
        if guard.retention < before:
            waits.append(since)
            since = 0
    patience = [wait / WINDOW for wait in waits]
    assert patience[:7] == [1, 2, 4, 8, 16, 32, MOST_PATIENCE]


def test_a_trial_that_holds_goes_on_down() -> None:
    guard = Guard(0.02, 0.1)
    moves(guard, 5, 2 * LOOK)
    assert guard.retention == 0.5
    assert moves(guard, 0, WINDOW) == ["lowered"] and guard.retention == 0.2
    assert moves(guard, 0, WINDOW) == ["lowered"] and guard.retention == 0.1
    assert moves(guard, 0, 3 * WINDOW) == [] and (guard.raised, guard.lowered) == (2, 2)


def test_at_retention_1_the_guard_counts_what_it_leaves_whole() -> None:
    guard = Guard(0.02, 0.5)
    moves(guard, 5, LOOK)
    assert guard.retention == 1.0
    assert [guard.left_whole() for _ in range(WINDOW - 1)] == [None] * (WINDOW - 1)
    assert guard.left_whole() == "lowered" and guard.retention == 0.5


def test_an_open_question_lowers_nothing() -> None:
    """Under the bound, but not with confidence."""
    guard = Guard(0.02, 0.1)
    moves(guard, 5, LOOK)
    for _ in range(4 * WINDOW):
        assert guard.compared(one(1, 0)) is None or guard.retention == 0.1
    guard = Guard(0.01, 0.1)
    moves(guard, 5, LOOK)
    assert moves(guard, 0, 4 * WINDOW) == [], "200 requests bound a share by 0.0133 at best"
