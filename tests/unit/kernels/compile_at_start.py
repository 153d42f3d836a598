# SPDX-License-Identifier: Apache-2.0
"""Which kernels a server compiles at its start, and which only later; run by test_warm_up.py.

Nothing runs: the kernels are compiled for a GPU that is not there, as in compile_for_gpu.py.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

from aircache_sglang.runtime.drafts import Drafts
from aircache_sglang.runtime.extend import ExtendJob
from aircache_sglang.runtime.kernel_decode import KernelDecoder
from aircache_sglang.runtime.kernel_extend import KernelExtender
from aircache_sglang.runtime.kernel_pass import KernelPass
from aircache_sglang.runtime.warm_up import Kernels, warm_up
from tests.unit.kernels.compile_for_gpu import CompileOnlyDriver
from tests.unit.kernels.test_engine_twins import (
    H_Q,
    MIXED,
    PAPER,
    PROMPTS,
    SAME,
    D,
    L,
    Side,
    build,
)

N_DRAFTS = 12
compiled: list[str] = []
triton.runtime.driver.set_active(CompileOnlyDriver(90))
_run, _compile = JITFunction.run, JITFunction._do_compile


def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
    return _run(self, *args, grid=grid, warmup=True, **kwargs)


def do_compile(self: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
    compiled.append(self.__name__)
    return _compile(self, key, *args, **kwargs)


JITFunction.run, JITFunction._do_compile = run, do_compile


def serve(side: Side, decoder: KernelDecoder, extender: KernelExtender) -> None:
    """Passes, decode and verify steps and follow-ups of other sizes than at the start."""
    KernelPass(side.inputs)(side.jobs)
    KernelPass(side.inputs)(side.jobs[:1])
    layers = [SimpleNamespace(layer_id=i, scaling=D**-0.5) for i in range(L)]
    for rows in ([1], [3, 4], [4] * 16, [1, 2, 3, 4] * 5):
        lens = torch.tensor([PROMPTS[0].length] * len(rows))
        batch = SimpleNamespace(req_pool_indices=torch.tensor(rows), seq_lens=lens)
        for layer in layers:
            decoder.attend(torch.zeros(len(rows), H_Q, D), layer, batch)
    for rows in ([1], [3, 4], [1, 2, 3, 4] * 5):
        where, n = torch.tensor(rows), len(rows)
        lens = torch.full_like(where, PROMPTS[0].length + N_DRAFTS)
        trees = torch.ones(n, N_DRAFTS, N_DRAFTS, dtype=torch.bool)
        extender.plan_drafts(Drafts([None] * n, where, lens, trees))
        q = torch.zeros(n * N_DRAFTS, H_Q, D)
        for layer in layers:
            extender.attend(q, torch.zeros_like(q), layer)
    for sizes in ((1,), (7, 16), (33, 1, 2)):
        jobs, first = [], 0
        for job, n in zip(side.jobs, sizes, strict=False):
            end = job.record.intent.prompt.length + 2
            jobs.append(ExtendJob(job.record, end - n, end, slice(first, first + n)))
            first += n
        extender.plan(jobs)
        q = torch.zeros(first, H_Q, D)
        for layer in layers:
            extender.attend(q, torch.zeros_like(q), layer)


if __name__ == "__main__":
    side = build([SAME] * 3)
    pool, table = side.pool, side.inputs.table
    decoder, extender = KernelDecoder(pool, table), KernelExtender(pool, table)
    kernels = Kernels(
        *(KernelPass(side.inputs), decoder, extender, pool, table, H_Q, torch.float32, D**-0.5),
        n_drafts=N_DRAFTS,
    )
    warm_up(kernels, [1, 16, 32])
    at_start = len(compiled)
    for configs in ([SAME] * 3, [PAPER] * 3, list(MIXED)):
        serve(build(configs), decoder, extender)
    print(json.dumps({"at_start": at_start, "later": compiled[at_start:]}))
