# SPDX-License-Identifier: Apache-2.0
"""Imports, launches of the whole pass, and pools beyond 2^31 elements."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

import aircache_kernels
from aircache_kernels import (
    OnePlanDecode,
    decode_attention,
    extend_attention,
    pack,
    reference,
    score,
)
from aircache_kernels.launch import INTERPRETED
from tests.unit.kernels.cases import Request, decode_case, prefix, score_case

ROOT = Path(__file__).parents[3]


def python(
    source: list[str], timeout: float, **environment: str
) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    package = str(Path(aircache_kernels.__file__).parents[1])
    kept["PYTHONPATH"] = os.pathsep.join((package, str(ROOT)))
    return subprocess.run(
        [sys.executable, *source],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_import_needs_torch_alone() -> None:
    """The package, its validator and the oracles import with triton and sglang blocked."""
    program = """
import sys
for name in ("triton", "sglang", "flashinfer", "aircache_sglang", "aircache_patches"):
    sys.modules[name] = None
import aircache_kernels, torch
from aircache_kernels import reference, validation
from aircache_kernels import OnePlanDecode
k = torch.arange(8.0).view(2, 4, 1, 1)
table = torch.tensor([[0, 1]], dtype=torch.int32)
zero = torch.zeros(1, dtype=torch.int32)
tables = aircache_kernels.Tables(table, zero, zero, torch.zeros(1, 3, dtype=torch.int32))
found = reference.physical_rows_reference(2, 4, 1, tables, zero, zero + 2)
print([rows.tolist() for rows in found])
try:
    aircache_kernels.score
except ImportError:
    print("needs triton")
"""
    done = python(["-c", program], 120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[[4, 5]]", "needs triton"]


def test_the_engine_s_kernel_classes_need_no_sglang() -> None:
    """Any machine with torch and triton can run pass, decode and extend of the engine."""
    names = ("kernel_pass", "kernel_decode", "kernel_extend", "flashinfer_decode", "decode")
    program = f"""
import importlib, sys
sys.modules["sglang"] = None
for name in {names}:
    importlib.import_module("aircache_sglang.runtime." + name)
"""
    done = python(["-c", program], 120, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


def test_names() -> None:
    for name in aircache_kernels.__all__:
        assert callable(getattr(aircache_kernels, name))
    with pytest.raises(AttributeError, match="has no attribute 'scores'"):
        aircache_kernels.scores  # noqa: B018


def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels of the pass launched from here on."""
    from aircache_kernels import budgets, packing, rows, scoring, selection, threshold

    seen: list[str] = []
    for module in (scoring, budgets, threshold, selection, packing, rows):
        for name in [name for name in vars(module) if name.endswith("_fwd_kernel")]:
            kernel = getattr(module, name)

            class Counted:
                def __init__(self, name: str, kernel: object) -> None:
                    self.name, self.kernel = name, kernel

                def __getitem__(self, grid: object) -> object:
                    seen.append(self.name)
                    return self.kernel[grid]

            monkeypatch.setattr(module, name, Counted(name, kernel))
    return seen


@pytest.mark.parametrize("n_layers", [1, 5])
def test_score_to_pack_is_seven_launches(
    n_layers: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """End to end; the number of launches does not depend on L or B."""
    seen = launches(monkeypatch)
    sizes, columns = [20, 33], [4, 9]
    case = score_case([5, 7], sizes, n_layers=n_layers, device=device)
    k_all = torch.cat((case.k_all, torch.zeros_like(case.k_all)[:, :13]), dim=1)
    v_all = k_all * 2
    importance = score(
        case.q, case.qo_indptr, k_all, case.text_indices, case.kv_indptr, case.kv_indices,
        max_qo_len=7, max_kv_len=33, sm_scale=case.sm_scale,
    )  # fmt: skip
    statistics = aircache_kernels.importance_statistics(importance, case.kv_indptr, max_kv_len=33)
    m = torch.tensor(columns, dtype=torch.int32, device=device)
    budgets, offsets = aircache_kernels.layer_budgets(statistics, case.kv_indptr, m)
    column_indptr = prefix(columns, device)
    selected = aircache_kernels.select(
        importance, case.kv_indptr, offsets, column_indptr, total_columns=13, max_kv_len=33
    )
    target = torch.arange(13, device=device) + case.k_all.shape[1]
    arguments = (
        selected, case.kv_indptr, case.kv_indices, offsets, column_indptr, target,
    )  # fmt: skip
    want = reference.pack_reference(k_all, v_all, *arguments)
    pack(k_all, v_all, *arguments, max_columns=9)
    assert len(seen) == 7
    assert torch.equal(selected, reference.select_reference(importance, case.kv_indptr, budgets))
    for got, expected in zip((k_all, v_all), want, strict=True):
        assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))


