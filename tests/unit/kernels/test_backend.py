# SPDX-License-Identifier: Apache-2.0
"""Requests' whole lives through pool, pass, table and backend, as on a machine without SGLang."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aircache_sglang.engine.backend import COMPRESSED, PLAIN
from tests.unit.kernels.backend_world import World
from tests.unit.kernels.test_engine_twins import PROMPTS


def test_answers_are_those_of_the_kept_tokens(device: torch.device) -> None:
    """Batches of both kinds in turn; every evicted slot is NaN by then."""
    world = World([PROMPTS[0], 40, PROMPTS[1]], device=device)
    world.prefill()
    first, plain, second = world.requests
    assert first.kept is not None and second.kept is not None
    for requests, label in (
        ([second, plain, first], COMPRESSED),
        ([plain], PLAIN),
        ([first], COMPRESSED),
        ([plain, second], COMPRESSED),
        ([first, second], COMPRESSED),
    ):
        batch, q, k, v = world.step(requests)
        assert world.variant(batch) == label
        stock_forwards = world.backend.forwards
        out = world.run(batch, q, k, v).cpu().double()
        assert (world.backend.forwards > stock_forwards) == (label == PLAIN)
        torch.testing.assert_close(out, world.expected(requests, q), rtol=1e-5, atol=1e-5)


def test_graphs_of_both_variants(device: torch.device) -> None:
    """Captured before any request, replayed with padding for batches of both kinds in turn."""
    world = World([PROMPTS[0], 40, PROMPTS[1]], device=device)
    replay = world.capture(4)
    world.prefill()
    first, plain, second = world.requests
    for requests, label in (
        ([second, plain, first], COMPRESSED),
        ([plain], PLAIN),
        ([plain, second], COMPRESSED),
        ([plain], PLAIN),
    ):
        batch, q, k, v = world.step(requests)
        assert world.variant(batch) == label
        out = replay(batch, q, k, v).cpu().double()
        torch.testing.assert_close(out, world.expected(requests, q), rtol=1e-5, atol=1e-5)


def test_a_row_is_used_again(device: torch.device) -> None:
    """`gap_len` 0 marks it as uncompressed, whatever else is left of it in the table."""
    world = World([PROMPTS[0], 40], device=device, new_tokens=60)
    world.prefill()
    old, plain = world.requests
    assert int(world.table.gap_len[old.row]) == PROMPTS[0].n_visual
    world.table.clear(world.on_device([old.row]))
    old.record = old.kept = None
    world.req_to_token[old.row] = 0
    slots = world.take(30)
    world.req_to_token[old.row, :30] = slots.int()
    old.length = 30
    old.keys, old.values = plain.keys[:, :30], plain.values[:, :30]
    source = world.req_to_token[plain.row, :30].long()
    for plane in (world.pool.k_all, world.pool.v_all):
        plane[:, slots] = plane[:, source]
    batch, q, k, v = world.step([old, plain])
    # in the compressed variant, as beside a compressed request
    world.capturing = COMPRESSED
    out = world.run(batch, q, k, v).cpu().double()
    torch.testing.assert_close(out, world.expected([old, plain], q), rtol=1e-5, atol=1e-5)


def test_no_sglang_is_needed() -> None:
    """So that any machine with a GPU, torch and triton can run tests/gpu."""
    program = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('sglang', 'sgl_kernel', 'flashinfer'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "import tests.unit.kernels.test_backend, tests.gpu.test_kernels_on_gpu\n"
        "import benchmarks.bench_kernels\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=root,
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'kernels'}", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_float8(device: torch.device) -> None:
    world = World(
        [PROMPTS[1], 40, PROMPTS[0]], kv_dtype=torch.float8_e4m3fn, retention=0.5, device=device
    )
    replay = world.capture(4)
    world.prefill()
    for run in (world.run, replay):
        batch, q, k, v = world.step(world.requests)
        out = run(batch, q, k, v).cpu().double()
        expected = world.expected(world.requests, q)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    world = World([PROMPTS[1], 40, PROMPTS[0]], dtype=dtype, retention=0.5, device=device)
    world.prefill()
    batch, q, k, v = world.step(world.requests)
    out = world.run(batch, q, k, v).cpu().double()
    allowed = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(out, world.expected(world.requests, q), rtol=allowed, atol=allowed)
