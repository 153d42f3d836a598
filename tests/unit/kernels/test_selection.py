# SPDX-License-Identifier: Apache-2.0
"""`select` against a stable sort: exactly, ties included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from aircache_kernels import reference, select
from tests.unit.kernels.cases import poisoned, prefix

# shrinking takes minutes in the interpreter
PHASES = (Phase.explicit, Phase.generate)
CPU_OR_CUDA = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def hold(importance: torch.Tensor, sizes: list[int], budgets: list[list[int]]) -> torch.Tensor:
    device = importance.device
    n_layers, n_kv, _ = importance.shape
    columns = [sum(row) // n_layers for row in budgets]
    assert all(sum(row) == n_layers * m for row, m in zip(budgets, columns, strict=True))
    counts = torch.tensor(budgets, dtype=torch.int32, device=device)
    offsets = torch.stack([prefix(row, device) for row in budgets])
    indptr = prefix(sizes, device)
    mass = poisoned((len(sizes), n_layers, n_kv), torch.float64, device)
    got = select(
        importance,
        indptr,
        offsets,
        prefix(columns, device),
        total_columns=sum(columns),
        max_kv_len=max(sizes),
        mass=mass,
    )
    assert torch.equal(got, reference.select_reference(importance, indptr, counts))
    # NaN where an infinite score is
    assert ((mass >= 0.0) & (mass <= 1.0) | mass.isnan()).all()
    return got


def random_scores(shape: tuple[int, ...], device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def test_uneven_requests(device: torch.device) -> None:
    # n_l = 1, n_l = N_v, one request that keeps everything, odd sizes
    hold(
        random_scores((3, 2, 63 + 5 + 111), device),
        [63, 5, 111],
        [[1, 63, 26], [5, 5, 5], [110, 1, 111]],
    )


def test_a_layer_without_cells(device: torch.device) -> None:
    """n_l = 0 keeps nothing."""
    got = hold(random_scores((3, 2, 30 + 4), device), [30, 4], [[0, 30, 6], [4, 0, 2]])
    assert got.shape == (2, 42)


def test_mass(device: torch.device) -> None:
    """What the kept tokens carry, of the scores or of other weights; all of nothing is 1."""
    importance, weights = random_scores((3, 2, 27), device), random_scores((3, 2, 27), device, 5)
    weights[2] = 0.0
    counts = torch.tensor([[0, 20, 4], [3, 1, 2]], dtype=torch.int32, device=device)
    indptr = prefix([20, 7], device)
    offsets = torch.stack([prefix(row, device) for row in counts.tolist()])
    for other, carried in ((None, importance), (weights, weights)):
        mass = poisoned((2, 3, 2), torch.float64, device)
        got = select(
            importance, indptr, offsets, prefix([8, 2], device),
            total_columns=10, max_kv_len=20, weights=other, mass=mass,
        )  # fmt: skip
        want = reference.mass_reference(carried, indptr, got, counts)
        # float64 sums in another order
        torch.testing.assert_close(mass, want, rtol=1e-12, atol=0.0)
    assert (mass[:, 2] == 1.0).all() and (mass[0, :2, 0] == want[0, :2, 0]).all()


def test_all_equal_keeps_the_earliest(device: torch.device) -> None:
    got = hold(torch.full((2, 3, 100), 0.25, device=device), [100], [[7, 33]])
    assert got[0].tolist() == [*range(7), *range(33)]


def test_ties_across_blocks_and_special_values(device: torch.device) -> None:
    importance = random_scores((2, 2, 5000), device, 1).mul(8).floor()
    importance[0, 0, ::3] = 0.0
    importance[0, 0, 1::3] = -0.0
    importance[1, 1, ::7] = 1e-42  # a denormal is more than 0
    importance[1, 0, 5] = float("inf")
    importance[0, 1, ::2] *= -1.0
    hold(importance, [5000], [[3001, 1999]])


def test_nan_is_lowest(device: torch.device) -> None:
    importance = torch.tensor([[[float("nan"), 0.0, 1.0, float("nan")]]], device=device)
    got = select(
        importance,
        prefix([4], device),
        torch.stack([prefix([2], device)]),
        prefix([2], device),
        total_columns=2,
        max_kv_len=4,
    )
    assert got.tolist() == [[1, 2]]


def test_most_visual_tokens(device: torch.device) -> None:
    hold(random_scores((1, 1, 131072), device, 2), [131072], [[13107]])


@settings(max_examples=40, deadline=None, phases=PHASES)
@given(data=st.data())
def test_select_is_the_stable_sort(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 200))
    levels = data.draw(st.integers(1, 50))
    seed = data.draw(st.integers(0, 10_000))
    importance = random_scores((2, 1, size), CPU_OR_CUDA, seed).mul(levels).floor().div(7)
    m = data.draw(st.integers(1, size))
    first = data.draw(st.integers(max(1, 2 * m - size), min(size, 2 * m - 1)))
    hold(importance, [size], [[first, 2 * m - first]])


def test_bad_arguments(device: torch.device) -> None:
    importance = random_scores((2, 1, 9), device)
    options = {"total_columns": 3, "max_kv_len": 9}
    offsets = torch.zeros(1, 3, dtype=torch.int32, device=device)
    indptr = prefix([9], device)
    with pytest.raises(ValueError, match=r"cell_offset must have shape \[1, 3\], got \[1, 2\]"):
        select(importance, indptr, offsets[:, :2], indptr, **options)
    with pytest.raises(ValueError, match=r"importance must have dtype torch\.float32"):
        select(importance.half(), indptr, offsets, indptr, **options)
    with pytest.raises(ValueError, match="total_columns must be an integer >= 1, got 0"):
        select(importance, indptr, offsets, indptr, total_columns=0, max_kv_len=9)
