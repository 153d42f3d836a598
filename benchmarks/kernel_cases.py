# SPDX-License-Identifier: Apache-2.0
"""What bench_kernels.py times: each case is checked against the torch oracle first."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import triton
from triton.runtime.jit import KernelInterface

from aircache_kernels import (
    DecodeConfig,
    Tables,
    build_flashinfer_tables,
    decode_attention,
    extend_attention,
    importance_statistics,
    lay_out_rows,
    layer_budgets,
    pack,
    reference,
    score,
    select,
)
from benchmarks.records import Row

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Layer = Callable[[int], Tensor]


@dataclass(frozen=True)
class Model:
    layers: int
    n_q: int
    n_kv: int
    head_dim: int
    hidden: int
    intermediate: int

    def prefill_flop(self, tokens: int) -> int:
        """Matrix products of the decoder's layers and causal attention, for one prompt.

        Without vision tower, embeddings and logits; over the measured matrix rate it is less than
        any real prefill takes.
        """
        heads = self.head_dim * (2 * self.n_q + 2 * self.n_kv)
        weights = self.hidden * (heads + 3 * self.intermediate)
        attention = self.n_q * self.head_dim * tokens
        return 2 * self.layers * tokens * (weights + attention)


# LLaVA-OV-7B and Qwen2-VL-7B share their decoder's shape
MODELS = {
    "qwen2-vl-7b": Model(28, 28, 4, 128, 3584, 18944),
    "internvl2-8b": Model(32, 32, 8, 128, 4096, 14336),
    "tiny": Model(2, 4, 2, 32, 128, 256),
}
TEXT_TOKENS = 64


class Timer:
    """Median seconds of a call, with a cold L2 cache on a GPU."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        size = 256 << 20 if DEVICE.type == "cuda" else 1
        self.flush = torch.empty(size, dtype=torch.int8, device=DEVICE)

    def __call__(self, call: Callable[[], object], *, graph: bool = False) -> float:
        """`graph` replays a CUDA graph of the call, as SGLang's decode does."""
        call()
        if graph and DEVICE.type == "cuda":
            torch.cuda.synchronize()
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                call()
            call = captured.replay
        if DEVICE.type != "cuda":
            started = time.perf_counter()
            call()
            return time.perf_counter() - started
        call()
        taken: list[float] = []
        for _ in range(self.repeats):
            self.flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(taken)


def machine_rates(timer: Timer, dtype: torch.dtype, smoke: bool) -> tuple[float, float]:
    """Bytes a second of a copy (read + write), FLOP a second of a square matrix product."""
    size = 1 << (20 if smoke else 30)
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = 2 * size / timer(lambda: target.copy_(source))
    side = 128 if smoke else 8192
    a = torch.randn(side, side, device=DEVICE).to(dtype)
    return copy, 2 * side**3 / timer(lambda: a @ a)


