# SPDX-License-Identifier: Apache-2.0
"""The throughput benchmark without servers: its plan, its bound, what it refuses to report."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from benchmarks.records import Results
from benchmarks.throughput.__main__ import main
from benchmarks.throughput.bound import kv_bytes, read_config, weight_bytes
from benchmarks.throughput.capacity import Load, capacity_table, highest_rate
from benchmarks.throughput.measure import check_compression
from benchmarks.throughput.plan import PRESETS, Cell, does_not_fit, plan, pool_tokens
from benchmarks.throughput.report import fill_in, report, tables
from tests.factories import make_qwen2_vl
from tests.support import ServerError

SMALL, TABLE3 = PRESETS["cpu-small"], PRESETS["table3"]


def test_the_variants_of_a_cell_take_turns() -> None:
    cells = plan(SMALL)
    assert len(cells) == 8 * 4 * 2  # without 8 x 8192
    assert [cell.retention for cell in cells[:8]] == [None, 1.0, 0.5, 0.1] * 2
    assert [cell.round for cell in cells[:8]] == [0] * 4 + [1] * 4
    assert max(cell.batch * cell.visual_tokens for cell in cells) == 32_768


def test_servers_that_do_not_fit_side_by_side_take_turns() -> None:
    cells = plan(TABLE3)
    assert len(cells) == 16 * 4 * 2
    assert [cell.policy for cell in cells] == [*["none"] * 16, *["aircache"] * 48] * 2
    assert {(c.batch, c.visual_tokens) for c in cells} == {
        (batch, n) for batch in (1, 8, 16, 32) for n in (2048, 8192, 16_384, 32_768)
    }
    # A server that is given alone is compared with itself.
    assert all(cell.retention is not None for cell in plan(TABLE3, stock=False))


def test_what_fits() -> None:
    largest = Cell(0.1, 32, 32_768, 0)
    needed = 32 * (8 + 2 * 32 + 32_768 + 64 + 512 + 3277)
    assert pool_tokens(TABLE3, largest) == needed
    assert does_not_fit(TABLE3, largest, needed, 36_864) is None
    assert does_not_fit(TABLE3, largest, needed - 1, 36_864) == (
        f"32 x 32768 visual tokens need {needed} tokens of KV, the server's pool holds {needed - 1}"
    )
    assert does_not_fit(TABLE3, largest, needed, 32_768) == (
        "32 x 32768 visual tokens need a context of 33416 tokens, the server's is 32768"
    )
    for cell in plan(SMALL):
        assert does_not_fit(SMALL, cell, 53_248, 16_384) is None


def test_bytes_of_a_step(tmp_path: Path) -> None:
    folder = make_qwen2_vl(tmp_path, **TABLE3.model)
    assert not list(folder.glob("*.safetensors"))
    config = read_config(str(folder))
    assert config is not None
    assert kv_bytes(config, 2) == 57_344  # Qwen2-VL-7B: 56 KiB a token
    config["vocab_size"] = 152_064
    # Its 7.07e9 parameters without the embedding, norms and biases.
    assert weight_bytes(config, 2) == 2 * (28 * 233_046_016 + 152_064 * 3584)
    assert read_config(str(tmp_path / "elsewhere")) is None


def row(cell: Cell, **changes: Any) -> dict[str, Any]:
    kept = cell.visual_tokens if cell.retention is None else cell.retention * cell.visual_tokens
    return {
        "key": cell.key(),
        "prompt_tokens": cell.visual_tokens + 76,
        "tokens": 49,
        "prefill_seconds": 2.0,
        "pass_seconds": 0.01,
        "decode_seconds": kept / 1000,
        "token_seconds": kept / 48_000,
        "token_cpu_seconds": kept / 50_000,
        "kv_peak": 9000,
        "kv_decode": kept,
        "columns": int(kept) if cell.retention in (0.5, 0.1) else None,
        "outputs": "same",
        "dtype": "float32",
        "kv_bytes": 6144,
        "weight_bytes": 4_000_000,
    } | changes


def text_of(rows: list[dict[str, Any]]) -> str:
    bandwidth = {"key": {"benchmark": "bandwidth"}, "bytes_per_second": 10e9}
    return "\n".join(tables([bandwidth, *rows]))


def test_tables() -> None:
    cells = [Cell(retention, 4, 8192, 0) for retention in (None, 1.0, 0.5, 0.1)]
    lines = text_of([row(cell) for cell in cells]).splitlines()
    found = {line.split(" | ")[1]: line.split(" | ") for line in lines if "4 x 8192" in line}
    assert list(found) == ["stock", "1", "0.5", "0.1"]
    assert found["0.1"][7] == "0.10"
    # (4e6 + 4 * (8192 + 76 + 24.5) * 6144 bytes) / 10 GB/s
    assert found["stock"][11] == "20.8"
    # The step lost 90 % of its time, the bytes 87 %.
    assert found["0.1"][12] == "103 %"


@pytest.mark.parametrize(
    ("dtype", "batch", "refused"), [("float32", 4, True), ("bfloat16", 4, False)]
)
def test_a_cell_whose_answers_differ_is_refused(dtype: str, batch: int, refused: bool) -> None:
    """In half precision the single requests decide: rounding depends on the batch's company."""
    rows = [
        row(Cell(retention, b, 8192, 0), dtype=dtype, outputs=f"{retention} {b}" if b > 1 else "x")
        for b in (1, batch)
        for retention in (None, 1.0, 0.1)
    ]
    text = text_of(rows)
    sentence = f"| {batch} x 8192 | refused: answers at retention 1 differ from stock's |"
    assert (sentence in text) is refused
    assert (f"| {batch} x 8192 | 0.1 |" in text) is not refused
    assert "| 1 x 8192 | 0.1 |" in text


