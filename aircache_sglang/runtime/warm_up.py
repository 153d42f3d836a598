# SPDX-License-Identifier: Apache-2.0
"""Before the first request: every kernel is compiled, and on a GPU the pass is timed for the gate.

Triton compiles at the first launch, for seconds, and what a pass costs is the device's. All runs on
made-up prompts in the last rows and the first slots, which nobody has yet; the KV that is written
is read by nobody, and the tables are left as they were.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

import torch

from aircache_sglang.config import AirCacheConfig
from aircache_sglang.policy import columns
from aircache_sglang.runtime.attention import Decoder, Extender
from aircache_sglang.runtime.compress import CompressionPass
from aircache_sglang.runtime.decide import Intent
from aircache_sglang.runtime.drafts import Drafts
from aircache_sglang.runtime.extend import ExtendJob
from aircache_sglang.runtime.gate import Costs
from aircache_sglang.runtime.kv_planes import KVPlanes
from aircache_sglang.runtime.record import CompressionRecord
from aircache_sglang.runtime.spans import VisualPrompt
from aircache_sglang.runtime.stash import Job
from aircache_sglang.runtime.table import CompressionTable

# What a request may ask of the kernels by other code: who picks the elite tokens, and what splits.
SETTINGS: tuple[dict[str, str], ...] = (
    {"budget": "global"},
    {"budget": "aircache"},
    {"elite": "shared", "budget": "uniform"},
    {"budget": "strength"},
    {"budget": "skewness"},
)
# Sizes at which the pass is timed: visual tokens, instruction tokens, retention.
SMALL, LARGE = 1024, 4096
TIMED = ((SMALL, 8, 0.1), (LARGE, 8, 0.1), (LARGE, 64, 0.1), (LARGE, 8, 0.5))
READERS = 8  # requests of the decode step that is timed
FASTEST = 10e12  # bytes a second; more than any memory has
QUEUE_CYCLES = 1 << 25  # of the device, 15 to 20 ms: the launches of a decode step take less


class Clock(Protocol):
    """Seconds that a call takes on the device."""

    def __call__(self, run: Callable[[], None], *, queued: bool = False) -> float:
        """Launching included; where it is queued, the launches wait for none of the host's."""


@dataclasses.dataclass(frozen=True, slots=True)
class Kernels:
    """What is warmed up.

    n_q: query heads of this rank; scale: the softmax scale; n_drafts: of a request in a step that
    verifies them, 0 for none.
    """

    compress: CompressionPass
    decoder: Decoder
    extender: Extender
    pool: KVPlanes
    table: CompressionTable
    n_q: int
    q_dtype: torch.dtype
    scale: float
    n_drafts: int = 0

    @property
    def layer(self) -> Any:
        """The first layer, as the backend sees it."""
        return self.layer_of(self.pool.model_layer_ids[0])

    def layer_of(self, layer_id: int) -> Any:
        """A layer, as the backend sees it."""
        return SimpleNamespace(layer_id=layer_id, scaling=self.scale)

    @property
    def least_read(self) -> float:
        """Seconds in which no device reads the KV of one visual token in all layers."""
        k_all = self.pool.k_all
        return 2 * k_all[:, 0].numel() * k_all.element_size() / FASTEST

    def queries(self, n: int) -> torch.Tensor:
        """[n, H_q, D] zeros."""
        device, head_dim = self.pool.k_all.device, self.pool.k_all.shape[-1]
        return torch.zeros((n, self.n_q, head_dim), dtype=self.q_dtype, device=device)

    @contextlib.contextmanager
    def rows(self, n: int) -> Iterator[list[int]]:
        """The last n rows of the tables, left as they were."""
        last = self.table.req_to_token.shape[0]
        rows = list(range(last - n, last))
        before = [part[-n:].clone() for part in self.table.tables]
        try:
            yield rows
        finally:
            for part, value in zip(self.table.tables, before, strict=True):
                part[-n:] = value

    def job(self, row: int, n_visual: int, n_text: int, config: AirCacheConfig) -> Job:
        """A prefilled prompt with one picture, behind one token of text."""
        prompt = VisualPrompt(((1, 1 + n_visual),), 1 + n_visual + n_text, n_visual)
        m = columns(config.retention, n_visual)
        slots = torch.arange(1, 1 + prompt.length + m, device=self.pool.k_all.device)
        self.table.req_to_token[row, : prompt.length] = slots[: prompt.length]
        record = CompressionRecord(
            Intent(config, prompt, m), row, slots[: prompt.end].clone(), slots[prompt.length :]
        )
        q = self.queries(n_text).expand(self.pool.layer_num, -1, -1, -1).contiguous()
        return Job(record, q)

    def step(self, rows: Sequence[int], length: int, layers: Sequence[int]) -> Callable[[], None]:
        """Attention of some layers in a decode step over requests of one length, planned."""
        device = self.pool.k_all.device
        lens = torch.full((len(rows),), length, dtype=torch.int64)
        batch = SimpleNamespace(
            req_pool_indices=torch.tensor(rows, dtype=torch.int64, device=device),
            seq_lens=lens.to(device),
            seq_lens_cpu=lens,
        )
        self.decoder.plan(batch, [None] * len(rows))
        q = self.queries(len(rows))

        def attend() -> None:
            for layer in layers:
                self.decoder.attend(q, self.layer_of(layer), batch)

        return attend

    def verify(self, row: int, length: int) -> None:
        """One layer of a step that verifies a chain of drafts; length: drafts included."""
        n, device = self.n_drafts, self.pool.k_all.device
        rows = torch.tensor([row], dtype=torch.int64, device=device)
        chain = torch.ones((1, n, n), dtype=torch.bool, device=device).tril()
        self.extender.plan_drafts(Drafts([None], rows, torch.full_like(rows, length), chain))
        q = self.queries(n)
        self.extender.attend(q, torch.empty_like(q), self.layer)