class Batch:
    """Requests of 64 text tokens and a picture, packed with uneven budgets or whole.

    pictures: (visual tokens, retention) of each request; retention 1 is whole.
    """

    def __init__(
        self, model: Model, pictures: Sequence[tuple[int, float]], dtype: torch.dtype
    ) -> None:
        self.model, self.batch, self.dtype = model, len(pictures), dtype
        n_visual = [n for n, _ in pictures]
        # Slots that a picture takes, and how many of them are columns.
        kept = [max(1, round(share * n)) for n, share in pictures]
        m = [0 if share == 1.0 else n for n, (_, share) in zip(kept, pictures, strict=True)]
        self.keys = [TEXT_TOKENS + n for n in kept]  # a layer, on average
        half, context = TEXT_TOKENS // 2, TEXT_TOKENS + max(n_visual)
        generator = torch.Generator(device=DEVICE).manual_seed(0)
        rows = sum(self.keys) + 1
        shape = (model.layers, rows, model.n_kv, model.head_dim)
        self.k_all, self.v_all = (
            torch.randn(shape, dtype=dtype, device=DEVICE, generator=generator) for _ in range(2)
        )
        self.q = torch.randn(
            self.batch, model.n_q, model.head_dim, dtype=dtype, device=DEVICE, generator=generator
        )
        slots = torch.randperm(rows - 1, device=DEVICE, generator=generator) + 1
        n_rows = self.batch + 1
        self.tables = Tables(
            torch.zeros(n_rows, context, dtype=torch.int32, device=DEVICE),
            torch.full((n_rows,), half, dtype=torch.int32, device=DEVICE),
            torch.tensor(
                [0, *(n if k else 0 for n, k in zip(n_visual, m, strict=True))],
                dtype=torch.int32,
                device=DEVICE,
            ),
            torch.zeros(n_rows, model.layers + 1, dtype=torch.int32, device=DEVICE),
        )
        for row, part in enumerate(slots.to(torch.int32).split(self.keys), start=1):
            length = TEXT_TOKENS + n_visual[row - 1]
            self.tables.req_to_token[row, : len(part) - half] = part[:-half]
            self.tables.req_to_token[row, length - half : length] = part[-half:]
        self.req_pool_indices = torch.arange(1, n_rows, device=DEVICE)
        self.seq_lens = torch.tensor([TEXT_TOKENS + n for n in n_visual], device=DEVICE)
        packed = [i for i, columns in enumerate(m) if columns]
        if packed:
            stats = torch.rand(
                len(packed), 2, model.layers, generator=torch.Generator().manual_seed(1)
            )
            indptr = [0, *itertools.accumulate(n_visual[i] for i in packed)]
            layer_budgets(
                stats.double().to(DEVICE),
                torch.tensor(indptr, dtype=torch.int32, device=DEVICE),
                torch.tensor([m[i] for i in packed], dtype=torch.int32, device=DEVICE),
                cell_offset=self.tables.cell_offset,
                req_pool_indices=self.req_pool_indices[packed],
            )

    @property
    def requests(self) -> tuple[Tables, Tensor, Tensor]:
        return self.tables, self.req_pool_indices, self.seq_lens

    def decode(self, layer: int, config: DecodeConfig | None = None) -> Tensor:
        return decode_attention(
            self.q, self.k_all, self.v_all, layer, *self.requests,
            sm_scale=self.model.head_dim**-0.5, config=config,
        )  # fmt: skip

    def decode_all(self, config: DecodeConfig | None) -> None:
        for layer in range(self.model.layers):
            self.decode(layer, config)

    def decode_bytes(self) -> int:
        """K and V of one step in all layers."""
        model = self.model
        cell = 2 * model.n_kv * model.head_dim * self.k_all.element_size()
        return model.layers * sum(self.keys) * cell

    def decode_flop(self) -> int:
        """Two products of each query head with each K and V element of its KV head."""
        elements = self.decode_bytes() // self.k_all.element_size()
        return 2 * elements * (self.model.n_q // self.model.n_kv)

    def is_right(self, attend: Layer) -> bool:
        """Whether decode attention of the first and the last layer is."""
        for layer in {0, self.model.layers - 1}:
            want = reference.decode_attention_reference(
                self.q, self.k_all, self.v_all, layer, *self.requests,
                sm_scale=self.model.head_dim**-0.5, dtype=torch.float32,
            )  # fmt: skip
            if not close(attend(layer), want, self.dtype):
                return False
        return True


def launches_of(call: Callable[[], object]) -> int:
    """Kernels that a call launches, compiled or interpreted."""
    launch, seen = KernelInterface.__getitem__, 0

    def counted(kernel: Any, grid: Any) -> Any:
        nonlocal seen
        seen += 1
        return launch(kernel, grid)

    KernelInterface.__getitem__ = counted
    try:
        call()
    finally:
        KernelInterface.__getitem__ = launch
    return seen


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> bool:
    """Within 4 roundings of the type and 16 of the float32 sums, relative to the largest value."""
    error = (got.float() - want.float()).abs().max()
    allowed = 4 * torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps
    return bool(error <= allowed * want.abs().max())


def decode_cases(
    timer: Timer, name: str, batch: int, n_visual: int, retentions: Sequence[float],
    dtype: torch.dtype, tune: bool, rivals: Callable[[Timer, Batch, Row], Iterator[Row]],
) -> Iterator[Row]:  # fmt: skip
    """Decode of one step in all layers; the speed-up is against the same batch uncompressed.

    rivals: others' decode of an uncompressed batch, given our own row of it.
    """
    model = MODELS[name]
    base: float | None = None
    for retention in sorted({1.0, *retentions}, reverse=True):
        work = Batch(model, [(n_visual, retention)] * batch, dtype)
        row: Row = {
            "kernel": "decode", "model": name, "batch": batch, "visual": n_visual,
            "retention": retention, "bytes": work.decode_bytes(),
            "flop": work.decode_flop(),
            "checked": work.is_right(work.decode),
        }  # fmt: skip
        if row["checked"]:
            configs = [None]
            if tune:
                configs += [
                    DecodeConfig(n, w, s)
                    for n in (32, 64, 128)
                    for w in (4, 8)
                    for s in (2, 3, 4, 5)
                ]
            timed: list[tuple[float, DecodeConfig | None]] = []
            for config in configs:
                try:
                    taken = timer(partial(work.decode_all, config), graph=True)
                except triton.runtime.errors.OutOfResources:
                    continue
                timed.append((taken, config))
            taken, config = min(timed, key=lambda case: case[0])
            # what is reported is what was checked
            row["checked"] = work.is_right(partial(work.decode, config=config))
            if row["checked"]:
                row["seconds"], row["config"] = taken, config
        if row["checked"]:
            if retention == 1.0:
                base = row["seconds"]
            elif base is not None:
                row["speedup"] = base / row["seconds"]
        yield row
        if retention == 1.0 and row["checked"]:
            yield from rivals(timer, work, row)
        yield from extend_case(timer, work, row)


def mixed_case(timer: Timer, name: str, smoke: bool, dtype: torch.dtype) -> Row:
    """One long request that is whole among short packed ones."""
    long, short, others = (96, 40, 3) if smoke else (32768, 10240, 63)
    work = Batch(MODELS[name], [(long, 1.0), *[(short, 0.1)] * others], dtype)
    row: Row = {
        "kernel": "decode mixed", "model": name, "batch": 1 + others, "visual": long,
        "retention": 0.1, "bytes": work.decode_bytes(), "flop": work.decode_flop(),
        "checked": work.is_right(work.decode),
    }  # fmt: skip
    if row["checked"]:
        row["seconds"] = timer(partial(work.decode_all, None), graph=True)
    return row


def extend_case(timer: Timer, work: Batch, like: Row) -> Iterator[Row]:
    """All text behind the gap as the new tokens of each request, in all layers."""
    model, new = work.model, TEXT_TOKENS // 2
    q = work.q.repeat_interleave(new, dim=0)
    qo_indptr = torch.arange(work.batch + 1, dtype=torch.int32, device=DEVICE) * new
    scale = model.head_dim**-0.5

    def attend(layer: int) -> Tensor:
        return extend_attention(
            q, qo_indptr, work.k_all, work.v_all, layer, *work.requests,
            max_qo_len=new, sm_scale=scale,
        )  # fmt: skip

    def step() -> None:
        for layer in range(model.layers):
            attend(layer)

    want = reference.extend_attention_reference(
        q, qo_indptr, work.k_all, work.v_all, 0, *work.requests,
        sm_scale=scale, dtype=torch.float32,
    )  # fmt: skip
    row: Row = {
        "kernel": "extend", **{name: like[name] for name in ("model", "batch", "visual")},
        "retention": like["retention"], "bytes": like["bytes"], "flop": new * like["flop"],
        "checked": close(attend(0), want, work.dtype),
    }  # fmt: skip
    if row["checked"]:
        row["seconds"] = timer(step)
    yield row


def pass_cases(
    timer: Timer, name: str, batch: int, n_visual: int, retention: float, dtype: torch.dtype
) -> Iterator[Row]:
    """Score, budget, select and pack of prompts with one image each."""
    model = MODELS[name]
    layers, m = model.layers, max(1, round(retention * n_visual))
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    rows = batch * (TEXT_TOKENS + n_visual + m) + 1
    shape = (layers, rows, model.n_kv, model.head_dim)
    k_all, v_all = (
        torch.randn(shape, dtype=dtype, device=DEVICE, generator=generator) for _ in range(2)
    )
    q = torch.randn(
        layers, batch * TEXT_TOKENS, model.n_q, model.head_dim,
        dtype=dtype, device=DEVICE, generator=generator,
    )  # fmt: skip
    slots = torch.randperm(rows - 1, device=DEVICE, generator=generator) + 1
    text, visual, target, _ = slots.split([batch * TEXT_TOKENS, batch * n_visual, batch * m, 0])
    steps = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE)
    qo_indptr, kv_indptr, column_indptr = steps * TEXT_TOKENS, steps * n_visual, steps * m
    columns = torch.full((batch,), m, dtype=torch.int32, device=DEVICE)
    scale = model.head_dim**-0.5

    def run_score() -> Tensor:
        return score(
            q, qo_indptr, k_all, text, kv_indptr, visual,
            max_qo_len=TEXT_TOKENS, max_kv_len=n_visual, sm_scale=scale,
        )  # fmt: skip

    def run_budgets() -> tuple[Tensor, Tensor]:
        found = importance_statistics(importance, kv_indptr, max_kv_len=n_visual)
        return layer_budgets(found, kv_indptr, columns)

    def run_select() -> Tensor:
        return select(
            importance, kv_indptr, offsets, column_indptr,
            total_columns=batch * m, max_kv_len=n_visual, mass=mass,
        )  # fmt: skip

    def run_pack() -> None:
        pack(
            k_all, v_all, selected, kv_indptr, visual, offsets, column_indptr, target,
            max_columns=m,
        )  # fmt: skip

    mass = torch.empty(batch, layers, model.n_kv, dtype=torch.float64, device=DEVICE)
    importance = run_score()
    stats = importance_statistics(importance, kv_indptr, max_kv_len=n_visual)
    budgets, offsets = layer_budgets(stats, kv_indptr, columns)
    selected = run_select()
    run_pack()

    mask = reference.elite_mask_reference(
        q, qo_indptr, k_all, text, sm_scale=scale, dtype=torch.float32
    )
    want = reference.score_reference(
        q[:1], qo_indptr, k_all[:1], text, kv_indptr, visual,
        sm_scale=scale, dtype=torch.float32, elite_mask=mask[:1],
    )  # fmt: skip
    scored = close(importance[:1], want, dtype)
    shared = bool((budgets.sum(1) == layers * m).all()) and torch.equal(
        budgets, reference.budgets_reference(stats, kv_indptr, columns)
    )
    chosen = torch.equal(selected, reference.select_reference(importance, kv_indptr, budgets))
    packed = packed_is_right(
        k_all, v_all, selected, visual, offsets, target, n_visual=n_visual, m=m
    )
    # a request's row: half the text, the picture, the rest of the text
    context, half = n_visual + TEXT_TOKENS, TEXT_TOKENS // 2
    req_to_token = torch.zeros(batch + 1, context, dtype=torch.int32, device=DEVICE)
    gap_start, gap_len = torch.zeros(2, batch + 1, dtype=torch.int32, device=DEVICE)
    tables = Tables(req_to_token, gap_start, gap_len, offsets)
    req_pool_indices, starts = steps[1:].contiguous(), torch.full_like(columns, half)
    none = torch.zeros_like(steps)

    def run_rows() -> None:
        lay_out_rows(
            tables, req_pool_indices, starts, kv_indptr, column_indptr, target,
            none, target[:0],
        )  # fmt: skip

    def run_all() -> None:
        nonlocal importance, selected
        importance = run_score()
        run_budgets()
        selected = run_select()
        run_pack()
        run_rows()

    run_rows()
    rows_right = bool((gap_len[1:] == n_visual).all()) and torch.equal(
        req_to_token[1:, half : half + m].long(), target.view(batch, m)
    )
    cell = model.n_kv * model.head_dim * k_all.element_size()
    scores = importance.numel() * 4
    elite = int(mask.sum())
    like = {"model": name, "batch": batch, "visual": n_visual, "retention": retention}
    # every elite row meets every visual key twice: once for the sum, once for the scores
    flop = 4 * elite * n_visual * model.head_dim
    parts: list[tuple[str, bool, int, int, Callable[[], object]]] = [
        ("score", scored, layers * batch * n_visual * cell + scores, flop, run_score),
        ("budget", shared, scores, 0, run_budgets),
        ("select", chosen, scores + selected.numel() * 4, 0, run_select),
        ("pack", packed, 4 * batch * layers * m * cell, 0, run_pack),
        ("rows", rows_right, 8 * batch * n_visual, 0, run_rows),
    ]
    parts.append(
        (
            "pass",
            all(part[1] for part in parts),
            sum(part[2] for part in parts),
            flop,
            run_all,
        )
    )
    for kernel, checked, moved, work, call in parts:
        row: Row = {"kernel": kernel, **like, "bytes": moved, "flop": work, "checked": checked}
        if kernel == "pass":
            row |= {"launches": launches_of(call), "elite_rows": elite}
            row["prefill_flop"] = batch * model.prefill_flop(context)
        if checked:
            row["seconds"] = timer(call)
        yield row


