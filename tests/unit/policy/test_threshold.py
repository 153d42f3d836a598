# SPDX-License-Identifier: Apache-2.0
"""Budgets from one threshold: against a sorted list, under ties, over rungs and over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aircache_sglang.policy import (
    BUDGET_MODES,
    columns,
    get_policy,
    global_counts,
    layer_budgets,
    layer_budgets_from_statistics,
    select_padded,
)
from aircache_sglang.policy.threshold import ordered_keys
from aircache_sglang.runtime.rungs import nested
from tests.unit.policy import reference
from tests.unit.policy.test_budget import any_retention, any_scores, scores

law = settings(deadline=None, derandomize=True, max_examples=150)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


def budgets(value: Tensor, m: int) -> list[int]:
    n_layers, n_kv, n_visual = value.shape
    counts = global_counts(value, n_layers * n_kv * m)[None]
    found = layer_budgets_from_statistics(counts, n_visual, m, budget="global")
    return [int(count) for count in found]


def test_by_hand() -> None:
    value = torch.tensor([[[9.0, 8, 1, 0], [7, 6, 1, 0]], [[5, 4, 1, 0], [3, 2, 1, 0]]])
    assert global_counts(value, 4).tolist() == [4, 0]
    assert budgets(value, 1) == [1, 1], "a layer keeps one cell"
    assert global_counts(value, 5).tolist() == [4, 1]
    assert budgets(value, 2) == [2, 2] and budgets(value, 4) == [4, 4]
    # four scores of 1, of which two are left: one of each layer
    assert global_counts(value, 10).tolist() == [5, 5]
    rich = torch.tensor([[[9.0, 8, 7, 6, 5]], [[4, 3, 1, 1, 1]], [[2, 1, 1, 1, 1]]])
    assert global_counts(rich, 6).tolist() == [5, 1, 0]
    assert budgets(rich, 2) == [4, 1, 1], "the floor is taken from the rich layer"
    # the lowest counted are seven of 1, of which one is left
    assert global_counts(rich, 9).tolist() == [5, 2 + 3 / 7, 1 + 4 / 7]
    assert budgets(rich, 3) == [5, 2, 2], "the larger remainder"


@law
@given(value=any_scores, retention=any_retention, dtype=dtypes)
def test_counts_are_those_of_a_sorted_list(
    value: Tensor, retention: float, dtype: torch.dtype
) -> None:
    value = value.to(dtype)
    n_layers, n_kv, n_visual = value.shape
    m = columns(retention, n_visual)
    found = global_counts(value, n_layers * n_kv * m)
    wanted = reference.global_counts(value.double().tolist(), m)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([float(count) for count in wanted], rel=1e-14, abs=0)
    assert sum(wanted, Fraction()) == n_layers * n_kv * m
    assert budgets(value, m) == reference.global_budgets(value.double().tolist(), m)


@law
@given(seed=st.integers(0, 10_000), cells=st.integers(1, 3 * 2 * 17))
def test_any_number_of_cells(seed: int, cells: int) -> None:
    value = scores(3, 2, 17, seed=seed)
    first = value.flatten().argsort(descending=True, stable=True)[:cells]
    wanted = torch.bincount(first // (2 * 17), minlength=3)
    assert global_counts(value, cells).tolist() == wanted.tolist()


@law
@given(value=any_scores, data=st.data())
def test_budgets_are_nested_but_for_rounding(value: Tensor, data: st.DataObject) -> None:
    """What counts at a smaller size counts at a larger one, so that the rungs ask for little."""
    n_layers, n_kv, n_visual = value.shape
    more = data.draw(st.integers(1, n_visual))
    fewer = data.draw(st.integers(1, more))
    small, large = (global_counts(value, n_layers * n_kv * m) for m in (fewer, more))
    assert (small <= large + 1e-9).all()
    wanted, above = (torch.tensor(budgets(value, m)) for m in (fewer, more))
    found = nested(wanted, above)
    assert (found <= above).all() and int(found.sum()) == n_layers * fewer


@law
@given(value=any_scores, retention=any_retention)
def test_the_threshold_carries_the_most(value: Tensor, retention: float) -> None:
    """No budgets hold more than the highest scores of the request; these equal it where they do."""
    value = value.double()
    n_layers, n_kv, n_visual = value.shape
    m = columns(retention, n_visual)
    bound = float(value.flatten().sort(descending=True).values[: n_layers * n_kv * m].sum())
    for budget in BUDGET_MODES:
        n = layer_budgets(value, retention, budget=budget)
        ranked = value.gather(2, select_padded(value, n))
        kept = torch.arange(n_visual) < n[:, None, None]
        assert float(ranked[kept.expand_as(ranked)].sum()) <= bound * (1 + 1e-12)
    counts = global_counts(value, n_layers * n_kv * m)
    if n_kv == 1 and bool((counts == counts.round()).all()) and bool((counts >= 1).all()):
        n = layer_budgets(value, retention, budget="global")
        ranked = value.gather(2, select_padded(value, n))
        kept = torch.arange(n_visual) < n[:, None, None]
        assert float(ranked[kept].sum()) == pytest.approx(bound, rel=1e-12)


def test_keys_rise_with_the_scores() -> None:
    for dtype, bits in ((torch.float32, 32), (torch.float64, 64)):
        tiny = torch.finfo(dtype).tiny
        rising = [-math.inf, -3.0, -tiny, 0.0, tiny / 4, tiny, 0.5, 1.0, 3e38, math.inf]
        keys = [key % 2**bits for key in ordered_keys(torch.tensor(rising, dtype=dtype)).tolist()]
        assert keys == sorted(set(keys))
        for pair in ([0.0, -0.0], [math.nan, -math.inf], [-math.nan, math.nan]):
            one, other = ordered_keys(torch.tensor(pair, dtype=dtype)).tolist()
            assert one == other


def test_poisoned_scores_still_fill_the_columns() -> None:
    for poison in (math.nan, math.inf, -math.inf):
        for hit in (
            scores(3, 2, 9).index_fill(0, torch.tensor([1]), poison),
            torch.full((3, 2, 9), poison),
        ):
            assert sum(budgets(hit, 4)) == 12


class Group:
    """Ranks that run one after the other and share the sums that one device would have found."""

    def __init__(self, value: Tensor, cells: int) -> None:
        self.whole: list[Tensor] = []
        self.parts: list[list[Tensor]] = []
        self.counts = global_counts(value, cells, self.recorded(self.whole))

    @staticmethod
    def recorded(into: list[Tensor]) -> Callable[[Tensor], Tensor]:
        def total(found: Tensor) -> Tensor:
            into.append(found.clone())
            return found

        return total

    def rank(self, part: Tensor, cells: int) -> Tensor:
        mine: list[Tensor] = []
        self.parts.append(mine)

        def total(found: Tensor) -> Tensor:
            mine.append(found.clone())
            return self.whole[len(mine) - 1].clone()

        return global_counts(part, cells, total)


@law
@given(
    seed=st.integers(0, 10_000),
    ranks=st.sampled_from([2, 3, 6]),
    m=st.integers(1, 33),
    kind=st.sampled_from(["heavy", "ties"]),
)
def test_ranks_count_what_one_device_counts(seed: int, ranks: int, m: int, kind: str) -> None:
    value = scores(5, 6, 33, seed=seed, kind=kind)
    group = Group(value, 5 * 6 * m)
    for part in value.chunk(ranks, dim=1):
        assert torch.equal(group.rank(part, 5 * 6 * m), group.counts)
    for step, whole in enumerate(group.whole):
        assert torch.equal(torch.stack([part[step] for part in group.parts]).sum(0), whole)


def test_replicated_heads_change_no_budget() -> None:
    value = scores(4, 2, 31, kind="ties")
    twice = global_counts(value, 2 * 4 * 2 * 5, lambda counts: 2 * counts)
    once = global_counts(value, 4 * 2 * 5)
    assert torch.equal(twice, 2 * once)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="cells must be an integer of at least 1, got 0"):
        global_counts(scores(2, 1, 5), 0)
    with pytest.raises(ValueError, match=r"scores must have shape \[L, H_kv, N_v\], got \[1, 5\]"):
        global_counts(scores(2, 1, 5)[0], 1)
    with pytest.raises(ValueError, match=r"statistics must have shape \[1, L\], got \[2, 4\]"):
        layer_budgets_from_statistics(torch.ones(2, 4), 5, 1, budget="global")


@pytest.mark.parametrize("m", [4, 10, 40])
def test_an_even_share_stands_under_the_threshold(m: int) -> None:
    """Counts of a layer that holds all the highest scores: what is left to the others."""
    n_layers, n_kv, n_visual = 4, 2, 200
    scores = torch.rand((n_layers, n_kv, n_visual), generator=torch.Generator().manual_seed(m))
    scores[2] += 1
    counts = global_counts(scores, n_layers * n_kv * m)[None]
    for floor in (0.0, 0.25, 0.5, 1.0):
        policy = get_policy("aircache", budget="global", floor=floor)
        found = policy.budgets(counts, n_visual, m).tolist()
        left = max(1, round(floor * m))
        # Rounding moves a cell at most.
        assert all(abs(n - left) <= 1 for i, n in enumerate(found) if i != 2), (floor, found)
        assert sum(found) == n_layers * m


def test_an_even_share_of_other_budgets_is_refused() -> None:
    with pytest.raises(ValueError, match="floor is of budget global, got budget aircache"):
        get_policy("aircache", floor=0.5)
    with pytest.raises(ValueError, match="floor must be a number"):
        get_policy("aircache", budget="global", floor=2)
