# SPDX-License-Identifier: Apache-2.0
"""What the interpreter cannot show: graphs, syncs, races, far addresses, FlashInfer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aircache_kernels import (
    OnePlanDecode,
    build_flashinfer_tables,
    decode_attention,
    importance_statistics,
    layer_budgets,
    pack,
    reference,
    score,
    select,
)
from aircache_sglang.runtime.kernel_pass import KernelPass
from tests.unit.kernels.cases import (
    DecodeCase,
    Request,
    captured,
    decode_case,
    prefix,
    score_case,
)
from tests.unit.kernels.test_engine_twins import SAME, build

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("device")]

LARGE = [
    Request(900),
    Request(5000, 40, 4000, (1, 799, 400, 400)),
    Request(3000, 0, 2900, (600, 0, 1, 599)),
    Request(1),
]


def large_case(
    device: torch.device, dtype: torch.dtype = torch.bfloat16, **sizes: int
) -> DecodeCase:
    shape = {"n_layers": 4, "n_q": 28, "n_kv": 4, "head_dim": 128, **sizes}
    return decode_case(LARGE, dtype=dtype, device=device, **shape)


def run_pass(device: torch.device) -> tuple[torch.Tensor, ...]:
    """The whole pass in bf16 on two requests; everything on the device before it starts."""
    sizes, columns = [3001, 777], [300, 78]
    case = score_case(
        [64, 512], sizes, n_layers=6, n_q=28, n_kv=4, head_dim=128,
        dtype=torch.bfloat16, device=device,
    )  # fmt: skip
    rows = case.k_all.shape[1]
    k_all = torch.cat((case.k_all, case.k_all[:, :378]), dim=1)
    v_all = -k_all
    m = torch.tensor(columns, dtype=torch.int32, device=device)
    column_indptr = prefix(columns, device)
    target = torch.arange(378, device=device) + rows
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        importance = score(
            case.q, case.qo_indptr, k_all, case.text_indices, case.kv_indptr, case.kv_indices,
            max_qo_len=512, max_kv_len=3001, sm_scale=case.sm_scale,
        )  # fmt: skip
        statistics = importance_statistics(importance, case.kv_indptr, max_kv_len=3001)
        budgets, offsets = layer_budgets(statistics, case.kv_indptr, m)
        selected = select(
            importance, case.kv_indptr, offsets, column_indptr,
            total_columns=378, max_kv_len=3001,
        )  # fmt: skip
        pack(
            k_all, v_all, selected, case.kv_indptr, case.kv_indices, offsets, column_indptr,
            target, max_columns=300,
        )  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = reference.select_reference(importance, case.kv_indptr, budgets)
    assert torch.equal(selected, expected)
    return importance, statistics, budgets, selected, k_all, v_all


def test_the_pass_does_not_sync_and_repeats_bit_for_bit(device: torch.device) -> None:
    first = run_pass(device)
    for _ in range(10):
        for got, want in zip(run_pass(device), first, strict=True):
            assert torch.equal(got.nan_to_num(3.0), want.nan_to_num(3.0))


def test_the_served_pass_does_not_sync(device: torch.device) -> None:
    """The engine's pass, host integers, row and table included; SGLang need not be installed."""
    side = build([SAME] * 3, device=device)
    run = KernelPass(side.inputs)
    run(side.jobs)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(side.jobs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_decode_repeats_bit_for_bit(device: torch.device) -> None:
    """A race would show as another result under another schedule."""
    case = large_case(device)
    first = [decode_attention(*case.inputs(layer), sm_scale=0.09) for layer in range(4)]
    for _ in range(30):
        for layer in range(4):
            assert torch.equal(decode_attention(*case.inputs(layer), sm_scale=0.09), first[layer])


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_default_launch_shape(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    case = large_case(device, dtype, head_dim=head_dim)
    for layer in range(4):
        got = decode_attention(*case.inputs(layer), sm_scale=0.09)
        truth = reference.decode_attention_reference(*case.inputs(layer), sm_scale=0.09)
        eager = reference.decode_attention_reference(
            *case.inputs(layer), sm_scale=0.09, dtype=dtype
        )
        rounding = torch.finfo(dtype).eps * truth.abs().max()
        allowed = 2 * (eager.double() - truth).abs().max() + rounding
        assert (got.double() - truth).abs().max() <= allowed


def test_cuda_graph_with_padded_rows(device: torch.device) -> None:
    """Captured with padding, replayed with other requests: tables are read in the graph."""
    case = large_case(device)
    live = case.req_pool_indices.clone(), case.seq_lens.clone()
    case.req_pool_indices.zero_()
    case.seq_lens.fill_(1)

    def step() -> torch.Tensor:
        return decode_attention(*case.inputs(1), sm_scale=0.09)

    graph, out = captured(step)
    graph.replay()
    assert out.isfinite().all()
    case.req_pool_indices.copy_(live[0])
    case.seq_lens.copy_(live[1])
    graph.replay()
    assert torch.equal(out, decode_attention(*case.inputs(1), sm_scale=0.09))


def test_rows_beyond_2_31_elements(device: torch.device) -> None:
    far = 34_000_000 // 16
    free, _ = torch.cuda.mem_get_info()
    small = large_case(device)
    n_layers, rows, n_kv, head_dim = small.k_all.shape
    if free < 2 * n_layers * (far + rows) * n_kv * head_dim * 2 + (2 << 30):
        pytest.skip(f"needs about 20 GiB of free GPU memory, got {free >> 30} GiB")
    want = [decode_attention(*small.inputs(layer), sm_scale=0.09) for layer in range(n_layers)]
    pools = []
    for source in (small.k_all, small.v_all):
        pool = torch.empty(n_layers, far + rows, n_kv, head_dim, dtype=source.dtype, device=device)
        pool[:, far:] = source
        pools.append(pool)
    small.k_all, small.v_all = pools
    small.req_to_token[small.req_to_token < rows] += far
    assert (n_layers - 1) * small.k_all.stride(0) > 2**31
    for layer in range(n_layers):
        assert torch.equal(decode_attention(*small.inputs(layer), sm_scale=0.09), want[layer])


def test_one_plan_flashinfer_decode(device: torch.device) -> None:
    pytest.importorskip("flashinfer")
    case = large_case(device)
    case.k_all, case.v_all = case.k_all.nan_to_num(0.0), case.v_all.nan_to_num(0.0)
    n_layers, rows, n_kv, head_dim = case.k_all.shape
    batch = case.q.shape[0]
    tables = (
        torch.empty(n_layers, batch + 1, dtype=torch.int32, device=device),
        torch.zeros(n_layers, 12000, dtype=torch.int32, device=device),
        torch.empty(batch, dtype=torch.int32, device=device),
    )
    build_flashinfer_tables(
        *case.requests(), rows=rows,
        kv_indptr=tables[0], kv_indices=tables[1], last_page_len=tables[2],
    )  # fmt: skip
    decode = OnePlanDecode(
        torch.empty(128 << 20, dtype=torch.uint8, device=device),
        n_layers=n_layers, rows=rows, n_q=28, n_kv=n_kv, head_dim=head_dim,
        q_dtype=case.q.dtype, kv_dtype=case.k_all.dtype, sm_scale=0.09,
    )  # fmt: skip
    most = (tables[0][:, 1:] - tables[0][:, :-1]).amax(0).cpu()
    decode.plan(most, *tables)
    for layer in range(n_layers):
        got = decode.run(case.q, case.k_all, case.v_all, layer)
        truth = reference.decode_attention_reference(*case.inputs(layer), sm_scale=0.09)
        torch.testing.assert_close(got.double(), truth, rtol=0.02, atol=0.02)


def test_compute_sanitizer_finds_no_race(device: torch.device, tmp_path: Path) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    program = (
        "import torch\n"
        "from tests.gpu.test_kernels_on_gpu import large_case, run_pass\n"
        "from aircache_kernels import decode_attention\n"
        "device = torch.device('cuda')\n"
        "case = large_case(device)\n"
        "decode_attention(*case.inputs(1), sm_scale=0.09)\n"
        "run_pass(device)\n"
    )
    script = tmp_path / "program.py"
    script.write_text(program)
    root = Path(__file__).parents[2]
    paths = os.pathsep.join((str(root), str(root / "kernels")))
    for tool in ("memcheck", "racecheck"):
        done = subprocess.run(
            [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, str(script)],
            env={**os.environ, "PYTHONPATH": paths, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