def packed_is_right(
    k_all: Tensor, v_all: Tensor, selected: Tensor, visual: Tensor, offsets: Tensor,
    target: Tensor, *, n_visual: int, m: int,
) -> bool:  # fmt: skip
    """All cells of all requests, by tensor indexing. Sources are not overwritten here."""
    layers, n_kv = k_all.shape[0], k_all.shape[2]
    head = torch.arange(n_kv, device=DEVICE)[:, None]
    cells = torch.arange(layers * m, device=DEVICE)
    for b in range(offsets.shape[0]):
        ends = offsets[b, 1:].contiguous().long()
        layer = torch.searchsorted(ends, cells, right=True)[None]
        ordinal = selected[:, b * layers * m : (b + 1) * layers * m].long()
        source = visual[b * n_visual + ordinal]
        slot = target[b * m + cells // layers][None]
        for pool in (k_all, v_all):
            if not torch.equal(pool[(cells % layers)[None], slot, head], pool[layer, source, head]):
                return False
    return True


def tables_case(timer: Timer, name: str, batch: int, n_visual: int, dtype: torch.dtype) -> Row:
    work = Batch(MODELS[name], [(n_visual, 0.1)] * batch, dtype)
    layers = MODELS[name].layers
    rows = work.k_all.shape[1]
    capacity = batch * (n_visual + TEXT_TOKENS)
    indptr = torch.empty(layers, batch + 1, dtype=torch.int32, device=DEVICE)
    indices = torch.empty(layers, capacity, dtype=torch.int32, device=DEVICE)
    last = torch.empty(batch, dtype=torch.int32, device=DEVICE)

    def build() -> None:
        build_flashinfer_tables(
            *work.requests, rows=rows,
            kv_indptr=indptr, kv_indices=indices, last_page_len=last,
        )  # fmt: skip

    build()
    want = torch.cat(reference.physical_rows_reference(layers, rows, layers - 1, *work.requests))
    used = int(indptr[-1, -1])
    row: Row = {
        "kernel": "flashinfer tables", "model": name, "batch": batch, "visual": n_visual,
        "retention": 0.1, "bytes": 8 * int(indptr[:, -1].sum()), "flop": 0,
        "checked": used == want.numel() and torch.equal(indices[-1, :used].long(), want),
    }  # fmt: skip
    if row["checked"]:
        row["seconds"] = timer(build, graph=True)
    return row
