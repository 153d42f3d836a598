# SPDX-License-Identifier: Apache-2.0
"""The start of a server with kernels: nothing of the pool's tables changes, and costs are found."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aircache_sglang.runtime import warm_up as start
from aircache_sglang.runtime.gate import pays_off
from aircache_sglang.runtime.kernel_decode import KernelDecoder
from aircache_sglang.runtime.kernel_extend import KernelExtender
from aircache_sglang.runtime.kernel_pass import KernelPass
from aircache_sglang.runtime.warm_up import (
    FASTEST,
    TIMED,
    Kernels,
    costs_of,
    measured,
    warm_up,
)
from tests.unit.kernels.test_engine_twins import H_Q, SAME, D, Side, build

ROOT = Path(__file__).parents[3]


def kernels_of(side: Side) -> Kernels:
    pool, table = side.pool, side.inputs.table
    return Kernels(
        KernelPass(side.inputs),
        KernelDecoder(pool, table),
        KernelExtender(pool, table),
        pool,
        table,
        H_Q,
        torch.float32,
        D**-0.5,
    )


def test_the_tables_are_left_as_they_were(device: torch.device) -> None:
    side = build([SAME] * 3, device=device)
    before = [part.clone() for part in side.inputs.table.tables]
    warm_up(kernels_of(side), [1, 3])
    for part, value in zip(side.inputs.table.tables, before, strict=True):
        assert torch.equal(part, value)


def test_what_is_timed_becomes_costs(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """A clock that knows the truth: the costs come back, and the gate goes by them."""
    monkeypatch.setattr(start, "SMALL", 32)
    monkeypatch.setattr(start, "LARGE", 64)
    monkeypatch.setattr(start, "READERS", 2)
    small = tuple((32 if n == 1024 else 64, text, share) for n, text, share in TIMED)
    monkeypatch.setattr(start, "TIMED", small)
    side = build([SAME] * 3, device=device)
    calls = []
    passes = iter([9.0, 14.0, 21.0, 18.0])
    steps = iter([1.0, 1.0 + 2 * 32 * 0.5])

    def clock(run: object, *, queued: bool = False) -> float:
        run()  # type: ignore[operator]
        calls.append(run)
        assert queued == (len(calls) > 4)
        return next(steps if queued else passes)

    seconds = measured(kernels_of(side), clock)
    assert len(calls) == 6 and seconds == [9.0, 14.0, 21.0, 18.0, pytest.approx(0.5)]
    costs = costs_of(seconds, kernels_of(side).least_read)
    for (n, text, share), taken in zip(small, seconds[:4], strict=True):
        m = max(1, round(share * n))
        assert costs.of_pass(n, m, text) == pytest.approx(taken / 0.5)
    assert not pays_off(64, 6, 8, 1, costs) and pays_off(64, 6, 8, 2, costs)
    dear = dataclasses.replace(costs, fixed=costs.fixed + 58 * 9)
    assert not pays_off(64, 6, 8, 9, dear) and pays_off(64, 6, 8, 11, dear)


def test_noise_makes_no_cost_negative() -> None:
    costs = costs_of([1.0, 0.5, 0.4, 0.3, 0.0], 1e-8)
    assert min(costs.fixed, costs.scan, costs.score, costs.pack) >= 0.0


@pytest.mark.parametrize("read", [-1e-9, 0.0, 1e-12])
def test_a_read_that_was_not_seen_is_one_of_the_fastest_memory(read: float) -> None:
    """Qwen2-VL-7B: 57 KB a token. It does not turn compression off."""
    least_read = 2 * 28 * 4 * 128 * 2 / FASTEST
    costs = costs_of([3e-4, 5e-4, 9e-4, 7e-4, read], least_read)
    assert costs.fixed <= 3e-4 / least_read
    assert pays_off(4096, 410, 8, 64, costs) and not pays_off(4096, 410, 8, 3, costs)


def test_nothing_is_compiled_after_the_start(tmp_path: Path) -> None:
    """Compiled for sm_90 without a GPU: what serves requests asks for no code that is not there."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_at_start.py"))],
        env=kept | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["at_start"] >= 12, "fewer than the kernels there are"
    assert found["later"] == [], "compiled while requests wait"
