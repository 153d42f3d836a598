# SPDX-License-Identifier: Apache-2.0
"""Random inputs for the kernels, shared by tests/unit/kernels and tests/gpu."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


def prefix(sizes: Sequence[int], device: torch.device) -> Tensor:
    """int32 [len + 1] prefix sums."""
    return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device)


def poisoned(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that shows when it is read before it is written, or not written."""
    if dtype.is_floating_point:
        return torch.full(shape, float("nan"), device=device).to(dtype)
    return torch.full(shape, -123456789, dtype=dtype, device=device)


def random_pool(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype).to(device)


@dataclass
class ScoreCase:
    """Inputs of `score` for B requests with disjoint random slots; the rest of the pool is NaN."""

    q: Tensor
    qo_indptr: Tensor
    k_all: Tensor
    text_indices: Tensor
    kv_indptr: Tensor
    kv_indices: Tensor
    max_qo_len: int
    max_kv_len: int
    sm_scale: float

    def inputs(self) -> tuple[Tensor, ...]:
        return (
            self.q, self.qo_indptr, self.k_all,
            self.text_indices, self.kv_indptr, self.kv_indices,
        )  # fmt: skip


def score_case(
    text: Sequence[int],
    visual: Sequence[int],
    *,
    n_layers: int = 2,
    n_q: int = 4,
    n_kv: int = 2,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    device: torch.device,
    seed: int = 0,
    index_dtype: torch.dtype = torch.int64,
) -> ScoreCase:
    generator = torch.Generator().manual_seed(seed)
    used = sum(text) + sum(visual)
    slots = torch.randperm(used + 7, generator=generator)[:used]
    k_all = random_pool((n_layers, used + 7, n_kv, head_dim), torch.float32, device, generator)
    outside = torch.ones(used + 7, dtype=torch.bool)
    outside[slots] = False
    k_all[:, outside.to(device)] = float("nan")
    slots = slots.to(index_dtype).to(device)
    q = random_pool((n_layers, sum(text), n_q, head_dim), dtype, device, generator)
    return ScoreCase(
        q,
        prefix(text, device),
        k_all.to(kv_dtype or dtype),
        slots[: sum(text)].contiguous(),
        prefix(visual, device),
        slots[sum(text) :].contiguous(),
        max(text),
        max(visual),
        head_dim**-0.5,
    )
