# SPDX-License-Identifier: Apache-2.0
"""The throughput benchmark on real servers, with small cells."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from aircache_sglang.platform import has_accelerator
from aircache_sglang.testing import Server
from benchmarks.records import read
from benchmarks.throughput import load, plan
from benchmarks.throughput.__main__ import main
from benchmarks.throughput.capacity import Load, trial

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(has_accelerator(), reason="for a machine without an accelerator"),
]
VISUAL = 256
TOKENS = 192  # so many that a batch decodes together on a busy machine, too


@pytest.fixture(autouse=True)
def small_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(
        plan.PRESETS["cpu-small"],
        model={"layers": 2},
        batches=(1, 2),
        visual=(VISUAL,),
        picture_tokens=VISUAL,
        tokens=TOKENS,
        rounds=1,
        gate_visual=(VISUAL,),
        gate_tokens=(2, TOKENS),
    )
    monkeypatch.setitem(plan.PRESETS, "cpu-small", small)


@pytest.mark.slow
def test_sweep(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert main(["--file", str(path)]) == 0
    rows = {
        (row["key"]["batch"], row["key"]["retention"]): row
        for row in read(path)
        if row["key"]["benchmark"] == "serving"
    }
    assert set(rows) == {(batch, r) for batch in (1, 2) for r in (None, 1.0, 0.5, 0.1)}
    kept = {None: VISUAL, 1.0: VISUAL, 0.5: VISUAL // 2, 0.1: round(VISUAL / 10)}
    for (batch, retention), row in rows.items():
        stock = rows[batch, None]
        compressed = retention in (0.5, 0.1)
        assert (row["tokens"], len(row["request_outputs"])) == (TOKENS, batch)
        assert row["outputs"] == stock["outputs"] or compressed
        assert row["columns"] == (kept[retention] if compressed else None)
        assert row["prompt_tokens"] == stock["prompt_tokens"] > VISUAL
        assert (row["pass_seconds"] > 0) == compressed
        assert min(row[name] for name in ("prefill_seconds", "decode_seconds")) > 0
        assert row["token_cpu_seconds"] > 0
        # What decode holds beside the visual KV is the text and what has been said, so far.
        said = row["kv_decode"] - batch * (row["prompt_tokens"] - VISUAL + kept[retention])
        assert 0 <= said <= batch * TOKENS
    gate = {
        (row["key"]["gate"], row["key"]["tokens"]): row
        for row in read(path)
        if row["key"]["benchmark"] == "gate"
    }
    # Two tokens do not pay for the pass.
    assert {key: (row["reason"], row["columns"]) for key, row in gate.items()} == {
        **{(None, tokens): (None, None) for tokens in (2, TOKENS)},
        ("auto", 2): ("no_gain", None),
        **{key: (None, kept[0.1]) for key in (("auto", TOKENS), ("off", 2), ("off", TOKENS))},
    }
    for name in (None, "auto", "off"):
        assert 0 < gate[name, 2]["total_seconds"] < gate[name, TOKENS]["total_seconds"]
    assert gate["auto", 2]["outputs"] == gate[None, 2]["outputs"]
    table = path.with_suffix(".md").read_text()
    assert f"| 2 x {VISUAL} | 0.1 |" in table and "refused" not in table
    assert f"| {VISUAL} visual tokens, answer of 2 | left alone |" in table


def test_a_given_server(aircache_server: Server, tmp_path: Path) -> None:
    """Compared with itself at retention 1; its gate is off."""
    path = tmp_path / "rows.jsonl"
    assert main(["--url", aircache_server.url, "--file", str(path)]) == 0
    rows = read(path)
    assert [row["columns"] for row in rows][:3] == [None, VISUAL // 2, round(VISUAL / 10)]
    assert {(row["url"], row["model"]) for row in rows} == {
        (aircache_server.url, aircache_server.model)
    }
    # Another server's rows are not continued with this one's.
    path.write_text(path.read_text().replace(aircache_server.url, "http://elsewhere"))
    assert main(["--url", aircache_server.url, "--file", str(path)]) == 2
    path.write_text(path.read_text().replace("http://elsewhere", aircache_server.url))
    assert main(["--url", aircache_server.url, "--file", str(path)]) == 0
    assert len(read(path)) == len(rows)
    assert "x is the share of retention 1's value" in path.with_suffix(".md").read_text()


def test_a_server_without_metrics(
    stock_server: Server, aircache_server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    urls = ("--url", aircache_server.url, "--stock-url", stock_server.url)
    assert main([*urls, "--file", str(tmp_path / "rows.jsonl")]) == 2
    assert f"the server at {stock_server.url} needs --enable-metrics." in capfd.readouterr().err
    assert main(["--url", stock_server.url, "--file", str(tmp_path / "rows.jsonl")]) == 2
    said = f"the server at {stock_server.url} has --kv-policy none, not aircache."
    assert said in capfd.readouterr().err


def test_capacity_trial(aircache_server: Server) -> None:
    """SGLang's own client, offline, with its image data set."""
    load = Load(pictures=1, picture_tokens=64, tokens=8, prompts=4)
    row = trial(aircache_server, load, aircache_server.model, 0.1, float("inf"), seed=1)
    assert row["prompts"] == row["compressed"] == 4 and row["retracted"] == 0
    assert row["output_tokens_per_second"] > 0
    assert 0 < row["p99_tpot_seconds"] < row["p99_ttft_seconds"] < 60


def test_a_rising_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The document model reads the pages of three requests that arrive at once, packed."""
    small = load.Load(requests=3, tokens=24, ttft=60.0, tpot=10.0)
    monkeypatch.setattr(load, "Load", lambda: small)
    path = tmp_path / "load.jsonl"
    assert main(["--load", "--mode", "prefill", "--rate", "50", "--file", str(path)]) == 0
    [row] = read(path)
    assert row["key"] == {"benchmark": "load", "mode": "prefill", "rate": 50.0}
    assert (row["requests"], row["in_time"], row["failed"]) == (3, 3, 0)
    # What is asked is on the pages, and 77 of 768 tokens are enough for most of it.
    assert row["exact"] >= 2
    assert (row["packed"], row["packed_early"]) == (3, 3)
    assert row["kept"] == pytest.approx(77 / 768)
    assert 0 < row["p50_ttft_seconds"] <= row["p99_ttft_seconds"] < row["seconds"]
    assert "| 50, prefill |" in path.with_suffix(".md").read_text()
