# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel to machine code for compute capability 9.0, on a machine without a GPU.

Run by test_compile.py in a process of its own, since it replaces Triton's driver. Prints one JSON
line per compiled kernel: name, shared memory in bytes, num_warps.
"""

from __future__ import annotations

import functools
import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from aircache_kernels import (
    build_flashinfer_tables,
    build_text_csr,
    decode_attention,
    extend_attention,
    importance_statistics,
    launch,
    layer_budgets,
    pack,
    score,
    select,
)
from aircache_kernels.validation import FP8_DTYPE
from tests.unit.kernels.cases import prefix, score_case


class CompileOnlyDriver:
    """What `JITFunction.run(warmup=True)` asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def install() -> None:
    triton.runtime.driver.set_active(CompileOnlyDriver())
    run = JITFunction.run

    @functools.wraps(run)
    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        record = {
            "kernel": self.__name__,
            "shared": kernel.metadata.shared,
            "num_warps": kernel.metadata.num_warps,
            "cubin": len(kernel.asm["cubin"]),
        }
        print(json.dumps(record), flush=True)
        return kernel

    JITFunction.run = compile_only


def pass_kernels(dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int, elite: str) -> None:
    device = torch.device("cpu")
    case = score_case(
        [512], [100], n_layers=28, n_q=28, n_kv=4, head_dim=head_dim,
        dtype=dtype, kv_dtype=kv_dtype, device=device,
    )  # fmt: skip
    importance = score(
        *case.inputs(), max_qo_len=512, max_kv_len=16384, sm_scale=1.0, elite=elite
    )  # fmt: skip
    statistics = importance_statistics(importance, case.kv_indptr, max_kv_len=16384)
    columns = torch.ones(1, dtype=torch.int32)
    table = torch.zeros(4, 29, dtype=torch.int32)
    _, offsets = layer_budgets(
        statistics, case.kv_indptr, columns, cell_offset=table, req_pool_indices=columns.long()
    )
    selected = select(
        importance, case.kv_indptr, offsets, prefix([1], device),
        total_columns=1, max_kv_len=16384,
    )  # fmt: skip
    for in_place in (False, True):
        pack(
            case.k_all, case.k_all.clone(), selected, case.kv_indptr, case.kv_indices, offsets,
            prefix([1], device), case.kv_indices[:1], max_columns=1, in_place=in_place,
        )  # fmt: skip


def attention_kernels(
    dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int, n_q: int, n_kv: int, cap: float
) -> None:
    n_layers, batch = 28, 16
    pool = torch.zeros(n_layers, 4, n_kv, head_dim).to(kv_dtype)
    tables = (
        torch.zeros(4, 64, dtype=torch.int32),
        torch.zeros(batch, dtype=torch.int64),
        torch.ones(batch, dtype=torch.int64),
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(4, dtype=torch.int32),
    )
    offsets = torch.zeros(4, n_layers + 1, dtype=torch.int32)
    indptr = torch.zeros(batch + 1, dtype=torch.int32)
    csr = build_text_csr(
        *tables, text_indptr=indptr, text_indices=torch.zeros(99, dtype=torch.int32)
    )
    q = torch.zeros(batch, n_q, head_dim, dtype=dtype)
    for indices in (csr, (None, None)):
        decode_attention(
            q, pool, pool.clone(), 1, *tables, offsets, sm_scale=1.0, logit_cap=cap,
            text_indptr=indices[0], text_indices=indices[1], num_kv_splits=16,
            lse=torch.empty(batch, n_q),
        )  # fmt: skip
    extend_attention(
        q, indptr, pool, pool.clone(), 1, *tables, offsets,
        max_qo_len=9, sm_scale=1.0, logit_cap=cap,
    )  # fmt: skip
    build_flashinfer_tables(
        *tables, offsets, rows=4,
        kv_indptr=torch.empty(n_layers, batch + 1, dtype=torch.int32),
        kv_indices=torch.empty(n_layers, 99, dtype=torch.int32),
        last_page_len=torch.empty(batch, dtype=torch.int32),
    )  # fmt: skip


if __name__ == "__main__":
    assert not launch.INTERPRETED
    install()
    fp8 = FP8_DTYPE
    pass_kernels(torch.bfloat16, torch.bfloat16, 128, "per-head")
    attention_kernels(torch.bfloat16, torch.bfloat16, 128, 28, 4, 0.0)
    attention_kernels(torch.bfloat16, fp8, 128, 32, 8, 30.0)
    if "--all" in sys.argv:
        pass_kernels(torch.float16, fp8, 80, "shared")
        pass_kernels(torch.float32, torch.float32, 256, "shared")
        pass_kernels(torch.bfloat16, fp8, 256, "per-head")
        attention_kernels(torch.float32, torch.float32, 256, 16, 1, 0.0)
        attention_kernels(torch.float16, torch.float16, 80, 12, 12, 0.0)
        attention_kernels(torch.bfloat16, torch.bfloat16, 256, 71, 1, 50.0)
        attention_kernels(torch.float16, fp8, 64, 8, 8, 0.0)
        attention_kernels(torch.float32, fp8, 16, 2, 1, 0.0)