def warm_up(kernels: Kernels, batches: Sequence[int]) -> None:
    """Run pass, decode, extend and verify attention once in all that a request may ask of them.

    batches: sizes of decode steps, every power of two that the server may run.
    """
    with kernels.rows(1) as (row,):
        for setting in SETTINGS:
            config = dataclasses.replace(AirCacheConfig(), **setting)  # type: ignore[arg-type]
            job = kernels.job(row, 64, 8 + kernels.n_drafts, config)
            kernels.compress([job])
        end = job.record.intent.prompt.length
        for size in batches:
            kernels.step([row] * size, end, kernels.pool.model_layer_ids[:1])()
        kernels.extender.plan([ExtendJob(job.record, end - 2, end, slice(0, 2))])
        q = kernels.queries(2)
        kernels.extender.attend(q, torch.empty_like(q), kernels.layer)
        if kernels.n_drafts:
            kernels.verify(row, end)


def room_to_measure(kernels: Kernels) -> bool:
    """Whether pool and tables have room for what `measured` runs."""
    n_rows, context = kernels.table.req_to_token.shape
    return n_rows > READERS and context > LARGE + 65 and kernels.pool.rows > READERS * LARGE + 1


def measured(kernels: Kernels, clock: Clock) -> list[float]:
    """Seconds of the passes of TIMED, then of a read: one visual token's KV in all layers.

    A pass is launched for each prefill, a decode step mostly is replayed by a CUDA graph.
    """
    taken = []
    with kernels.rows(READERS) as rows:
        for n_visual, n_text, retention in TIMED:
            config = dataclasses.replace(AirCacheConfig(), retention=retention)
            job = kernels.job(rows[0], n_visual, n_text, config)
            taken.append(clock(lambda job=job: kernels.compress([job])))  # type: ignore[misc]
    with kernels.rows(READERS) as rows:
        # Slots of their own: what a request reads must not be in a cache for another.
        for place, row in enumerate(rows):
            first = 1 + place * LARGE
            slots = torch.arange(first, first + LARGE, device=kernels.pool.k_all.device)
            kernels.table.req_to_token[row, :LARGE] = slots
        layers = kernels.pool.model_layer_ids
        steps = [clock(kernels.step(rows, n, layers), queued=True) for n in (SMALL, LARGE)]
    return [*taken, (steps[1] - steps[0]) / (READERS * (LARGE - SMALL))]


def costs_of(seconds: Sequence[float], least_read: float) -> Costs:
    """The costs that `measured` gives, none of them below 0, in reads of at least `least_read`."""
    small, large, scored, packed, read = seconds
    n_columns = [columns(retention, n) for n, _, retention in TIMED]
    score = (scored - large) / (LARGE * (TIMED[2][1] - TIMED[1][1]))
    pack = (packed - large) / (n_columns[3] - n_columns[1])
    per_token = score * TIMED[0][1] + pack * (n_columns[1] - n_columns[0]) / (LARGE - SMALL)
    scan = (large - small) / (LARGE - SMALL) - per_token
    fixed = small - SMALL * (scan + score * TIMED[0][1]) - n_columns[0] * pack
    # A read that was lost in noise would make every pass dear.
    unit = max(read, least_read)
    return Costs(*(max(0.0, value / unit) for value in (fixed, scan, score, pack)))


def seconds_on_gpu(run: Callable[[], None], *, queued: bool = False, repeats: int = 5) -> float:
    """Median seconds of a call after one that is not counted; see `Clock`."""
    run()
    taken = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if queued:
            torch.cuda._sleep(QUEUE_CYCLES)
        begin.record()
        run()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(taken)
