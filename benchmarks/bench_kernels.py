# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.bench_kernels`: the kernels against the floor of the machine they run on.

Every case is checked against the torch oracle before it is timed; a case that fails its check is
reported as failed, not timed, and the exit code is 1. The floor is bytes over the copy bandwidth
measured here, or FLOP over the matrix rate measured here, whichever is longer. One JSON line each.
Others' decode attention (rival_decode.py) is checked and timed on the same uncompressed batch where
it is installed. `--smoke` runs tiny cases, on a CPU in Triton's interpreter, and claims no speed.
A run ends with the project's goals, each met, not met or not measured. `plot` draws a result file
(plot_kernels.py). Needs torch and triton; matplotlib for `plot`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import triton
from triton.runtime.jit import KernelInterface

from aircache_kernels import (
    DecodeConfig,
    build_flashinfer_tables,
    build_text_csr,
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
from benchmarks.plot_kernels import plot
from benchmarks.records import RESULTS, Row, commit
from benchmarks.rival_decode import RIVALS, Layer

FILE = RESULTS / "kernels.jsonl"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
    """Requests of N_v visual and 64 text tokens, packed at one retention with uneven budgets."""

    def __init__(
        self, model: Model, batch: int, n_visual: int, retention: float, dtype: torch.dtype
    ) -> None:
        self.model, self.batch, self.n_visual, self.dtype = model, batch, n_visual, dtype
        layers, context = model.layers, n_visual + TEXT_TOKENS
        generator = torch.Generator(device=DEVICE).manual_seed(0)
        self.m = max(1, round(retention * n_visual))
        self.compressed = self.m < n_visual
        per_request = TEXT_TOKENS + (self.m if self.compressed else n_visual)
        rows = batch * per_request + 1
        shape = (layers, rows, model.n_kv, model.head_dim)
        self.k_all, self.v_all = (
            torch.randn(shape, dtype=dtype, device=DEVICE, generator=generator) for _ in range(2)
        )
        self.q = torch.randn(
            batch, model.n_q, model.head_dim, dtype=dtype, device=DEVICE, generator=generator
        )
        slots = torch.randperm(rows - 1, device=DEVICE, generator=generator) + 1
        slots = slots.view(batch, per_request).to(torch.int32)
        self.req_to_token = torch.zeros(batch + 1, context, dtype=torch.int32, device=DEVICE)
        half = TEXT_TOKENS // 2
        kept = per_request - TEXT_TOKENS
        self.req_to_token[1:, : half + kept] = slots[:, : half + kept]
        self.req_to_token[1:, -half:] = slots[:, half + kept :]
        self.req_pool_indices = torch.arange(1, batch + 1, device=DEVICE)
        self.seq_lens = torch.full((batch,), context, device=DEVICE)
        self.gap_start = torch.full((batch + 1,), half, dtype=torch.int32, device=DEVICE)
        self.gap_len = torch.zeros(batch + 1, dtype=torch.int32, device=DEVICE)
        self.cell_offset = torch.zeros(batch + 1, layers + 1, dtype=torch.int32, device=DEVICE)
        if self.compressed:
            self.gap_len[1:] = n_visual
            stats = torch.rand(batch, 2, layers, generator=torch.Generator().manual_seed(1))
            indptr = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE) * n_visual
            layer_budgets(
                stats.double().to(DEVICE),
                indptr,
                torch.full((batch,), self.m, dtype=torch.int32, device=DEVICE),
                cell_offset=self.cell_offset,
                req_pool_indices=self.req_pool_indices,
            )
        self.csr: dict[str, Tensor] = {
            "text_indptr": torch.empty(batch + 1, dtype=torch.int32, device=DEVICE),
            "text_indices": torch.empty(batch * context, dtype=torch.int32, device=DEVICE),
        }
        self.build_csr()

    def tables(self) -> tuple[Tensor, ...]:
        return (
            self.req_to_token, self.req_pool_indices, self.seq_lens, self.gap_start, self.gap_len,
        )  # fmt: skip

    def build_csr(self) -> None:
        build_text_csr(*self.tables(), **self.csr)

    def decode(self, layer: int, config: DecodeConfig | None = None) -> Tensor:
        return decode_attention(
            self.q, self.k_all, self.v_all, layer, *self.tables(), self.cell_offset,
            sm_scale=self.model.head_dim**-0.5, config=config, **self.csr,
        )  # fmt: skip

    def decode_all(self, config: DecodeConfig | None) -> None:
        for layer in range(self.model.layers):
            self.decode(layer, config)

    def decode_bytes(self) -> int:
        """K and V of one step in all layers."""
        model = self.model
        visual = self.m if self.compressed else self.n_visual
        cell = 2 * model.n_kv * model.head_dim * self.k_all.element_size()
        return self.batch * model.layers * (visual + TEXT_TOKENS) * cell

    def decode_flop(self) -> int:
        """Two products of each query head with each K and V element of its KV head."""
        elements = self.decode_bytes() // self.k_all.element_size()
        return 2 * elements * (self.model.n_q // self.model.n_kv)

    def is_right(self, attend: Layer) -> bool:
        """Whether decode attention of the first and the last layer is."""
        for layer in {0, self.model.layers - 1}:
            want, _ = reference.decode_attention_reference(
                self.q, self.k_all, self.v_all, layer, *self.tables(), self.cell_offset,
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
    dtype: torch.dtype, tune: bool,
) -> Iterator[Row]:  # fmt: skip
    """Decode of one step in all layers; the speed-up is against the same batch uncompressed."""
    model = MODELS[name]
    base: float | None = None
    for retention in sorted({1.0, *retentions}, reverse=True):
        work = Batch(model, batch, n_visual, retention, dtype)
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
            row["csr_seconds"] = timer(work.build_csr, graph=True)
            if retention == 1.0:
                base = row["seconds"]
            elif base is not None:
                row["speedup"] = base / row["seconds"]
        yield row
        if retention == 1.0 and row["checked"]:
            yield from rival_cases(timer, work, row)
        yield from extend_case(timer, work, row)


def rival_cases(timer: Timer, work: Batch, like: Row) -> Iterator[Row]:
    """Others' decode of the same uncompressed batch; like: our own row."""
    same = {name: like[name] for name in ("model", "batch", "visual", "retention", "bytes", "flop")}
    for kernel, make in RIVALS.items():
        try:
            attend = make(work)
        except ImportError:
            continue

        def step(attend: Layer = attend) -> None:
            for layer in range(work.model.layers):
                attend(layer)

        row: Row = {"kernel": kernel, **same, "checked": work.is_right(attend)}
        if row["checked"]:
            row["seconds"] = timer(step, graph=True)
            row["ours_over_it"] = like["seconds"] / row["seconds"]
        yield row


def extend_case(timer: Timer, work: Batch, like: Row) -> Iterator[Row]:
    """All text behind the gap as the new tokens of each request, in all layers."""
    model, new = work.model, TEXT_TOKENS // 2
    q = work.q.repeat_interleave(new, dim=0)
    qo_indptr = torch.arange(work.batch + 1, dtype=torch.int32, device=DEVICE) * new
    scale = model.head_dim**-0.5

    def attend(layer: int) -> Tensor:
        return extend_attention(
            q, qo_indptr, work.k_all, work.v_all, layer, *work.tables(), work.cell_offset,
            max_qo_len=new, sm_scale=scale,
        )  # fmt: skip

    def step() -> None:
        for layer in range(model.layers):
            attend(layer)

    want, _ = reference.extend_attention_reference(
        q, qo_indptr, work.k_all, work.v_all, 0, *work.tables(), work.cell_offset,
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
    gaps = torch.zeros(2, batch + 1, dtype=torch.int32, device=DEVICE)
    req_pool_indices, starts = steps[1:].contiguous(), torch.full_like(columns, half)
    none = torch.zeros_like(steps)

    def run_rows() -> None:
        lay_out_rows(
            req_to_token, req_pool_indices, starts, kv_indptr, column_indptr, target,
            none, target[:0], gaps[0], gaps[1],
        )  # fmt: skip

    def run_all() -> None:
        nonlocal importance, selected
        importance = run_score()
        run_budgets()
        selected = run_select()
        run_pack()
        run_rows()

    run_rows()
    rows_right = bool((gaps[1, 1:] == n_visual).all()) and torch.equal(
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
    work = Batch(MODELS[name], batch, n_visual, 0.1, dtype)
    layers = MODELS[name].layers
    rows = work.k_all.shape[1]
    capacity = batch * (n_visual + TEXT_TOKENS)
    indptr = torch.empty(layers, batch + 1, dtype=torch.int32, device=DEVICE)
    indices = torch.empty(layers, capacity, dtype=torch.int32, device=DEVICE)
    last = torch.empty(batch, dtype=torch.int32, device=DEVICE)

    def build() -> None:
        build_flashinfer_tables(
            *work.tables(), work.cell_offset, rows=rows,
            kv_indptr=indptr, kv_indices=indices, last_page_len=last,
        )  # fmt: skip

    build()
    want = torch.cat(
        reference.physical_rows_reference(
            layers, rows, layers - 1, *work.tables(), work.cell_offset
        )
    )
    used = int(indptr[-1, -1])
    row: Row = {
        "kernel": "flashinfer tables", "model": name, "batch": batch, "visual": n_visual,
        "retention": 0.1, "bytes": 8 * int(indptr[:, -1].sum()), "flop": 0,
        "checked": used == want.numel() and torch.equal(indices[-1, :used].long(), want),
    }  # fmt: skip
    if row["checked"]:
        row["seconds"] = timer(build, graph=True)
    return row


def goals(rows: Sequence[Row]) -> list[str]:
    """The goals of the project on an H200, each with what `rows` of one run say about it."""

    def at(kernel: str, batch: int, retention: float) -> list[Row]:
        wanted = (batch, 16384, retention)
        return [
            row
            for row in rows
            if row["kernel"] == kernel
            and (row["batch"], row["visual"], row["retention"]) == wanted
            and "seconds" in row
        ]

    def bandwidth(row: Row) -> float:
        return row["bytes"] / row["seconds"] / row["copy_bytes_per_s"]

    full, tenth = at("decode", 16, 1.0), at("decode", 16, 0.1)
    rivals = [row for row in rows if "ours_over_it" in row]
    one = [row for row in at("pass", 1, 0.1) if "share_of_prefill" in row]
    claims: list[tuple[str, list[float], Callable[[float], bool]]] = [
        ("decode, 16 x 16k, retention 1: share of copy bandwidth, at least 0.85",
         [bandwidth(row) for row in full], lambda x: x >= 0.85),
        ("decode, uncompressed: time over others', at most 1",
         [row["ours_over_it"] for row in rivals], lambda x: x <= 1.0),
        ("decode, 16 x 16k, retention 0.1: time over the bytes' floor, at most 1.3",
         [1.0 / bandwidth(row) for row in tenth], lambda x: x <= 1.3),
        ("pass, one request of 16k: share of its prefill, below 0.01",
         [row["share_of_prefill"] for row in one], lambda x: x < 0.01),
        ("pass: launches, at most 8",
         [row["launches"] for row in rows if row["kernel"] == "pass"], lambda x: x <= 8),
    ]  # fmt: skip
    lines: list[str] = []
    for claim, values, holds in claims:
        verdict = "not measured"
        if values:
            verdict = "met" if all(holds(value) for value in values) else "NOT met"
            verdict += " (" + ", ".join(f"{value:.3g}" for value in values) + ")"
        lines.append(f"{claim}: {verdict}")
    return lines


def provenance() -> Row:
    """As benchmarks/records.py has it, where SGLang and this project may not be installed."""
    on_gpu = DEVICE.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU, Triton interpreter",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "git": commit(),
        "command": shlex.join(["python", "-m", "benchmarks.bench_kernels", *sys.argv[1:]]),
        "time": time.strftime("%FT%TZ", time.gmtime()),
    }


def show(row: Row) -> None:
    label = (
        f"{row['kernel']:20} {row['model']:13} batch {row['batch']:2} visual {row['visual']:6} "
        f"retention {row['retention']:4}"
    )
    if not row["checked"]:
        print(f"{label}  FAILED its check, not timed", flush=True)
    elif row["smoke"]:
        print(f"{label}  checked", flush=True)
    else:
        speed = f"  {row['speedup']:.2f}x of retention 1" if "speedup" in row else ""
        if "ours_over_it" in row:
            speed = f"  ours takes {row['ours_over_it']:.2f}x of its time"
        print(
            f"{label}  {row['seconds'] * 1e3:9.3f} ms  {row['of_floor']:6.2f}x its floor{speed}",
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_kernels", description=__doc__)
    parser.add_argument("action", nargs="?", choices=["run", "plot"], default="run")
    parser.add_argument("--smoke", action="store_true", help="tiny cases; runs without a GPU")
    parser.add_argument("--model", choices=sorted(MODELS), action="append")
    parser.add_argument("--batch", type=int, action="append", help="default 8 and 16")
    parser.add_argument("--visual", type=int, action="append", help="default 2048 to 32768")
    parser.add_argument("--retention", type=float, action="append", help="default .5, .1, .05")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tune", action="store_true", help="search the launch shape of decode")
    parser.add_argument("--file", type=Path, default=FILE, help="JSON lines are appended to it")
    arguments = parser.parse_args(argv)
    if arguments.action == "plot":
        try:
            print(plot(arguments.file))
        except (OSError, ValueError) as error:
            print(f"Nothing to plot: {error}.", file=sys.stderr)
            return 1
        return 0
    if DEVICE.type != "cuda" and not arguments.smoke:
        parser.error("no GPU here: only --smoke runs without one")
    smoke = arguments.smoke
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    models = arguments.model or (["tiny"] if smoke else ["qwen2-vl-7b", "internvl2-8b"])
    batches = arguments.batch or ([2] if smoke else [8, 16])
    visual = arguments.visual or ([96] if smoke else [2048, 8192, 16384, 32768])
    retentions = arguments.retention or ([0.1] if smoke else [0.5, 0.1, 0.05])

    timer = Timer(arguments.repeats)
    copy, matrix = machine_rates(timer, dtype, smoke)
    if not smoke:
        print(f"copy {copy / 1e12:.2f} TB/s, {dtype} matrix {matrix / 1e12:.0f} TFLOP/s")
    where = provenance()
    failed = False
    seen: list[Row] = []

    def cases() -> Iterator[Row]:
        for name in models:
            for n_visual in visual:
                for batch, retention in itertools.product([1, *batches], retentions):
                    yield from pass_cases(timer, name, batch, n_visual, retention, dtype)
                for batch in batches:
                    yield from decode_cases(
                        timer, name, batch, n_visual, retentions, dtype, arguments.tune
                    )
                    yield tables_case(timer, name, batch, n_visual, dtype)

    for row in cases():
        row |= {**where, "smoke": smoke, "dtype": str(dtype)}
        row |= {"copy_bytes_per_s": copy, "matrix_flop_per_s": matrix}
        if smoke:
            row.pop("speedup", None)
            row.pop("ours_over_it", None)
        elif row["checked"]:
            row["floor_seconds"] = max(row["bytes"] / copy, row["flop"] / matrix)
            row["of_floor"] = row["seconds"] / row["floor_seconds"]
            if row["kernel"] == "pass":
                row["share_of_prefill"] = row["seconds"] * matrix / row["prefill_flop"]
        failed |= not row["checked"]
        show(row)
        seen.append(row)
        if not smoke:
            arguments.file.parent.mkdir(parents=True, exist_ok=True)
            with arguments.file.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print("Goals on an H200; a prefill is its FLOP over the matrix rate measured here:")
    # a smoke run's times are the interpreter's
    for line in goals([row for row in seen if not smoke or row["kernel"] == "pass"]):
        print(f"  {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