def test_a_mislabelled_cell_is_not_measured() -> None:
    with pytest.raises(ServerError, match="left alone \\(pool_too_small\\)"):
        meta = {"aircache": None, "aircache_reason": "pool_too_small"}
        check_compression(Cell(0.1, 1, 1024, 0), [meta])
    with pytest.raises(ServerError, match="without --kv-policy aircache"):
        check_compression(Cell(0.1, 1, 1024, 0), [{}])
    # The gate may leave a request alone: that is what the server would do.
    check_compression(Cell(0.9, 1, 1024, 0), [{"aircache": None, "aircache_reason": "no_gain"}])
    check_compression(Cell(None, 1, 1024, 0), [{}])


@pytest.mark.parametrize("limit", [0.02, 0.07, 0.125, 0.9, 7.0])
def test_highest_rate(limit: float) -> None:
    tried: list[float] = []

    def in_time(rate: float) -> bool:
        tried.append(rate)
        return rate <= limit

    found = highest_rate(in_time, 0.125)
    assert found is not None and found <= limit < found * 2**0.25 * 1.001
    assert len(tried) <= 12


def test_no_rate() -> None:
    assert highest_rate(lambda _: False, 1.0) is None
    assert highest_rate(lambda _: True, 1.0) == 64


def test_capacity_table() -> None:
    def trial(retention: float | None, rate: Any, held: int, ttft: float) -> dict[str, Any]:
        key = {"benchmark": "capacity", "retention": retention, "visual_tokens": 8192, "rate": rate}
        return {
            "key": key,
            "pool": 28_672,
            "held": held,
            "queued": 20,
            "retracted": 0,
            "p99_ttft_seconds": ttft,
            "p99_tpot_seconds": 0.1,
            "output_tokens_per_second": 100.0,
        }

    rows = [
        trial(None, "burst", 3, 90.0),
        trial(None, 0.125, 3, 90.0),
        trial(0.1, "burst", 17, 60.0),
        trial(0.1, 0.125, 8, 4.0),
        trial(0.1, 0.25, 12, 9.0),
        trial(0.1, 0.5, 17, 70.0),
    ]
    text = "\n".join(capacity_table(rows, Load(ttft=30.0)))
    assert "| 8192, stock | 28672 | 3 | 20 | 100 | 0 | - | - | - | - |" in text
    assert "| 8192, 0.1 | 28672 | 17 | 20 | 100 | 0 | 0.25 | 12 | 9.0 | 0.10 |" in text
    assert "Goal met: retention 0.1 holds 5 times stock's (5.7)." in text


def test_no_server_is_one_sentence_and_keeps_the_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    results = Results(path)
    for retention in (1.0, 0.1):
        cell = Cell(retention, 1, 1024, 0)
        results.measure(cell.key(), lambda cell=cell: row(cell))
    with socket.socket() as probe:  # a port that nobody listens on
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        assert main(["--url", url, "--file", str(path)]) == 1
    said = capsys.readouterr()
    assert said.err == (
        f"The benchmark stopped: no SGLang server answers at {url}. What it has measured is kept.\n"
    )
    assert len(path.read_text().splitlines()) == 2
    assert "| 1 x 1024 | 0.1 |" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--visual", "1000"], "visual tokens must be a multiple of 1024, got 1000"),
        (["--batch", "-1"], "a batch must be at least 1, got -1"),
    ],
)
def test_bad_sizes(
    argv: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*argv, "--file", str(tmp_path / "rows.jsonl")]) == 1
    assert sentence in capsys.readouterr().err


def test_a_measured_cell_is_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    cell = Cell(0.1, 1, 1024, 0)
    Results(path).measure(cell.key(), lambda: row(cell))
    again = Results(path)
    again.measure(cell.key(), lambda: pytest.fail("measured again"))
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == [cell.key()]
    report(path)


def test_the_document_takes_the_tables_of_a_result_file(tmp_path: Path) -> None:
    document, rows = tmp_path / "performance.md", tmp_path / "throughput-small.jsonl"
    begin, end = (f"<!-- {mark} throughput-small -->\n" for mark in ("begin", "end"))
    document.write_text(f"# Before\n{begin}old\n{end}after\n")
    fill_in(document, rows, "## Servers\n\n| a |\n\n## Capacity\n\n| b |\n")
    text = document.read_text()
    assert text.startswith("# Before\n<!-- begin throughput-small -->\n### Servers\n")
    assert "\n### Capacity\n" in text and "old" not in text
    assert text.endswith("results/throughput-small.md).\n<!-- end throughput-small -->\nafter\n")
    other = tmp_path / "other.jsonl"
    fill_in(document, other, "## Servers\n")
    assert document.read_text() == text
