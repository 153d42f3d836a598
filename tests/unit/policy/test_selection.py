# SPDX-License-Identifier: Apache-2.0
"""Selection keeps the highest scores, in order, without repeats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aircache_sglang.policy import layer_budgets, select, select_padded
from tests.unit.policy import reference

law = settings(deadline=None, derandomize=True, max_examples=150)


def test_by_hand() -> None:
    value = torch.tensor([[[0.1, 0.5, 0.3, 0.5], [0.9, 0.0, 0.0, 0.0]], [[4.0, 3.0, 2.0, 1.0]] * 2])
    first, second = select(value, torch.tensor([3, 1]))
    assert first.dtype == second.dtype == torch.int64
    assert first.tolist() == [[1, 2, 3], [0, 1, 2]]  # of equal zeros the earlier ones stay
    assert second.tolist() == [[0], [0]]
    assert [kept.tolist() for kept in select(value, [1, 4])] == [[[1], [0]], [[0, 1, 2, 3]] * 2]


@law
@given(
    seed=st.integers(0, 10_000),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 60)),
    levels=st.sampled_from([1, 2, 5, 10_000]),
    data=st.data(),
)
def test_keeps_the_highest(
    seed: int, shape: tuple[int, int, int], levels: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    value = torch.randint(0, levels, shape, generator=generator).float() / levels
    layers, heads, tokens = shape
    count = st.integers(1, tokens)
    budgets = data.draw(st.lists(count, min_size=layers, max_size=layers))
    kept = select(value, torch.tensor(budgets))
    assert [layer.tolist() for layer in kept] == reference.select(value.tolist(), budgets)
    order = select_padded(value, torch.tensor(budgets))
    assert order.dtype == torch.int64 and order.shape == shape
    for l in range(layers):
        assert kept[l].shape == (heads, budgets[l])
        for h in range(heads):
            chosen = kept[l][h].tolist()
            assert chosen == sorted(set(chosen))
            assert sorted(order[l, h].tolist()) == list(range(tokens))
            assert set(order[l, h, : budgets[l]].tolist()) == set(chosen)
            dropped = [i for i in range(tokens) if i not in chosen]
            for i in dropped:
                assert value[l, h, i] <= value[l, h, chosen].min()
            ties = value[l, h] == value[l, h, chosen].min()
            tied = ties.nonzero().flatten().tolist()
            assert [i in chosen for i in tied] == sorted((i in chosen for i in tied), reverse=True)


def test_retention_one_keeps_all() -> None:
    value = torch.rand(4, 2, 11, generator=torch.Generator().manual_seed(0))
    for kept in select(value, layer_budgets(value, 1.0)):
        assert kept.tolist() == [list(range(11))] * 2


@pytest.mark.parametrize("count", [0, -1, 6])
def test_bad_count(count: int) -> None:
    with pytest.raises(ValueError, match=rf"budgets\[1\] must be .* N_v=5, got {count}"):
        select(torch.rand(2, 1, 5), torch.tensor([5, count]))


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ([1], r"budgets must have shape \[2\], got \[1\]"),
        ([[1, 1]], r"budgets must have shape \[2\], got \[1, 2\]"),
        ([1.0, 1.0], "budgets must be an integer tensor, got torch.float32"),
        ([True, True], "budgets must be an integer tensor, got torch.bool"),
    ],
)
def test_bad_budgets(budgets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(torch.rand(2, 1, 5), budgets)


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="importance must not hold NaN"):
        select(torch.full((1, 1, 3), torch.nan), [1])
