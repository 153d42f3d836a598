# SPDX-License-Identifier: Apache-2.0
"""The laboratory on a real server: as its users run it, cut off, and with a video."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from aircache_sglang.platform import has_accelerator
from aircache_sglang.testing import Server
from benchmarks.quality.client import Client
from benchmarks.quality.datasets import load
from benchmarks.quality.grid import read
from benchmarks.quality.report import BEGIN, END, report
from benchmarks.quality.settings import FULL, PRUNING, Setting
from benchmarks.records import identity
from tests.support.datasets import make_docvqa, make_mmbench, make_mmbench_video

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(has_accelerator(), reason="for a machine without an accelerator"),
]
ROOT = Path(__file__).parents[2]
STAND_INS = ROOT / "tests" / "stand_ins"
VISUAL = 80


def quality(*arguments: Any, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.quality", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | env,
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_policies_and_pruning(aircache_server: Server, tmp_path: Path) -> None:
    """3 samples under the full cache, 2 x 2 policies, 3 x 2 settings of pruning."""
    file, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    arguments = ["--url", aircache_server.url, "--dataset", "docvqa", "--file", file]
    arguments += ["--path", make_docvqa(tmp_path), "--policies", "snapkv", "aircache"]
    done = quality(*arguments, "--retentions", 0.5, 0.1, "--grid", "table1", "--grid", "table4")
    assert done.returncode == 0, done.stderr
    assert "33/33 rows, 0 old" in done.stderr
    (run,), rows = read(file)
    assert run["weights"] and run["model"] == Path(aircache_server.model).name
    assert len({identity(row["key"]) for row in rows}) == len(rows) == 33
    for row in rows:
        setting = row["key"]["setting"]
        assert row["answer"] and 0 <= row["score"] <= 1
        if setting["policy"] == FULL:
            assert "columns" not in row
            continue
        assert row["visual_tokens"] == VISUAL
        assert row["columns"] == round(VISUAL * setting["retention"])
        if setting["policy"] not in PRUNING:
            assert len(row["layer_budgets"]) == 4
            assert sum(row["layer_budgets"]) == 4 * row["columns"]
            # The prefill draws the first token from the whole cache.
            assert row["same"] >= 1 and 0 <= row["divergence"] <= 1
    page.write_text(f"{BEGIN}{END}")
    report(file, page)
    text = page.read_text()
    assert "3 samples, all kinds" in text and "### Token pruning (table 4), 3 samples" in text
    assert "were to be compressed" not in text


def test_a_server_of_its_own_and_a_video(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    arguments = ["--model", checkpoint, "--dataset", "mmbench-video", "--file", file]
    arguments += ["--path", make_mmbench_video(tmp_path), "--policies", "aircache"]
    done = quality(*arguments, "--retentions", 0.5, PYTHONPATH=str(STAND_INS))
    assert done.returncode == 0, done.stderr
    full, half = read(file)[1]
    assert full["answer"] and "columns" not in full
    # Four of the eight frames, two a step; SGLang enlarges a frame to 12 x 12 tokens, above 128.
    assert half["visual_tokens"] == 288 and half["columns"] == 144


def test_a_cut_run_goes_on_at_any_server(aircache_server: Server, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    arguments = ["--url", aircache_server.url, "--dataset", "mmbench", "--file", file]
    arguments += ["--path", make_mmbench(tmp_path), "--policies", "aircache", "--retentions", 0.1]
    done = quality(*arguments)
    assert done.returncode == 0, done.stderr
    rows = read(file)[1]
    assert [row["group"] for row in rows].count("241") == 4 and len(rows) == 6
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-2]) + lines[-2][:40])
    done = quality(*arguments)
    assert done.returncode == 0 and "6/6 rows, 4 old" in done.stderr
    assert {identity(row["key"]) for row in read(file)[1]} == {identity(r["key"]) for r in rows}
    assert len(file.read_text().splitlines()) == 2 + 6


def test_a_killed_run_loses_and_repeats_nothing(aircache_server: Server, tmp_path: Path) -> None:
    """SIGKILL after a few rows, while requests are under way."""
    file = tmp_path / "rows.jsonl"
    arguments = ["--url", aircache_server.url, "--dataset", "docvqa", "--file", file]
    arguments += ["--path", make_docvqa(tmp_path), "--policies", "snapkv", "aircache"]
    command = [sys.executable, "-m", "benchmarks.quality", *map(str, arguments)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 200
        while not file.exists() or file.read_bytes().count(b"\n") < 6:
            assert process.poll() is None and time.monotonic() < deadline, "no rows to cut off"
            time.sleep(0.01)
        process.kill()
    before = read_whole_lines(file)
    assert 5 <= len(before) < 33, "the run ended before it was killed"
    done = quality(*arguments)
    assert done.returncode == 0 and f"33/33 rows, {len(before)} old" in done.stderr
    rows = read(file)[1]
    assert rows[: len(before)] == before
    assert len(rows) == len({identity(row["key"]) for row in rows}) == 33
    assert all("divergence" in r for r in rows if r["key"]["setting"]["policy"] != FULL)


def read_whole_lines(file: Path) -> list[dict[str, Any]]:
    """The rows of a file whose last line may be torn."""
    lines = file.read_bytes().split(b"\n")[:-1]
    return [row for row in map(json.loads, lines) if "key" in row]


def test_the_divergence_is_that_of_the_logprobs(aircache_server: Server, tmp_path: Path) -> None:
    """Two askings of the full cache agree; retention 0.02 moves the distributions."""
    client = Client(aircache_server.url)
    sample = load("docvqa", make_docvqa(tmp_path), 1)[0]
    full, again = (client.ask(sample, Setting.of(FULL)) for _ in range(2))
    assert full.text == again.text and full.report is None and len(full.tokens) == 32
    assert [len(top) for _, top in full.tokens] == [20] * 32
    for one, other in zip(full.tokens, again.tokens, strict=True):
        assert one[0] == other[0] and one[1] == pytest.approx(other[1], abs=1e-3)
    few = client.ask(sample, Setting.of("aircache", 0.02))
    assert few.report is not None and few.report["columns"] == 2
    assert few.tokens[0][1] == pytest.approx(full.tokens[0][1], abs=1e-3)
    assert any(
        a[1] != pytest.approx(b[1], abs=1e-2) for a, b in zip(few.tokens, full.tokens, strict=True)
    )


def test_a_video_that_the_server_cannot_read(aircache_server: Server, tmp_path: Path) -> None:
    arguments = ["--url", aircache_server.url, "--dataset", "mmbench-video"]
    arguments += ["--path", make_mmbench_video(tmp_path), "--file", tmp_path / "rows.jsonl"]
    (tmp_path / "video" / "abc_processed.mp4").write_bytes(b"no video")
    done = quality(*arguments, "--policies", "aircache", "--retentions", 0.1)
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    # Without the full cache's answer the sample is left to the next run.
    assert message.startswith("error: requests failed: 1, as mmbench-video 0, none: HTTP 4")
    assert not (tmp_path / "rows.jsonl").read_text()
