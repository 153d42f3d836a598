# SPDX-License-Identifier: Apache-2.0
"""Budgets from one threshold a request, in four launches, against a sorted list."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aircache_kernels import global_budgets, reference
from aircache_sglang.policy import global_counts, layer_budgets_from_statistics
from tests.unit.kernels.cases import prefix
from tests.unit.kernels.test_budgets import CPU_OR_CUDA, PHASES, scores
from tests.unit.kernels.test_package import launches

TIES = {
    "heavy": lambda value: value,
    "ties": lambda value: (value.clamp(max=4) * 2).round() / 2,
    "equal": lambda value: torch.full_like(value, 0.1),
    "zero": torch.zeros_like,
    "one layer": lambda value: torch.cat((value[:-1], value[-1:] + 100)),
}


def checked(
    importance: torch.Tensor, sizes: list[int], columns: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the kernels, checks the laws, the oracle and the policy, and returns the result."""
    device = importance.device
    indptr, m = prefix(sizes, device), torch.tensor(columns, dtype=torch.int32, device=device)
    got, offsets = global_budgets(importance, indptr, m, max_kv_len=max(sizes))
    n_layers, n_kv, _ = importance.shape
    assert got.sum(1).tolist() == [n_layers * count for count in columns]
    assert (got >= 1).all() and (got <= torch.tensor(sizes, device=device)[:, None]).all()
    assert torch.equal(offsets[:, 1:], got.cumsum(1).to(torch.int32))
    assert (offsets[:, 0] == 0).all()
    assert torch.equal(got, reference.global_budgets_reference(importance, indptr, m))
    parts = importance.split(sizes, dim=2)
    for row, part, n, count in zip(got, parts, sizes, columns, strict=True):
        counts = global_counts(part, n_layers * n_kv * count)[None]
        wanted = layer_budgets_from_statistics(counts, n, count, budget="global")
        assert torch.equal(row.long(), wanted)
    return got, offsets


@settings(max_examples=25, deadline=None, phases=PHASES)
@given(data=st.data())
def test_laws(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=3))
    columns = [data.draw(st.integers(1, size)) for size in sizes]
    n_layers, n_kv = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 3))
    kind = data.draw(st.sampled_from(sorted(TIES)))
    importance = TIES[kind](scores(n_layers, n_kv, sizes, data.draw(st.integers(0, 999))))
    checked(importance.to(CPU_OR_CUDA), sizes, columns)


def test_more_tokens_than_a_step(device: torch.device) -> None:
    sizes = [5000, 63]
    for kind in ("heavy", "ties", "one layer"):
        checked(TIES[kind](scores(3, 2, sizes)).to(device), sizes, [777, 63])


def test_many_layers(device: torch.device) -> None:
    checked(scores(81, 1, [40]).to(device), [40], [3])


def test_poisoned_and_negative_scores(device: torch.device) -> None:
    importance = scores(3, 2, [40]).to(device)
    importance[1, :, 3:9] = math.nan
    importance[2] *= -1
    importance[0, 0, 5] = math.inf
    importance[0, 0, 6:8] = torch.tensor([0.0, -0.0])
    checked(importance, [40], [11])


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_meet_in_their_histograms(ranks: int, device: torch.device) -> None:
    """Each rank, given the sums that one device would have found, splits as that device does."""
    sizes, columns = [33, 50], torch.tensor([4, 20], dtype=torch.int32, device=device)
    indptr = prefix(sizes, device)
    for kind in ("heavy", "ties"):
        importance = TIES[kind](scores(4, 6, sizes)).to(device)
        whole: list[torch.Tensor] = []

        def recorded(found: torch.Tensor, whole: list[torch.Tensor] = whole) -> torch.Tensor:
            whole.append(found.clone())
            return found

        wanted, _ = global_budgets(importance, indptr, columns, max_kv_len=50, total=recorded)
        parts: list[list[torch.Tensor]] = []
        for part in importance.chunk(ranks, dim=1):
            mine: list[torch.Tensor] = []
            parts.append(mine)

            def total(
                found: torch.Tensor,
                mine: list[torch.Tensor] = mine,
                whole: list[torch.Tensor] = whole,
            ) -> torch.Tensor:
                mine.append(found.clone())
                return whole[len(mine) - 1].clone()

            got, _ = global_budgets(
                part.contiguous(), indptr, columns, max_kv_len=50, ranks=ranks, total=total
            )
            assert torch.equal(got, wanted)
        for step, found in enumerate(whole):
            assert torch.equal(sum(part[step] for part in parts), found)  # type: ignore[arg-type]


def test_launches_and_the_table(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    importance, indptr = scores(5, 2, [30, 20]).to(device), prefix([30, 20], device)
    columns = torch.tensor([3, 9], dtype=torch.int32, device=device)
    table = torch.full((6, 6), -7, dtype=torch.int32, device=device)
    rows = torch.tensor([4, 1], device=device)
    seen = launches(monkeypatch)
    _, offsets = global_budgets(
        importance, indptr, columns, max_kv_len=30, cell_offset=table, req_pool_indices=rows
    )
    assert seen == ["_histogram_fwd_kernel"] * 3 + ["_global_budgets_fwd_kernel"]
    assert torch.equal(table[rows], offsets)
    assert (table[[0, 2, 3, 5]] == -7).all()


def test_bad_arguments(device: torch.device) -> None:
    importance, indptr = scores(2, 1, [9]).to(device), prefix([9], device)
    m = torch.ones(1, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"importance must have dtype torch\.float32"):
        global_budgets(importance.double(), indptr, m, max_kv_len=9)
    with pytest.raises(ValueError, match="given together"):
        global_budgets(importance, indptr, m, max_kv_len=9, req_pool_indices=m)
    with pytest.raises(ValueError, match="total must be given with 2 ranks"):
        global_budgets(importance, indptr, m, max_kv_len=9, ranks=2)
    with pytest.raises(ValueError, match=r"columns must have shape \[1\], got \[2\]"):
        global_budgets(importance, indptr, m.repeat(2), max_kv_len=9)
