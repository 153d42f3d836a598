# SPDX-License-Identifier: Apache-2.0
"""Strength, skewness and whole budgets (eqs. 9 to 11): by hand, against the paper, and by law."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aircache_sglang.policy import (
    BUDGET_MODES,
    columns,
    head_mean_statistics,
    largest_remainder,
    layer_budgets,
    layer_budgets_from_statistics,
    layer_shares,
    skewness,
    strength,
)
from tests.unit.policy import reference

FROM_STATISTICS = tuple(budget for budget in BUDGET_MODES if budget != "global")
law = settings(deadline=None, derandomize=True, max_examples=150)


def scores(
    layers: int, heads: int, tokens: int, seed: int = 0, kind: str = "heavy", scale: float = 1.0
) -> Tensor:
    """Random importance: "heavy" has a few high scores a row, "ties" few distinct values."""
    generator = torch.Generator().manual_seed(seed)
    size = (layers, heads, tokens)
    if kind == "ties":
        return torch.randint(0, 3, size, generator=generator).float() * scale
    if kind == "zero":
        return torch.zeros(size)
    if kind == "equal":
        return torch.full(size, 0.1 * scale)
    value = torch.rand(size, generator=generator) ** 6
    if kind == "one layer":
        value[0] *= 1e9
    return value * scale


any_scores = st.builds(
    scores,
    layers=st.integers(1, 9),
    heads=st.integers(1, 3),
    tokens=st.one_of(st.integers(1, 4), st.integers(5, 70)),
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(["heavy", "ties", "zero", "equal", "one layer"]),
    scale=st.sampled_from([1.0, 1e-6, 1e-20]),
)
any_retention = st.floats(0.0, 1.0, exclude_min=True)


def test_statistics_by_hand() -> None:
    row = torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0])
    # deviations -3 -2 -1 0 6: variance 50 / 4, cubes 180, 180 / 12.5 ** 1.5 * 5 / 12 = 1.2 * sqrt 2
    value = torch.stack((row, row.flip(0), torch.full((5,), 7.0), -row))[:, None]
    assert strength(value).tolist() == [20.0, 20.0, 35.0, -20.0]
    torch.testing.assert_close(
        skewness(value), torch.tensor([1.2 * math.sqrt(2), 1.2 * math.sqrt(2), 0.0, 0.0])
    )
    # the mean over heads takes each head's negative skewness as 0
    torch.testing.assert_close(
        skewness(torch.stack((row, -row))[None]), torch.tensor([0.6 * math.sqrt(2)])
    )
    assert strength(torch.stack((row, 2 * row))[None]).tolist() == [30.0]


@pytest.mark.parametrize("tokens", [1, 2])
def test_skewness_of_few_tokens_is_zero(tokens: int) -> None:
    assert skewness(scores(3, 2, tokens)).tolist() == [0.0] * 3


@pytest.mark.parametrize("value", [0.1, 1e-6, 1e-30, 3.7e8, 0.0])
@pytest.mark.parametrize("tokens", [3, 7, 1000, 4097])
def test_skewness_of_equal_scores_is_exactly_zero(value: float, tokens: int) -> None:
    assert skewness(torch.full((2, 2, tokens), value)).tolist() == [0.0, 0.0]
    assert skewness(torch.full((1, 1, tokens), value, dtype=torch.float64)).tolist() == [0.0]
    # one step of float32 more in a single token is noise, not a head effect
    noisy = torch.full((1, 1, tokens), value)
    noisy[..., 1] = torch.nextafter(noisy[..., 1], torch.tensor(math.inf))
    if value > 0:
        assert skewness(noisy).tolist() == [0.0]


@pytest.mark.parametrize("shape", [(1, 1, 3), (4, 2, 5), (3, 4, 64), (2, 1, 501)])
@pytest.mark.parametrize("kind", ["heavy", "ties"])
def test_statistics_match_the_paper(shape: tuple[int, int, int], kind: str) -> None:
    value = scores(*shape, seed=sum(shape), kind=kind)
    nested = value.double().tolist()
    assert strength(value).dtype == skewness(value).dtype == torch.float32
    torch.testing.assert_close(strength(value), torch.tensor(reference.strength(nested)))
    torch.testing.assert_close(skewness(value), torch.tensor(reference.skewness(nested)))
    stats = head_mean_statistics(value)
    assert stats.dtype == torch.float64 and stats.shape == (2, shape[0])
    torch.testing.assert_close(stats[0].float(), strength(value))
    torch.testing.assert_close(stats[1].float(), skewness(value))


@law
@given(
    seed=st.integers(0, 1000), factor=st.sampled_from([1e-30, 1e-9, 3.0, 1e12]), shift=st.just(0.5)
)
def test_skewness_is_free_of_scale_and_shift(seed: int, factor: float, shift: float) -> None:
    value = scores(2, 2, 30, seed=seed).double()
    torch.testing.assert_close(skewness(value * factor), skewness(value), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(skewness(value + shift), skewness(value), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("retention", "n_visual", "wanted"),
    [
        (1.0, 7, 7),
        (1, 1, 1),
        (0.1, 100, 10),
        (0.1, 4763, 476),
        (0.01, 64, 1),
        (1e-9, 5, 1),
        (0.07, 100, 7),
        (0.1, 25, 2),  # a half goes to the even number
        (0.1, 35, 4),
        (0.9999, 3, 3),
    ],
)
def test_columns(retention: float, n_visual: int, wanted: int) -> None:
    assert columns(retention, n_visual) == wanted


@pytest.mark.parametrize("retention", [0, 0.0, -0.1, 1.0001, math.nan, math.inf, True, "0.1", None])
def test_bad_retention(retention: Any) -> None:
    with pytest.raises(ValueError, match=r"retention must be a number in \(0, 1\], got"):
        columns(retention, 10)
    with pytest.raises(ValueError, match="retention must be"):
        layer_budgets(scores(2, 1, 5), retention)


def test_shares_by_hand() -> None:
    stats = torch.tensor([[3.0, 1.0], [0.0, 4.0]])
    assert layer_shares(stats).tolist() == [0.75, 1.25]
    assert layer_shares(stats, budget="strength").tolist() == [1.5, 0.5]
    assert layer_shares(stats, budget="skewness").tolist() == [0.0, 2.0]
    assert layer_shares(stats, budget="uniform").tolist() == [1.0, 1.0]
    # no layer is skewed: skewness counts as 1 everywhere
    stats = torch.tensor([[3.0, 1.0], [0.0, 0.0]])
    assert layer_shares(stats).tolist() == [1.25, 0.75]
    for scale in (1e-320, 1e-300, 1e308):
        stats = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], dtype=torch.float64) * scale
        assert layer_shares(stats).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("shares", "total", "cap", "wanted"),
    [
        ([1.5, 0.5], 4, 10, [3, 1]),
        ([1.0, 1.0, 1.0], 7, 10, [3, 2, 2]),  # ties: the lower layer
        ([1.0, 1.0, 1.0], 8, 10, [3, 3, 2]),
        ([0.9, 1.0, 1.1], 4, 10, [1, 1, 2]),
        ([6.0, 1.0, 1.0], 16, 8, [8, 4, 4]),  # 12 would be due: 4 go to the others
        ([6.0, 2.0, 1.0], 17, 8, [8, 6, 3]),  # in proportion
        ([8.0, 4.0, 1.0], 18, 8, [8, 8, 2]),  # the second fills up by what the first gives
        ([10.0, 0.0, 0.0], 9, 20, [7, 1, 1]),  # the floor is taken from the rich layer
        ([10.0, 0.0, 0.0], 12, 6, [6, 3, 3]),  # all with a share are full: evenly
        ([0.0, 0.0], 5, 4, [3, 2]),
        ([0.3, 0.1 + 0.2], 3, 5, [2, 1]),  # a rounding error is a tie
        ([1.0, 1e-14, 0.0, 0.0], 12, 6, [6, 4, 1, 1]),
        ([1.0, 1e-14, 0.0, 0.0], 18, 6, [6, 6, 3, 3]),
        ([3e-200, 1e-200], 8, 10, [6, 2]),
        ([5.0], 3, 9, [3]),
        ([1.0, 9.0], 2, 5, [1, 1]),
        ([1.0, 9.0], 10, 5, [5, 5]),
        ([0.1, 9.0, 3.0], 3, 1, [1, 1, 1]),
    ],
)
def test_largest_remainder_by_hand(
    shares: list[float], total: int, cap: int, wanted: list[int]
) -> None:
    result = largest_remainder(torch.tensor(shares, dtype=torch.float64), total, cap)
    assert result.dtype == torch.int64
    assert result.tolist() == wanted
    assert reference.largest_remainder(shares, total, cap) == wanted


@law
@given(data=st.data())
def test_largest_remainder_matches_the_loops(data: st.DataObject) -> None:
    share = st.one_of(st.just(0.0), st.integers(1, 6).map(float), st.floats(1e-30, 1e3))
    shares = data.draw(st.lists(share, min_size=1, max_size=12))
    cap = data.draw(st.integers(1, 40))
    total = data.draw(st.integers(len(shares), len(shares) * cap))
    result = largest_remainder(torch.tensor(shares, dtype=torch.float64), total, cap).tolist()
    assert result == reference.largest_remainder(shares, total, cap)


@law
@given(data=st.data())
def test_a_larger_share_never_gets_less(data: st.DataObject) -> None:
    shares = data.draw(st.lists(st.integers(0, 1000), min_size=2, max_size=10))
    cap = data.draw(st.integers(1, 300))
    total = data.draw(st.integers(len(shares), len(shares) * cap))
    result = largest_remainder(torch.tensor(shares, dtype=torch.float64), total, cap).tolist()
    ranked = sorted(zip(shares, result, strict=True))
    for (a, n_a), (b, n_b) in itertools.pairwise(ranked):
        assert n_a <= n_b if a < b else abs(n_a - n_b) <= 1


@law
@given(value=any_scores, retention=any_retention, budget=st.sampled_from(BUDGET_MODES))
def test_budgets_add_up_within_bounds(value: Tensor, retention: float, budget: str) -> None:
    layers, _, tokens = value.shape
    m = columns(retention, tokens)
    result = layer_budgets(value, retention, budget=budget)
    assert result.dtype == torch.int64 and result.shape == (layers,)
    assert int(result.sum()) == layers * m
    assert all(1 <= count <= tokens for count in result.tolist())
    if budget == "uniform" or m == tokens:
        assert result.tolist() == [m] * layers
    if budget != "pyramid" and bool((value == value[:1]).all()):
        assert result.tolist() == [m] * layers


@law
@given(
    seed=st.integers(0, 10_000),
    shape=st.tuples(st.integers(1, 7), st.integers(1, 3), st.integers(3, 40)),
    retention=any_retention,
    budget=st.sampled_from(BUDGET_MODES),
)
def test_budgets_match_the_paper(
    seed: int, shape: tuple[int, int, int], retention: float, budget: str
) -> None:
    value = scores(*shape, seed=seed)
    wanted = reference.layer_budgets(value.double().tolist(), retention, budget)
    assert layer_budgets(value, retention, budget=budget).tolist() == wanted


@law
@given(value=any_scores, retention=any_retention)
def test_budgets_do_not_depend_on_scale(value: Tensor, retention: float) -> None:
    value = value.double()
    wanted = layer_budgets(value, retention).tolist()
    assert layer_budgets(value * 2.0**-40, retention).tolist() == wanted


@law
@given(seed=st.integers(0, 10_000), ranks=st.sampled_from([1, 2, 4, 8]), kind=st.just("heavy"))
def test_averaged_shards_equal_the_whole(seed: int, ranks: int, kind: str) -> None:
    value = scores(5, 8, 33, seed=seed, kind=kind)
    shards = [head_mean_statistics(part) for part in value.chunk(ranks, dim=1)]
    mean = torch.stack(shards).mean(dim=0)
    torch.testing.assert_close(mean, head_mean_statistics(value), rtol=1e-12, atol=1e-15)
    m = columns(0.2, 33)
    for budget in FROM_STATISTICS:
        assert torch.equal(
            layer_budgets_from_statistics(mean, 33, m, budget=budget),
            layer_budgets(value, 0.2, budget=budget),
        )


def test_many_layers_and_tokens_add_up() -> None:
    for seed in range(20):
        value = torch.rand(80, generator=torch.Generator().manual_seed(seed)).double() ** 9
        for cap, m in ((32_768, 328), (100_000, 99_999), (7, 3)):
            result = largest_remainder(value, 80 * m, cap)
            assert int(result.sum()) == 80 * m
            assert all(1 <= count <= cap for count in result.tolist())


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, -5.0, 1e308])
@pytest.mark.parametrize("budget", BUDGET_MODES)
def test_poisoned_statistics_still_fill_the_columns(poison: float, budget: str) -> None:
    stats = torch.rand(2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    stats = stats[: 1 if budget == "global" else 2]
    for hit in (stats.index_fill(1, torch.tensor([2]), poison), torch.full_like(stats, poison)):
        result = layer_budgets_from_statistics(hit, 20, 3, budget=budget)
        assert int(result.sum()) == 18
        assert all(1 <= count <= 20 for count in result.tolist())


def test_poisoned_statistics_count_as_nothing() -> None:
    for poison in (math.nan, math.inf, -math.inf, -5.0):
        stats = torch.tensor([[1.0, poison, 3.0], [2.0, 2.0, poison]])
        assert layer_shares(stats, budget="strength").tolist() == [0.75, 0.0, 2.25]
        assert layer_shares(stats, budget="skewness").tolist() == [1.5, 1.5, 0.0]


def test_bad_arguments() -> None:
    value = scores(2, 1, 5)
    with pytest.raises(ValueError, match=r"must have shape \[L, H_kv, N_v\], got \[1, 5\]"):
        layer_budgets(value[0], 0.5)
    with pytest.raises(ValueError, match=r"must have shape \[L, H_kv, N_v\], got \[2, 1, 0\]"):
        strength(value[..., :0])
    with pytest.raises(ValueError, match=r"statistics must have shape \[2, L\], got \[3, 4\]"):
        layer_budgets_from_statistics(torch.ones(3, 4), 5, 1)
    with pytest.raises(ValueError, match=r"budget must be one of aircache, .*, got 'pyramids'"):
        layer_budgets(value, 0.5, budget="pyramids")
    with pytest.raises(ValueError, match="m must be at most n_visual=5, got 6"):
        layer_budgets_from_statistics(torch.ones(2, 4), 5, 6)
    with pytest.raises(ValueError, match="n_visual must be an integer of at least 1, got 0"):
        columns(0.5, 0)
    for total in (1, 11):
        with pytest.raises(ValueError, match=f"total must be between L=2 .*=10, got {total}"):
            largest_remainder(torch.ones(2), total, 5)
