# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel to machine code for an NVIDIA GPU, on a machine without one.

Run by test_compile.py in a process of its own, since it replaces Triton's driver. Prints one JSON
line per compiled kernel: name, warps, shared memory and stack in bytes, registers a thread.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from aircache_kernels import (
    Tables,
    build_flashinfer_tables,
    decode_attention,
    extend_attention,
    global_budgets,
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

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


class Shape(NamedTuple):
    """Of a model's decoder, on one rank."""

    layers: int
    n_q: int
    n_kv: int
    head_dim: int


# The served families: Qwen2-VL 2B, 7B (LLaVA-OneVision and -NeXT-Video 7B too) and 72B, Qwen2.5-VL
# 3B, Qwen3-VL 8B (InternVL 8B), Qwen3-VL 30B-A3B, InternVL 1B (LLaVA-OneVision 0.5B), InternVL 26B.
SERVED = {
    "qwen2-vl-2b": Shape(28, 12, 2, 128),
    "qwen2-vl-7b": Shape(28, 28, 4, 128),
    "qwen2-vl-72b": Shape(80, 64, 8, 128),
    "qwen2.5-vl-3b": Shape(36, 16, 2, 128),
    "qwen3-vl-8b": Shape(36, 32, 8, 128),
    "qwen3-vl-30b": Shape(48, 32, 4, 128),
    "internvl-1b": Shape(24, 14, 2, 64),
    "internvl-26b": Shape(48, 48, 8, 128),
    "glm-4.1v-9b": Shape(40, 32, 2, 128),
    "glm-4.5v": Shape(46, 96, 8, 128),
    "llava-1.5-7b": Shape(32, 32, 32, 128),
}
# Beyond them: all that the kernels accept.
OTHERS = {
    "head of 256": Shape(28, 16, 1, 256),
    "head of 80": Shape(28, 12, 12, 80),
    "head of 16": Shape(28, 2, 1, 16),
    "group of 71": Shape(28, 71, 1, 64),
    # An argument that is 1 is a compile-time constant to Triton, not a tensor.
    "ones": Shape(1, 1, 1, 16),
}
SHAPES = SERVED | OTHERS
TYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "f16": (torch.float16, torch.float16),
    "f32": (torch.float32, torch.float32),
    "bf16-fp8": (torch.bfloat16, FP8_DTYPE),
    "f16-fp8": (torch.float16, FP8_DTYPE),
    "f32-fp8": (torch.float32, FP8_DTYPE),
}


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


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack a thread: what does not fit in registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = USAGE.search(said)
    assert found, said
    return int(found[1]), int(found[2])


def install(capability: int) -> None:
    triton.runtime.driver.set_active(CompileOnlyDriver(capability))
    run = JITFunction.run

    @functools.wraps(run)
    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        registers, stack = resources(kernel.asm["cubin"])
        record = {
            "kernel": self.__name__,
            "shared": kernel.metadata.shared,
            "num_warps": kernel.metadata.num_warps,
            "registers": registers,
            "stack": stack,
        }
        print(json.dumps(record), flush=True)
        return kernel

    JITFunction.run = compile_only


def pass_kernels(shape: Shape, dtype: torch.dtype, kv_dtype: torch.dtype, elite: str) -> None:
    device, ones = torch.device("cpu"), shape.layers == 1
    n_text, n_visual, most = (1, 1, 1) if ones else (512, 100, 16384)
    n_layers, n_q, n_kv, head_dim = shape
    case = score_case(
        [n_text], [n_visual], n_layers=n_layers, n_q=n_q, n_kv=n_kv, head_dim=head_dim,
        dtype=dtype, kv_dtype=kv_dtype, device=device,
    )  # fmt: skip
    importance = score(
        case.q, case.qo_indptr, case.k_all, case.text_indices.int(), case.kv_indptr,
        case.kv_indices, max_qo_len=n_text, max_kv_len=most, sm_scale=1.0, elite=elite,
    )  # fmt: skip
    statistics = importance_statistics(importance, case.kv_indptr, max_kv_len=most)
    columns = torch.ones(1, dtype=torch.int32)
    table = torch.zeros(4, n_layers + 1, dtype=torch.int32)
    for budget in ("aircache", "uniform", "strength", "skewness"):
        _, offsets = layer_budgets(
            statistics, case.kv_indptr, columns, budget=budget,
            cell_offset=table, req_pool_indices=columns,
        )  # fmt: skip
    global_budgets(
        importance, case.kv_indptr, columns, max_kv_len=most,
        cell_offset=table, req_pool_indices=columns,
    )  # fmt: skip
    selected = select(
        importance, case.kv_indptr, offsets, prefix([1], device),
        total_columns=1, max_kv_len=most,
        mass=torch.empty(1, n_layers, n_kv, dtype=torch.float64),
    )  # fmt: skip
    tables = Tables(
        torch.zeros(4, 1 if ones else 64, dtype=torch.int32),
        columns.new_zeros(4),
        columns.new_zeros(4),
        table,
    )
    lay_out_rows(
        tables, columns, columns, case.kv_indptr,
        prefix([1], device), case.kv_indices[:1], prefix([0], device), case.kv_indices[:0],
    )  # fmt: skip
    pack(
        case.k_all, case.k_all.clone(), selected, case.kv_indptr, case.kv_indices, offsets,
        prefix([1], device), case.kv_indices[:1], max_columns=1,
    )  # fmt: skip


def attention_kernels(
    shape: Shape, dtype: torch.dtype, kv_dtype: torch.dtype, batches: list[int]
) -> None:
    """Decode of some batch sizes, extend attention and the page tables."""
    n_layers, n_q, n_kv, head_dim = shape
    context = 1 if n_layers == 1 else 64
    pool = torch.zeros(n_layers, context, n_kv, head_dim).to(kv_dtype)
    four = torch.zeros(4, dtype=torch.int32)
    offsets = torch.zeros(4, n_layers + 1, dtype=torch.int32)
    tables = Tables(torch.zeros(4, context, dtype=torch.int32), four, four.clone(), offsets)
    for batch in batches:
        rows, lens = torch.zeros(batch, dtype=torch.int64), torch.ones(batch, dtype=torch.int64)
        q = torch.zeros(batch, n_q, head_dim, dtype=dtype)
        decode_attention(q, pool, pool.clone(), 0, tables, rows, lens, sm_scale=1.0)
    for tree in (None, torch.ones(batch, 9, 9, dtype=torch.bool)):
        extend_attention(
            q, torch.zeros(batch + 1, dtype=torch.int32), pool, pool.clone(), 0, tables, rows, lens,
            max_qo_len=9, sm_scale=1.0, tree=tree,
        )  # fmt: skip
    build_flashinfer_tables(
        tables, rows, lens, rows=context,
        kv_indptr=torch.empty(n_layers, batch + 1, dtype=torch.int32),
        kv_indices=torch.empty(n_layers, 99, dtype=torch.int32),
        last_page_len=torch.empty(batch, dtype=torch.int32),
    )  # fmt: skip


if __name__ == "__main__":
    assert not launch.INTERPRETED
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, required=True)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--types", choices=TYPES, required=True)
    parser.add_argument("--elite", choices=["per-head", "shared"], default="per-head")
    parser.add_argument("--batch", type=int, action="append", help="of decode; default 16")
    arguments = parser.parse_args()
    install(arguments.capability)
    dtype, kv_dtype = TYPES[arguments.types]
    shape = SHAPES[arguments.shape]
    pass_kernels(shape, dtype, kv_dtype, arguments.elite)
    attention_kernels(shape, dtype, kv_dtype, arguments.batch or [16])
