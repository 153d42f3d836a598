# SPDX-License-Identifier: Apache-2.0
"""Machine code of every kernel for GPUs that are not there: what fits, and what spills.

The usual run covers every kernel on every kind of GPU in every type that the server can ask for,
at one shape; `make test-compile` goes through all served shapes and all that the kernels accept
besides.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import aircache_kernels

ROOT = Path(__file__).parents[3]
KERNELS = {
    "_elite_fwd_kernel",
    "_lse_fwd_kernel",
    "_importance_fwd_kernel",
    "_statistics_fwd_kernel",
    "_budgets_fwd_kernel",
    "_histogram_fwd_kernel",
    "_global_budgets_fwd_kernel",
    "_select_fwd_kernel",
    "_pack_fwd_kernel",
    "_rows_fwd_kernel",
    "_decode_stage1_kernel",
    "_decode_stage2_kernel",
    "_extend_fwd_kernel",
    "_page_tables_kernel",
}
# KiB of shared memory that one block may have (CUDA's programming guide, compute capabilities).
SHARED = {80: 163, 89: 99, 90: 227, 100: 227}
# Bytes of stack a thread, which is what spills: none in what every step and every token passes. The
# budgets are one small block a request, a tile of layers by layers in float64; scores of float32
# models take IEEE products.
STACK = dict.fromkeys(KERNELS, 0) | {
    "_budgets_fwd_kernel": 4096,
    "_statistics_fwd_kernel": 64,
    "_lse_fwd_kernel": 512,
    "_elite_fwd_kernel": 64,
    "_importance_fwd_kernel": 64,
}


def compile_all(cache: Path, capability: int, shape: str, types: str, *more: str) -> None:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    package = str(Path(aircache_kernels.__file__).parents[1])
    script = str(Path(__file__).with_name("compile_for_gpu.py"))
    asked = ["--capability", str(capability), "--shape", shape, "--types", types, *more]
    done = subprocess.run(
        [sys.executable, script, *asked],
        # A cache of its own: what was compiled before is no proof.
        env=kept
        | {"PYTHONPATH": os.pathsep.join((package, str(ROOT))), "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=850,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert {record["kernel"] for record in records} == KERNELS
    for record in records:
        assert record["shared"] <= SHARED[capability] * 1024, record
        # No model is served in float32 on a GPU but to compare.
        spare = 8192 if types.startswith("f32") else 0
        assert record["stack"] <= max(spare, STACK[record["kernel"]]), record
        # More would leave a multiprocessor's 65,536 registers to a single block.
        assert record["registers"] * record["num_warps"] * 32 <= 65536, record


@pytest.mark.parametrize("types", ["bf16", "f16", "f32", "bf16-fp8"])
@pytest.mark.parametrize("capability", SHARED)
def test_every_gpu_and_type(capability: int, types: str, tmp_path: Path) -> None:
    if types.endswith("fp8") and capability < 89:
        pytest.skip("Triton compiles no float8_e4m3fn below 8.9, and the server refuses it")
    elite = "shared" if types in ("f16", "f32") else "per-head"
    compile_all(tmp_path, capability, "qwen2-vl-7b", types, "--elite", elite)


def test_arguments_that_are_1(tmp_path: Path) -> None:
    compile_all(tmp_path, 90, "ones", "bf16", "--batch", "1")


def test_batches(tmp_path: Path) -> None:
    """Each power of two has its code: as many as decode graphs are captured for."""
    batches = itertools.chain(*(("--batch", str(1 << n)) for n in (0, 5, 6, 8, 9, 10)))
    compile_all(tmp_path, 90, "internvl-1b", "bf16", *batches)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [
        *("qwen2-vl-2b", "qwen2-vl-72b", "qwen2.5-vl-3b", "qwen3-vl-8b", "qwen3-vl-30b"),
        *("internvl-1b", "internvl-26b", "glm-4.1v-9b", "glm-4.5v", "llava-1.5-7b"),
        *("head of 256", "head of 80", "head of 16", "group of 71"),
    ],
)
@pytest.mark.parametrize("capability", SHARED)
def test_every_shape(capability: int, shape: str, tmp_path: Path) -> None:
    types = ["bf16", "f16", "f32", *(["bf16-fp8", "f16-fp8", "f32-fp8"] if capability > 80 else [])]
    for kind, elite in itertools.product(types, ("per-head", "shared")):
        compile_all(tmp_path, capability, shape, kind, "--elite", elite)
