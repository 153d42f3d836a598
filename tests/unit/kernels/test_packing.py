# SPDX-License-Identifier: Apache-2.0
"""`pack` against its oracle: bit for bit, every row of the pool."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from aircache_kernels import pack, reference
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
    seed: int = 0,
    index_dtype: torch.dtype = torch.int64,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    n_layers = len(budgets[0])
    columns = [sum(row) // n_layers for row in budgets]
    rows = sum(sizes) + sum(columns) + 3
    k_all = random_pool((n_layers, rows, n_kv, head_dim), dtype, device, generator)
    v_all = random_pool((n_layers, rows, n_kv, head_dim), dtype, device, generator)
    slots = torch.randperm(rows, generator=generator)
    visual, spare = slots[: sum(sizes)], slots[sum(sizes) :]
    target = spare[: sum(columns)]
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
    pack(k_all, v_all, *arguments, max_columns=max(columns))
    assert torch.equal(bits(k_all), bits(k_want))
    assert torch.equal(bits(v_all), bits(v_want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, FP8_DTYPE])
def test_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    hold([31, 20], [[1, 31, 4], [9, 9, 9]], dtype=dtype, device=device)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims(head_dim: int, device: torch.device) -> None:
    hold([33], [[3, 33]], head_dim=head_dim, n_kv=3, device=device)


def test_cells_beyond_one_tile_and_int32_slots(device: torch.device) -> None:
    hold([300], [[200, 1, 123], [17, 17, 17]][:1], device=device, index_dtype=torch.int32)


def test_a_layer_without_cells(device: torch.device) -> None:
    hold([31, 6], [[0, 31, 5], [6, 0, 0]], device=device)


@settings(max_examples=25, deadline=None, phases=PHASES)
@given(st.data())
def test_any_budgets(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(2, 12), min_size=1, max_size=3))
    budgets = []
    for size in sizes:
        first = data.draw(st.integers(0, size))
        # two layers that fill whole columns
        second = data.draw(st.sampled_from([n for n in range(size + 1) if (first + n) % 2 == 0]))
        budgets.append([first, second] if first + second else [1, 1])
    hold(sizes, budgets, seed=data.draw(st.integers(0, 999)), device=CPU_OR_CUDA)


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
