# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel to machine code for an NVIDIA GPU, on a machine without one.

Run by test_package.py in a process of its own, since it replaces Triton's driver. Prints one JSON
line per compiled kernel: name, shared memory in bytes, num_warps.
"""

from __future__ import annotations

import argparse
import functools
import json
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
    lay_out_rows,
    layer_budgets,
    pack,
    score,
    select,
)
from aircache_kernels.validation import FP8_DTYPE
from tests.unit.kernels.cases import prefix, score_case


class CompileOnlyDriver:
    """What `JITFunction.run(warmup=True)` asks of a driver."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def install(capability: int) -> None:
    triton.runtime.driver.set_active(CompileOnlyDriver(capability))
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


def pass_kernels(
    dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int, elite: str, *, ones: bool = False
) -> None:
    """The pass in the shape of a 7B model; `ones`: every count that can be 1 is."""
    device = torch.device("cpu")
    n_layers, n_q, n_kv = (1, 1, 1) if ones else (28, 28, 4)
    n_text, n_visual, most = (1, 1, 1) if ones else (512, 100, 16384)
    case = score_case(
        [n_text], [n_visual], n_layers=n_layers, n_q=n_q, n_kv=n_kv, head_dim=head_dim,
        dtype=dtype, kv_dtype=kv_dtype, device=device,
    )  # fmt: skip
    importance = score(
        *case.inputs(), max_qo_len=n_text, max_kv_len=most, sm_scale=1.0, elite=elite
    )  # fmt: skip
    statistics = importance_statistics(importance, case.kv_indptr, max_kv_len=most)
    columns = torch.ones(1, dtype=torch.int32)
    table = torch.zeros(4, n_layers + 1, dtype=torch.int32)
    _, offsets = layer_budgets(
        statistics, case.kv_indptr, columns, cell_offset=table, req_pool_indices=columns.long()
    )
    selected = select(
        importance, case.kv_indptr, offsets, prefix([1], device),
        total_columns=1, max_kv_len=most,
        mass=torch.empty(1, n_layers, n_kv, dtype=torch.float64),
    )  # fmt: skip
    lay_out_rows(
        torch.zeros(4, 1 if ones else 64, dtype=torch.int32), columns, columns, case.kv_indptr,
        prefix([1], device), case.kv_indices[:1], prefix([0], device), case.kv_indices[:0],
        columns.new_zeros(4), columns.new_zeros(4),
    )  # fmt: skip
    for in_place in (False, True):
        pack(
            case.k_all, case.k_all.clone(), selected, case.kv_indptr, case.kv_indices, offsets,
            prefix([1], device), case.kv_indices[:1], max_columns=1, in_place=in_place,
            max_scratch_bytes=1 if ones else 1 << 20,
        )  # fmt: skip


def attention_kernels(
    dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int, n_q: int, n_kv: int, cap: float,
    *, ones: bool = False,
) -> None:  # fmt: skip
    """Decode and extend attention and the page tables; `ones`: every count that can be 1 is."""
    n_layers, batch, context, capacity, splits = (1, 1, 1, 1, 1) if ones else (28, 16, 64, 99, 16)
    pool = torch.zeros(n_layers, context, n_kv, head_dim).to(kv_dtype)
    tables = (
        torch.zeros(4, context, dtype=torch.int32),
        torch.zeros(batch, dtype=torch.int64),
        torch.ones(batch, dtype=torch.int64),
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(4, dtype=torch.int32),
    )
    offsets = torch.zeros(4, n_layers + 1, dtype=torch.int32)
    indptr = torch.zeros(batch + 1, dtype=torch.int32)
    csr = build_text_csr(
        *tables, text_indptr=indptr, text_indices=torch.zeros(capacity, dtype=torch.int32)
    )
    q = torch.zeros(batch, n_q, head_dim, dtype=dtype)
    layer = 0 if ones else 1
    for indices in (csr, (None, None)):
        decode_attention(
            q, pool, pool.clone(), layer, *tables, offsets, sm_scale=1.0, logit_cap=cap,
            text_indptr=indices[0], text_indices=indices[1], num_kv_splits=splits,
            lse=torch.empty(batch, n_q),
        )  # fmt: skip
    extend_attention(
        q, indptr, pool, pool.clone(), layer, *tables, offsets,
        max_qo_len=1 if ones else 9, sm_scale=1.0, logit_cap=cap,
    )  # fmt: skip
    build_flashinfer_tables(
        *tables, offsets, rows=context,
        kv_indptr=torch.empty(n_layers, batch + 1, dtype=torch.int32),
        kv_indices=torch.empty(n_layers, capacity, dtype=torch.int32),
        last_page_len=torch.empty(batch, dtype=torch.int32),
    )  # fmt: skip


if __name__ == "__main__":
    assert not launch.INTERPRETED
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, default=90, help="80, 89 or 90")
    parser.add_argument("--shapes", choices=["usual", "other"], default="usual")
    arguments = parser.parse_args()
    install(arguments.capability)
    f16, bf16, f32 = torch.float16, torch.bfloat16, torch.float32
    # Triton has no fp8 below 8.9
    fp8 = FP8_DTYPE if arguments.capability >= 89 else None
    if arguments.shapes == "usual":
        pass_kernels(bf16, bf16, 128, "per-head")
        attention_kernels(bf16, bf16, 128, 28, 4, 0.0)
        attention_kernels(bf16, fp8 or bf16, 128, 32, 8, 30.0)
        # an argument that is 1 is a compile-time constant to Triton, not a tensor
        pass_kernels(bf16, bf16, 16, "per-head", ones=True)
        attention_kernels(bf16, bf16, 16, 1, 1, 0.0, ones=True)
    else:
        pass_kernels(f16, fp8 or f16, 80, "shared")
        pass_kernels(f32, f32, 256, "shared")
        pass_kernels(bf16, fp8 or bf16, 256, "per-head")
        attention_kernels(f32, f32, 256, 16, 1, 0.0)
        attention_kernels(f16, f16, 80, 12, 12, 0.0)
        attention_kernels(bf16, bf16, 256, 71, 1, 50.0)
        attention_kernels(f16, fp8 or f16, 64, 8, 8, 0.0)
        attention_kernels(f32, fp8 or f32, 16, 2, 1, 0.0)
