# SPDX-License-Identifier: Apache-2.0
"""Statistics (eqs. 9, 10) and integer budgets (eq. 11) against their oracles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from aircache_kernels import importance_statistics, layer_budgets, reference
from tests.unit.kernels.cases import prefix

# shrinking takes minutes in the interpreter
PHASES = (Phase.explicit, Phase.generate)
CPU_OR_CUDA = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def scores(n_layers: int, n_kv: int, sizes: list[int], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(n_layers, n_kv, sum(sizes), generator=generator)
    # layers differ in strength and in how few tokens carry it
    power = torch.linspace(0.5, 3.0, n_layers)[:, None, None]
    return (torch.exp(raw * power) * torch.rand(n_layers, 1, 1, generator=generator)).contiguous()


@pytest.mark.parametrize("sizes", [[1, 2, 3], [111, 63], [5000]])
def test_statistics(sizes: list[int], device: torch.device) -> None:
    importance = scores(3, 2, sizes).to(device)
    indptr = prefix(sizes, device)
    got = importance_statistics(importance, indptr, max_kv_len=max(sizes))
    torch.testing.assert_close(
        got, reference.statistics_reference(importance, indptr), rtol=1e-10, atol=1e-14
    )


def test_statistics_of_flat_and_left_skewed_heads(device: torch.device) -> None:
    importance = torch.zeros(3, 2, 10, device=device)
    importance[0] = 0.1  # all equal: the mean is not representable, the skewness is still 0
    importance[1, :, 1:] = 1.0  # negative skewness counts as 0
    importance[2, 0, 0] = 1.0  # one head counts, the other is all zero
    got = importance_statistics(importance, prefix([10], device), max_kv_len=10)[0]
    one_hot = torch.zeros(10, dtype=torch.float64)
    one_hot[0] = 1.0
    z = (one_hot - 0.1) / one_hot.std()
    skewness = float(10 / 72 * z.pow(3).sum())
    assert got[1].tolist() == pytest.approx([0.0, 0.0, skewness / 2], abs=1e-12)
    assert got[0].tolist() == pytest.approx([1.0, 9.0, 0.5], rel=1e-6)


def budgets_of(
    stats: torch.Tensor, sizes: list[int], columns: list[int], **options: str
) -> torch.Tensor:
    """Runs the kernel, checks the laws, and returns the budgets."""
    device = stats.device
    indptr = prefix(sizes, device)
    m = torch.tensor(columns, dtype=torch.int32, device=device)
    got, offsets = layer_budgets(stats, indptr, m, **options)
    n_layers = stats.shape[2]
    assert got.sum(1).tolist() == [n_layers * count for count in columns]
    assert (got >= 1).all()
    assert (got <= torch.tensor(sizes, device=device)[:, None]).all()
    assert (offsets[:, 0] == 0).all()
    assert torch.equal(offsets[:, 1:], got.cumsum(1).to(torch.int32))
    expected = reference.budgets_reference(stats, indptr, m, **options)
    assert torch.equal(got, expected), f"{got.tolist()} != {expected.tolist()}"
    return got


statistic = st.one_of(
    st.floats(0.0, 1.0), st.sampled_from([0.0, 1e-30, 1e30, float("nan"), float("inf"), -1.0])
)


@settings(max_examples=60, deadline=None, phases=PHASES)
@given(data=st.data())
def test_budget_laws(data: st.DataObject) -> None:
    n_layers = data.draw(st.integers(1, 33))
    batch = data.draw(st.integers(1, 3))
    sizes = [data.draw(st.integers(1, 3000)) for _ in range(batch)]
    columns = [data.draw(st.integers(1, size)) for size in sizes]
    values = data.draw(
        st.lists(statistic, min_size=batch * 2 * n_layers, max_size=batch * 2 * n_layers)
    )
    stats = torch.tensor(values, dtype=torch.float64, device=CPU_OR_CUDA)
    mode = data.draw(st.sampled_from(["aircache", "uniform", "strength", "skewness"]))
    budgets_of(stats.view(batch, 2, n_layers), sizes, columns, budget=mode)


def test_equal_layers_share_equally(device: torch.device) -> None:
    assert budgets_of(torch.ones(1, 2, 7).double().to(device), [50], [6]).tolist() == [[6] * 7]


def test_fraction_ties_go_to_the_lower_layer(device: torch.device) -> None:
    stats = torch.tensor([[[2.0, 1, 1, 2], [2, 1, 1, 2]]], dtype=torch.float64, device=device)
    # quotas 4/3, 2/3 -> floor 1: the two rich layers share 2 and get one each
    assert budgets_of(stats, [9], [1]).tolist() == [[1, 1, 1, 1]]
    # quotas 20/3 and 10/3: both fractions 2/3 of the rich layers win
    assert budgets_of(stats, [50], [5]).tolist() == [[7, 3, 3, 7]]
    three = torch.ones(1, 2, 3, dtype=torch.float64, device=device)
    three[:, :, 2] = 2.0
    # 6 columns: quotas 4.5, 4.5, 9 -> the first of the two tied halves wins
    assert budgets_of(three, [50], [6]).tolist() == [[5, 4, 9]]


def test_one_layer_takes_all_it_can(device: torch.device) -> None:
    stats = torch.zeros(1, 2, 4, dtype=torch.float64, device=device)
    stats[:, :, 2] = 1.0
    assert budgets_of(stats, [10], [5]).tolist() == [[4, 3, 10, 3]]
    assert budgets_of(stats, [100], [5]).tolist() == [[1, 1, 17, 1]]


@pytest.mark.parametrize("n_layers", [28, 80, 128])
def test_deep_models(n_layers: int, device: torch.device) -> None:
    stats = torch.rand(2, 2, n_layers, generator=torch.Generator().manual_seed(1)).double()
    budgets_of(stats.to(device), [131072, 40], [13107, 40])


def test_table_rows_are_written_and_no_others(device: torch.device) -> None:
    stats = torch.rand(2, 2, 5, generator=torch.Generator().manual_seed(2)).double().to(device)
    table = torch.full((6, 6), -7, dtype=torch.int32, device=device)
    rows = torch.tensor([4, 1], device=device)
    _, offsets = layer_budgets(
        stats,
        prefix([30, 20], device),
        torch.tensor([3, 9], dtype=torch.int32, device=device),
        cell_offset=table,
        req_pool_indices=rows,
    )
    assert torch.equal(table[rows], offsets)
    assert (table[[0, 2, 3, 5]] == -7).all()


def test_bad_arguments(device: torch.device) -> None:
    stats = torch.rand(1, 2, 5).double().to(device)
    indptr = prefix([9], device)
    m = torch.ones(1, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"statistics must have dtype torch\.float64"):
        layer_budgets(stats.float(), indptr, m)
    with pytest.raises(ValueError, match="given together"):
        layer_budgets(stats, indptr, m, req_pool_indices=torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="budget must be one of"):
        layer_budgets(stats, indptr, m, budget="greedy")
    with pytest.raises(ValueError, match=r"columns must have shape \[1\], got \[2\]"):
        layer_budgets(stats, indptr, m.repeat(2))
