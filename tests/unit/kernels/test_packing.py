# SPDX-License-Identifier: Apache-2.0
"""`pack` against its oracle: bit for bit, every row of the pool, any overlap."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from aircache_kernels import pack, reference
from aircache_kernels.packing import staging_plan
from aircache_kernels.validation import FP8_DTYPE
from tests.unit.kernels.cases import prefix, random_pool

# shrinking takes minutes in the interpreter
PHASES = (Phase.explicit, Phase.generate)
CPU_OR_CUDA = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def bits(value: Tensor) -> Tensor:
    return value.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[value.element_size()])


def hold(
    sizes: list[int],
    budgets: list[list[int]],
    *,
    device: torch.device,
    n_kv: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    in_place: bool = False,
    overlap: str = "none",
    seed: int = 0,
    index_dtype: torch.dtype = torch.int64,
    **options: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    n_layers = len(budgets[0])
    columns = [sum(row) // n_layers for row in budgets]
    rows = sum(sizes) + sum(columns) + 3
    k_all = random_pool((n_layers, rows, n_kv, head_dim), dtype, device, generator)
    v_all = random_pool((n_layers, rows, n_kv, head_dim), dtype, device, generator)
    slots = torch.randperm(rows, generator=generator)
    visual, spare = slots[: sum(sizes)], slots[sum(sizes) :]
    if overlap == "none":
        target = spare[: sum(columns)]
    elif overlap == "own":  # each request's columns are some of its own visual slots
        starts = [0, *accumulate(sizes)]
        parts = [
            visual[start : start + size][torch.randperm(size, generator=generator)[:m]]
            for start, size, m in zip(starts, sizes, columns, strict=False)
        ]
        target = torch.cat(parts)
    else:  # any slots, another request's visual ones too
        target = slots[torch.randperm(rows, generator=generator)[: sum(columns)]]
    selected = torch.cat(
        [
            torch.stack([torch.randperm(size, generator=generator)[:n] for _ in range(n_kv)])
            for size, row in zip(sizes, budgets, strict=True)
            for n in row
        ],
        dim=1,
    ).to(torch.int32)
    arguments = (
        selected.to(device),
        prefix(sizes, device),
        visual.to(index_dtype).to(device),
        torch.stack([prefix(row, device) for row in budgets]),
        prefix(columns, device),
        target.to(index_dtype).to(device),
    )
    k_want, v_want = reference.pack_reference(k_all, v_all, *arguments)
    pack(k_all, v_all, *arguments, max_columns=max(columns), in_place=in_place, **options)
    assert torch.equal(bits(k_all), bits(k_want))
    assert torch.equal(bits(v_all), bits(v_want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, FP8_DTYPE])
@pytest.mark.parametrize("in_place", [False, True])
def test_dtypes(dtype: torch.dtype, in_place: bool, device: torch.device) -> None:
    budgets = [[1, 31, 4], [9, 9, 9]]
    hold([31, 20], budgets, dtype=dtype, in_place=in_place, device=device)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims(head_dim: int, device: torch.device) -> None:
    hold([33], [[3, 33]], head_dim=head_dim, n_kv=3, device=device)
    hold([33], [[3, 33]], head_dim=head_dim, in_place=True, overlap="own", device=device)


def test_cells_beyond_one_tile_and_int32_slots(device: torch.device) -> None:
    hold([300], [[200, 1, 123], [17, 17, 17]][:1], device=device, index_dtype=torch.int32)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_layer_without_cells(in_place: bool, device: torch.device) -> None:
    hold([31, 6], [[0, 31, 5], [6, 0, 0]], in_place=in_place, device=device)


def test_retention_1_in_place_is_a_permutation_with_cycles(device: torch.device) -> None:
    hold([40, 7], [[40] * 4, [7] * 4], in_place=True, overlap="own", device=device)


@pytest.mark.parametrize("max_scratch_bytes", [1, 5000, 20000, 1 << 30])
def test_slices(max_scratch_bytes: int, device: torch.device) -> None:
    hold(
        [40, 25],
        [[39, 1, 20], [2, 2, 23]],
        in_place=True,
        overlap="any",
        head_dim=80,
        dtype=torch.float16,
        max_scratch_bytes=max_scratch_bytes,
        device=device,
    )


@settings(max_examples=25, deadline=None, phases=PHASES)
@given(
    seed=st.integers(0, 10_000),
    scratch=st.integers(1, 4000),
    overlap=st.sampled_from(["own", "any"]),
)
def test_in_place_under_any_overlap(seed: int, scratch: int, overlap: str) -> None:
    budgets = [[5, 12, 1], [1, 1, 1]]
    hold(
        [12, 3],
        budgets,
        in_place=True,
        overlap=overlap,
        seed=seed,
        max_scratch_bytes=scratch,
        device=CPU_OR_CUDA,
    )


@given(
    n_cells=st.integers(1, 1 << 22),
    n_kv=st.integers(1, 64),
    head_dim=st.sampled_from([16, 64, 80, 96, 128, 256]),
    item_size=st.sampled_from([1, 2, 4]),
    limit=st.integers(1, 1 << 30),
)
def test_scratch_bound(n_cells: int, n_kv: int, head_dim: int, item_size: int, limit: int) -> None:
    units, width = staging_plan(n_cells, n_kv, head_dim, item_size, limit)
    assert 1 <= units <= 2 * n_kv and 1 <= width <= head_dim
    assert n_cells * units * width * item_size <= max(limit, 16 * n_cells)


def test_bad_arguments(device: torch.device) -> None:
    k = torch.zeros(2, 9, 1, 16, device=device)
    indptr = prefix([4], device)
    slots = torch.arange(4, device=device)
    offsets = torch.zeros(1, 3, dtype=torch.int32, device=device)
    selected = torch.zeros(1, 4, dtype=torch.int32, device=device)
    columns, target = prefix([2], device), slots[:2]
    good = (selected, indptr, slots, offsets, columns, target)
    with pytest.raises(ValueError, match=r"v_all must have shape \[2, 9, 1, 16\], got"):
        pack(k, k[:1], *good, max_columns=2)
    with pytest.raises(ValueError, match=r"selected must have shape \[1, 4\], got \[1, 3\]"):
        pack(k, k.clone(), selected[:, :3], *good[1:], max_columns=2)
    with pytest.raises(ValueError, match="head_dim must be one of"):
        pack(k[..., :10], k[..., :10], *good, max_columns=2)