def sparse_pool(n_layers: int, rows: int, n_kv: int, head_dim: int) -> torch.Tensor:
    """float32 [n_layers, rows, n_kv, head_dim] in address space that is backed only where touched.

    Anonymous memory without reservation: pages exist once written, so rows beyond 2^31 elements
    are real memory at real addresses, and a wrapped address would miss them.
    """
    size = n_layers * rows * n_kv * head_dim
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    area = mmap.mmap(-1, size * 4, flags=flags)
    pool = torch.from_numpy(numpy.frombuffer(area, dtype=numpy.float32))
    return pool.view(n_layers, rows, n_kv, head_dim)


on_cpu = pytest.mark.skipif(not INTERPRETED, reason="tests/gpu has the like on the GPU's memory")


MAP_NORESERVE = 0x4000  # Linux; Python 3.11's mmap has no name for it
# rows of a plane: plane * stride or slot * stride alone exceeds 2^31 while the stride does not
FAR = pytest.mark.parametrize("far", [20_000_000, 34_000_000])


@on_cpu
@FAR
def test_decode_beyond_2_31_elements(far: int) -> None:
    device = torch.device("cpu")
    requests = [Request(40, 5, 30, (1, 29, 9)), Request(12)]
    small = decode_case(requests, device=device)
    n_layers, rows, n_kv, head_dim = small.k_all.shape
    k_all = sparse_pool(n_layers, far + rows, n_kv, head_dim)
    v_all = sparse_pool(n_layers, far + rows, n_kv, head_dim)
    assert max((n_layers - 1) * k_all.stride(0), far * k_all.stride(1)) > 2**31
    k_all[:, far:], v_all[:, far:] = small.k_all, small.v_all
    want = [decode_attention(*small.inputs(layer), sm_scale=0.2) for layer in range(n_layers)]
    small.req_to_token[small.req_to_token < rows] += far
    small.k_all, small.v_all = k_all, v_all
    for layer in range(n_layers):
        got = decode_attention(*small.inputs(layer), sm_scale=0.2)
        assert torch.equal(got, want[layer])


@on_cpu
@FAR
def test_score_and_pack_beyond_2_31_elements(far: int) -> None:
    device = torch.device("cpu")
    case = score_case([6], [30], n_layers=3, device=device)
    rows = case.k_all.shape[1]
    case.k_all = case.k_all.nan_to_num(0.0)
    options = {"max_qo_len": 6, "max_kv_len": 30, "sm_scale": 0.2}
    want = score(*case.inputs(), **options)
    pool = sparse_pool(3, far + rows + 3, 2, 32)
    pool[:, far : far + rows] = case.k_all
    q, qo, small, text, kv, slots = case.inputs()
    assert torch.equal(score(q, qo, pool, text + far, kv, slots + far, **options), want)

    selected = torch.randperm(30, generator=torch.Generator().manual_seed(0))[:9]
    selected = selected.to(torch.int32).expand(2, 9).contiguous()
    offsets = torch.tensor([[0, 1, 8, 9]], dtype=torch.int32)
    columns = prefix([3], device)
    target = torch.arange(3) + rows
    near = torch.cat((small, torch.zeros(3, 3, 2, 32)), dim=1)
    k_want, _ = reference.pack_reference(
        near, near, selected, kv, slots, offsets, columns, target
    )  # fmt: skip
    pool[:, far + rows :] = float("nan")
    pack(pool, pool, selected, kv, slots + far, offsets, columns, target + far, max_columns=3)
    assert torch.equal(pool[:, far:], k_want)


@on_cpu
@FAR
def test_extend_beyond_2_31_elements(far: int) -> None:
    requests = [Request(40, 5, 30, (1, 29, 9)), Request(12)]
    small = decode_case(requests, device=torch.device("cpu"))
    n_layers, rows, n_kv, head_dim = small.k_all.shape
    q = torch.randn(9, *small.q.shape[1:], generator=torch.Generator().manual_seed(0))
    qo_indptr, options = prefix([4, 5], q.device), {"max_qo_len": 5, "sm_scale": 0.2}

    def run() -> list[torch.Tensor]:
        layers = [small.inputs(layer)[1:] for layer in range(n_layers)]
        return [extend_attention(q, qo_indptr, *inputs, **options) for inputs in layers]

    want = run()
    for name in ("k_all", "v_all"):
        pool = sparse_pool(n_layers, far + rows, n_kv, head_dim)
        pool[:, far:] = getattr(small, name)
        setattr(small, name, pool)
    small.req_to_token[small.req_to_token < rows] += far
    for got, expected in zip(run(), want, strict=True):
        assert torch.equal(got, expected)


def test_one_plan_decode_refuses_what_is_unsafe() -> None:
    options = {
        "n_q": 8,
        "n_kv": 8,
        "head_dim": 64,
        "q_dtype": torch.float16,
        "kv_dtype": torch.float16,
        "sm_scale": 1.0,
    }
    workspace = torch.empty(1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="must be a multiple of H_kv=3, got H_q=8"):
        OnePlanDecode(workspace, n_layers=2, rows=9, **{**options, "n_kv": 3})
    with pytest.raises(ValueError, match=r"L \* rows < 2\*\*31"):
        OnePlanDecode(workspace, n_layers=2, rows=2**30, **{**options, "n_kv": 2})
