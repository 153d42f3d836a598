# SPDX-License-Identifier: Apache-2.0
"""Random inputs for the kernels, shared by tests/unit/kernels and tests/gpu."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from aircache_kernels import Tables

T = TypeVar("T")


def captured(run: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A CUDA graph of `run`, called once before, and what it returns: overwritten by a replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


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


@dataclass
class DecodeCase:
    """A pool and tables for requests of which some are compressed; unused rows are NaN.

    Columns are slots of their own, listed at the start of the gap in req_to_token; the rest of the
    gap and of the table holds slots out of range, which no kernel may follow.
    """

    q: Tensor
    k_all: Tensor
    v_all: Tensor
    req_to_token: Tensor
    req_pool_indices: Tensor
    seq_lens: Tensor
    gap_start: Tensor
    gap_len: Tensor
    cell_offset: Tensor

    def requests(self) -> tuple[Tables, Tensor, Tensor]:
        tables = Tables(self.req_to_token, self.gap_start, self.gap_len, self.cell_offset)
        return tables, self.req_pool_indices, self.seq_lens

    def inputs(self, layer: int) -> tuple[Tensor, Tensor, Tensor, int, Tables, Tensor, Tensor]:
        return (self.q, self.k_all, self.v_all, layer, *self.requests())


@dataclass(frozen=True)
class Request:
    """length tokens; budgets None is uncompressed, else the gap of n_visual starts at gap_start."""

    length: int
    gap_start: int = 0
    n_visual: int = 0
    budgets: tuple[int, ...] | None = None


def decode_case(
    requests: Sequence[Request],
    *,
    n_layers: int = 3,
    n_q: int = 4,
    n_kv: int = 2,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    device: torch.device,
    padded: int = 0,
    seed: int = 0,
) -> DecodeCase:
    generator = torch.Generator().manual_seed(seed)
    n_rows = len(requests) + 2
    context = max(request.length for request in requests) + 5
    slots_wanted = sum(request.length for request in requests)
    rows = slots_wanted + 9
    # slot 0 belongs to the padding row; far is out of the pool
    order = (torch.randperm(rows - 1, generator=generator) + 1).tolist()
    far = 2**31 - 1
    req_to_token = torch.full((n_rows, context), far, dtype=torch.int32)
    req_to_token[0] = 0
    gap_start = torch.full((n_rows,), 3, dtype=torch.int32)
    gap_len = torch.zeros(n_rows, dtype=torch.int32)
    cell_offset = torch.full((n_rows, n_layers + 1), far, dtype=torch.int32)
    cell_offset[0] = 0
    k_all = torch.full((n_layers, rows, n_kv, head_dim), float("nan"))
    v_all = k_all.clone()
    live = torch.zeros(n_layers, rows, dtype=torch.bool)
    live[:, 0] = True
    pool_rows = torch.randperm(n_rows - 1, generator=generator)[: len(requests)] + 1
    for index, request in zip(pool_rows.tolist(), requests, strict=True):
        if request.budgets is None:
            mine = [order.pop() for _ in range(request.length)]
            req_to_token[index, : request.length] = torch.tensor(mine, dtype=torch.int32)
            live[:, mine] = True
            continue
        m = sum(request.budgets) // n_layers
        assert sum(request.budgets) == m * n_layers
        gap_start[index], gap_len[index] = request.gap_start, request.n_visual
        cell_offset[index] = prefix(request.budgets, torch.device("cpu"))
        gap_end = request.gap_start + request.n_visual
        for position in range(request.length):
            if request.gap_start + m <= position < gap_end:
                continue
            slot = order.pop()
            req_to_token[index, position] = slot
            live[:, slot] = True
    n_live = int(live.sum())
    k_all[live] = torch.randn(n_live, n_kv, head_dim, generator=generator)
    v_all[live] = torch.randn(n_live, n_kv, head_dim, generator=generator)
    batch = len(requests) + padded
    q = torch.randn(batch, n_q, head_dim, generator=generator)
    indices = torch.cat((pool_rows, torch.zeros(padded, dtype=torch.int64)))
    lengths = torch.tensor([request.length for request in requests] + [1] * padded)
    return DecodeCase(
        q.to(dtype).to(device),
        k_all.to(kv_dtype or dtype).to(device),
        v_all.to(kv_dtype or dtype).to(device),
        req_to_token.to(device),
        indices.to(device),
        lengths.to(device),
        gap_start.to(device),
        gap_len.to(device),
        cell_offset.to(device),
    )
