# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the kernels: its tiny cases, its goals and its plot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench_kernels
from benchmarks.bench_kernels import goals
from benchmarks.kernel_cases import MODELS
from benchmarks.plot_kernels import plot
from benchmarks.records import Row

COMMON: Row = {
    "model": "qwen2-vl-7b", "visual": 16384, "copy_bytes_per_s": 100.0, "smoke": False,
    "device": "a GPU", "dtype": "torch.bfloat16", "of_floor": 1.1, "floor_seconds": 1.0,
    "checked": True,
}  # fmt: skip


def decode(retention: float, moved: float, **more: object) -> Row:
    """One second of decode attention."""
    return {
        "kernel": "decode", "batch": 16, "retention": retention, "bytes": moved, "seconds": 1.0,
        **COMMON, **more,
    }  # fmt: skip


def one_pass(share: float, launches: int) -> Row:
    return {
        "kernel": "pass", "batch": 1, "retention": 0.1, "bytes": 1, "seconds": 1.0,
        "share_of_prefill": share, "launches": launches, **COMMON,
    }  # fmt: skip


def test_smoke(capsys: pytest.CaptureFixture[str]) -> None:
    """Every case passes its check, the launches are counted, and no speed is claimed."""
    assert bench_kernels.main(["--smoke"]) == 0
    said = capsys.readouterr().out
    for kernel in ("score", "budget", "select", "pack", "rows", "pass", "decode", "extend"):
        assert f"\n{kernel} " in f"\n{said}"
    assert "FAILED" not in said and " ms " not in said
    # of one request and of the batch
    assert "launches, at most 8: met (8, 8)" in said
    assert said.count("not measured") == 5


def test_goals() -> None:
    met = [decode(1.0, 85.0), decode(0.1, 77.0), one_pass(0.009, 8)]
    met.append({**decode(1.0, 1.0, ours_over_it=0.99), "kernel": "FlashInfer decode"})
    met.append({**decode(0.1, 88.0), "kernel": "decode mixed"})
    assert [": met (" in line for line in goals(met)] == [True] * 6
    missed = [decode(1.0, 84.0), decode(0.1, 76.0), one_pass(0.011, 9)]
    missed.append({**decode(1.0, 1.0, ours_over_it=1.01), "kernel": "FlashInfer decode"})
    missed.append({**decode(0.1, 86.0), "kernel": "decode mixed"})
    assert ["NOT met (" in line for line in goals(missed)] == [True] * 6
    assert ["not measured" in line for line in goals([])] == [True] * 6


def test_prefill_flop() -> None:
    """Qwen2-7B: about 6.5 billion weights in its layers, two operations a token and weight."""
    model = MODELS["qwen2-vl-7b"]
    assert model.prefill_flop(1) == pytest.approx(2 * 6.53e9, rel=0.01)
    quadratic = model.prefill_flop(20000) - 2 * model.prefill_flop(10000)
    assert quadratic == 2 * 28 * 28 * 128 * 2 * 10000**2


def test_plot(tmp_path: Path) -> None:
    rows = [decode(1.0, 85.0), decode(0.1, 77.0), one_pass(0.009, 8)]
    file = tmp_path / "kernels.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert plot(file).read_bytes().startswith(b"\x89PNG")
    file.write_text(json.dumps({**rows[0], "smoke": True}) + "\n")
    with pytest.raises(ValueError, match="smoke runs claim no speed"):
        plot(file)
