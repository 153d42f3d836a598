# SPDX-License-Identifier: Apache-2.0
"""The throughput benchmark without servers: its plan, its bound, what it refuses to report."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from aircache_sglang.testing import Server, ServerError
from aircache_sglang.testing.checkpoints import make_qwen2_vl
from benchmarks.records import Results, read
from benchmarks.throughput import capacity, run
from benchmarks.throughput.__main__ import default_file, main, parser
from benchmarks.throughput.bound import kv_bytes, read_config, weight_bytes
from benchmarks.throughput.capacity import (
    Load,
    capacity_table,
    highest_rate,
    of_request,
    seed_of,
)
from benchmarks.throughput.measure import check_compression, warm_up
from benchmarks.throughput.plan import (
    PRESETS,
    Cell,
    GateCell,
    Limits,
    does_not_fit,
    plan,
    plan_gate,
    pool_tokens,
)
from benchmarks.throughput.report import (
    MANY_ROUNDS,
    fill_in,
    interval,
    report,
    retention_1_table,
    tables,
)
from benchmarks.throughput.run import Attempts

SMALL, TABLE3 = PRESETS["cpu-small"], PRESETS["table3"]


def test_the_variants_of_a_cell_take_turns() -> None:
    cells = plan(SMALL)
    assert len(cells) == 9 * 4 * 3
    there = [None, 1.0, 0.5, 0.1]
    assert [cell.retention for cell in cells[:12]] == [*there, *reversed(there), *there]
    assert [cell.round for cell in cells[:12]] == [0] * 4 + [1] * 4 + [2] * 4


def test_servers_that_do_not_fit_side_by_side_take_turns() -> None:
    cells = plan(TABLE3)
    assert len(cells) == 16 * 4 * 2
    assert [cell.policy for cell in cells] == [*["none"] * 16, *["aircache"] * 48] * 2
    assert {(c.batch, c.visual_tokens) for c in cells} == {
        (batch, n) for batch in (1, 8, 16, 32) for n in (2048, 8192, 16_384, 32_768)
    }
    # A server that is given alone is compared with itself.
    assert all(cell.retention is not None for cell in plan(TABLE3, stock=False))


def test_the_gate_is_tried_on_single_requests_of_the_sweep() -> None:
    cells = plan_gate(SMALL)
    assert [cell.gate for cell in cells[:6]] == [None, "auto", "off"] * 2
    assert {(cell.visual_tokens, cell.tokens) for cell in cells} == {
        (n, tokens) for n in (1024, 4096) for tokens in (2, 8, 32)
    }
    assert len({str(cell.key()) for cell in cells}) == len(cells) == 6 * 3 * 3
    only = dataclasses.replace(SMALL, visual=(4096,))
    assert {cell.visual_tokens for cell in plan_gate(only)} == {4096}
    assert plan_gate(dataclasses.replace(SMALL, batches=(8,))) == [] == plan_gate(TABLE3)
    assert plan_gate(dataclasses.replace(SMALL, retentions=(1.0,))) == []


def test_what_fits() -> None:
    largest = Cell(0.1, 32, 32_768, 0)
    needed = 32 * (8 + 2 * 32 + 32_768 + 64 + 512 + 3277)
    assert pool_tokens(TABLE3, largest) == needed
    assert does_not_fit(TABLE3, largest, Limits(needed, 36_864, 32)) is None
    assert does_not_fit(TABLE3, largest, Limits(needed - 1, 36_864, 32)) == (
        f"32 x 32768 visual tokens need {needed} tokens of KV, the server's pool holds {needed - 1}"
    )
    assert does_not_fit(TABLE3, largest, Limits(needed, 32_768, 32)) == (
        "32 x 32768 visual tokens need a context of 33416 tokens, the server's is 32768"
    )
    assert does_not_fit(TABLE3, largest, Limits(needed, 36_864, 31)) == (
        "32 x 32768 visual tokens are more requests than the server runs at once, 31"
    )
    small = Limits(53_248, 16_384, 16)
    left_out = {c for c in plan(SMALL) if does_not_fit(SMALL, c, small) is not None}
    assert left_out == {c for c in plan(SMALL) if (c.batch, c.visual_tokens) == (8, 8192)}


def test_limits_of_a_server() -> None:
    info = {"max_total_num_tokens": 4000, "context_length": 2048, "max_req_input_len": 1000}
    assert Limits.of(info) == Limits(4000, 2048, 2**31)
    info |= {"context_length": None}
    states = [{"effective_max_running_requests_per_dp": 7}]
    assert Limits.of(info | {"internal_states": states}) == Limits(4000, 1000, 7)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_a_preset_for_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "table3", "--file", str(tmp_path / "rows.jsonl")]) == 2
    assert capsys.readouterr().err == (
        "Nothing was measured: preset table3 needs an NVIDIA GPU, or --url.\n"
    )


def test_a_server_that_ended_shows_its_log(tmp_path: Path) -> None:
    servers = run.Servers(SMALL, tmp_path)
    servers.check_alive()
    log = tmp_path / "log"
    log.write_text("no memory left")
    servers._running["none"] = Server("model", log=log)
    with pytest.raises(ServerError, match=r"^the server of none has ended\nno memory left$"):
        servers.check_alive()


def test_bytes_of_a_step(tmp_path: Path) -> None:
    folder = make_qwen2_vl(tmp_path, **TABLE3.model)
    assert not list(folder.glob("*.safetensors"))
    config = read_config(str(folder))
    assert config is not None
    assert kv_bytes(config, 2) == 57_344  # Qwen2-VL-7B: 56 KiB a token
    # Its 7.07e9 parameters without the embedding, norms and biases.
    assert weight_bytes(config, 2) == 2 * (28 * 233_046_016 + 152_064 * 3584)
    assert read_config(str(tmp_path / "elsewhere")) is None


def test_a_hybrid_has_no_bound(tmp_path: Path) -> None:
    """Its states are read too, which nobody counts."""
    preset = PRESETS["cpu-hybrid"]
    folder = run.FAMILIES[preset.family](tmp_path / "model", **preset.model)
    assert preset.env and "--disable-radix-cache" in preset.flags
    assert plan_gate(preset) == []
    shapes = run.shapes_of({"model_path": str(folder), "dtype": "float32"})
    assert shapes == {"dtype": "float32", "kv_bytes": None, "weight_bytes": None}


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
        "request_outputs": ["same"] * cell.batch,
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
    found = {line.split(" | ")[1]: line.split(" | ") for line in lines if "| 4 x 8192 |" in line}
    assert list(found) == ["stock", "1", "0.5", "0.1"]
    assert found["0.1"][7] == "0.10"
    # (2 + 8.192 s) / (2 + 0.8192 s)
    assert [found[name][10] for name in found] == [
        *("-", "1.00 (1.00..1.00)", "1.67 (1.67..1.67)", "3.62 (3.62..3.62)")
    ]
    # (4e6 + 4 * (8192 + 76 + 24.5) * 6144 bytes) / 10 GB/s, of 170.7 ms
    assert found["stock"][12:14] == ["20.8", "12 %"]
    # The step lost 90 % of its time, the bytes 87 %.
    assert found["0.1"][14] == "103 %"


def test_the_slowest_setting_counts_round_by_round() -> None:
    """Rounds drift apart by half; retention 1, prefill and the gate's short answers count."""
    rows = []
    for round_, drift in enumerate((1.0, 1.5, 1.0)):
        for retention in (None, 1.0, 0.1):
            slower = 1.05 if retention == 1.0 else 1.0
            rows.append(
                row(
                    Cell(retention, 1, 8192, round_),
                    prefill_seconds=2 * drift * slower,
                    decode_seconds=drift * slower,
                )
            )
    sentence = (
        "prefill + decode at no cell and setting below 0.98 of stock's speed "
        "({} of {} are; worst {} at {})."
    )
    worst = ("0.95 (0.95..0.95)", "1 x 8192, retention 1")
    assert "Goal **missed**: " + sentence.format(1, 2, *worst) in text_of(rows)
    kept = [r for r in rows if r["key"]["retention"] != 1.0]
    kept += [row(Cell(1.0, 1, 8192, i), decode_seconds=d) for i, d in ((0, 1), (1, 2.5), (2, 1))]
    worst = ("1.00 (1.00..1.00)", "1 x 8192, retention 1")
    assert "Goal met: " + sentence.format(0, 2, *worst) in text_of(kept)
    name = "1024 visual tokens, answer of 2"
    text = text_of([*kept, *gate_rows(auto=(1.0, 1.25, 1.25))])
    worst = ("0.80 (0.80..1.00)", f"{name}, gate auto")
    assert "Goal **missed**: " + sentence.format(1, 3, *worst) in text
    assert f"| {name} | left alone | 1.00 | 0.80 (0.80..1.00) | 0.50 (0.50..0.50) |" in text


def gate_rows(auto: Sequence[float] = (1.0,), outputs: str = "same") -> list[dict[str, Any]]:
    """One short request; stock takes a second, `off` two."""
    of: dict[str | None, tuple[Sequence[float], str | None, str]] = {
        None: ([1.0] * len(auto), None, "same"),
        "auto": (auto, "no_gain", outputs),
        "off": ([2.0] * len(auto), None, "other"),
    }
    return [
        {
            "key": GateCell(gate, 1024, 2, round_).key(),
            "total_seconds": total,
            "reason": reason,
            "outputs": answer,
            "dtype": "float32",
        }
        for gate, (seconds, reason, answer) in of.items()
        for round_, total in enumerate(seconds)
    ]


def test_a_request_left_alone_must_answer_as_stock() -> None:
    sweep_rows = [row(Cell(retention, 1, 8192, 0)) for retention in (None, 1.0)]
    refused = "refused: left alone, but its answer differs from stock's"
    assert refused not in text_of([*sweep_rows, *gate_rows()])
    text = text_of([*sweep_rows, *gate_rows(outputs="other")])
    assert f"| 1024 visual tokens, answer of 2 | {refused} | - | - | - |" in text


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


def test_half_precision_needs_single_requests() -> None:
    """The share of larger batches' requests that answer as stock's is said, not judged."""
    rows = [row(Cell(r, 4, 8192, 0), dtype="bfloat16") for r in (None, 1.0, 0.1)]
    rows[1]["request_outputs"] = ["same", "same", "same", "other"]
    text = text_of(rows)
    assert "| 4 x 8192 | refused: in half precision single requests are compared, and" in text
    assert "| 4 x 8192 | 0.1 |" not in text
    single = [row(Cell(r, 1, 8192, 0), dtype="bfloat16") for r in (None, 1.0, 0.1)]
    text = text_of([*rows, *single])
    assert "| 4 x 8192 | 0.1 |" in text
    assert "batches that did: 4 x 8192: 75 %." in text
    del rows[0]["request_outputs"]
    assert "batches that did: 4 x 8192: unknown." in text_of([*rows, *single])


def test_rounds_that_do_not_meet_are_nothing_to_compare() -> None:
    rows = [row(Cell(None, 1, 8192, 0)), row(Cell(1.0, 1, 8192, 1)), row(Cell(0.1, 1, 8192, 0))]
    text = text_of(rows)
    assert "refused: retention 1 and stock were not measured in the same round" in text
    assert "| 1 x 8192 | 0.1 |" not in text


class FakeServer:
    """Answers whatever it is asked with so many prompt tokens; its pool holds 4000."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens

    def generate(self, *_: object, **__: object) -> Any:
        return {"meta_info": {"prompt_tokens": self.prompt_tokens}}

    def info(self) -> Any:
        return {
            "max_total_num_tokens": 4000,
            "context_length": None,
            "model_path": "elsewhere",
            "dtype": "float32",
        }


def test_a_model_without_images() -> None:
    with pytest.raises(ServerError, match="the model takes no images"):
        warm_up(FakeServer(prompt_tokens=70), SMALL, [None])  # type: ignore[arg-type]


def test_a_warm_up_measures_nothing() -> None:
    """A busy machine may space its few tokens as it likes: it uses each setting, and no clock."""
    posted: list[Any] = []

    class Warm(FakeServer):
        def post(self, path: str, body: Any) -> Any:
            posted.append((path, body["sampling_params"].get("custom_params"), len(body["text"])))

    warm_up(Warm(SMALL.picture_tokens + 70), SMALL, [None, 0.1])  # type: ignore[arg-type]
    assert posted == [
        ("/generate", None, 2),
        ("/generate", {"aircache": {"retention": 0.1}}, 2),
    ]


class Running:
    """In place of `Servers`: a server for all cells that never ends."""

    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None: ...

    def of(self, _: Cell) -> FakeServer:
        return FakeServer(0)

    def check_alive(self) -> None: ...


def test_an_odd_cell_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried again; one that always fails is left out, and said at the end."""
    tries: dict[Cell, int] = {}

    def odd(client: Any, preset: Any, cell: Cell) -> dict[str, Any]:
        tries[cell] = tries.get(cell, 0) + 1
        if cell.retention == 0.5 or (cell.retention == 1.0 and tries[cell] == 1):
            raise ServerError("97 tokens are too few for a batch to decode together")
        return row(cell)

    monkeypatch.setattr(run, "servers", Running)
    monkeypatch.setattr(run, "run_cell", odd)
    small = dataclasses.replace(SMALL, batches=(1,), visual=(1024,), gate_visual=(), rounds=1)
    path = tmp_path / "rows.jsonl"
    with pytest.raises(
        ServerError, match=r"^1 measurements failed each time; the first: 97 tokens"
    ):
        run.sweep(Results(path), small, {"none": None, "aircache": None})  # type: ignore[dict-item]
    found = [r["key"]["retention"] for r in read(path) if r["key"]["benchmark"] == "serving"]
    assert found == [None, 1.0, 0.1]
    assert sorted(tries.values()) == [1, 1, 2, 3]


def test_a_server_that_ended_ends_the_run(tmp_path: Path) -> None:
    class Ended(Running):
        def check_alive(self) -> None:
            raise ServerError("the server of none has ended")

    attempts = Attempts(Results(tmp_path / "rows.jsonl"), Ended())  # type: ignore[arg-type]

    def fails() -> dict[str, Any]:
        raise ServerError("HTTP 500")

    with pytest.raises(ServerError, match="has ended"):
        attempts.measure({"benchmark": "serving"}, fails)


def test_a_trial_that_fails_ends_its_own_search_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(
        client: Any, load: Load, model: str, retention: float | None, rate: float, *_: Any
    ) -> Any:
        if retention == 0.5:
            raise ServerError("19 of 20 requests were answered")
        late = 99.0 if rate > 1 else 1.0
        return {"p99_ttft_seconds": late, "p99_tpot_seconds": 0.1}

    monkeypatch.setattr(capacity, "servers", Running)
    monkeypatch.setattr(capacity, "trial", odd)
    path = tmp_path / "rows.jsonl"
    with pytest.raises(ServerError, match=r"^2 measurements failed each time"):
        capacity.measure(Results(path), capacity.PRESET, Load(), {}, "prefill")
    tried: dict[Any, int] = {}
    for found in read(path):
        tried[found["key"]["retention"]] = tried.get(found["key"]["retention"], 0) + 1
    assert tried.keys() == {None, 0.1} and min(tried.values()) > 4


def test_the_interval_of_many_rounds() -> None:
    """Round by round, so that what slows both cancels; nothing is said of few rounds."""
    draw = random.Random(3)
    rows = []
    for round_ in range(MANY_ROUNDS):
        busy = draw.uniform(1, 3)
        for retention, factor in ((None, 1.0), (1.0, 1.01 * draw.uniform(0.995, 1.005))):
            rows.append(
                {"key": Cell(retention, 1, 1024, round_).key()}
                | row(Cell(retention, 1, 1024, round_))
                | {"batch_cpu_seconds": busy * factor, "token_seconds": busy / factor}
            )
    # Ranks of a binomial, whatever the odd values are.
    assert interval([*range(1, 100), 10**9]) == (50.5, 41, 61)
    text = "".join(retention_1_table(rows))
    found = re.search(r"\| 1 x 1024 \| 20 \| ([\d.]+) \(([\d.]+)\.\.([\d.]+)\)", text)
    assert found is not None, text
    centre, least, most = map(float, found.groups())
    assert 1.005 <= least <= centre <= most <= 1.015
    assert not list(retention_1_table(rows[:-1]))


def test_a_cell_left_out_is_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until some run can hold it; the others are measured."""
    monkeypatch.setattr(run, "servers", Running)
    monkeypatch.setattr(run, "run_cell", lambda client, preset, cell: row(cell))
    path = tmp_path / "rows.jsonl"
    small = dataclasses.replace(SMALL, batches=(1, 4), visual=(1024,), gate_visual=(), rounds=2)
    given: Any = {"none": None, "aircache": None}
    run.sweep(Results(path), small, given)
    report(path)
    text = path.with_suffix(".md").read_text()
    reason = "4 x 1024 visual tokens need 4780 tokens of KV, the server's pool holds 4000"
    assert text.count("left out: 4 x 1024") == 4 and "| 1 x 1024 | 0.1 |" in text
    assert f"| 4 x 1024 | stock left out: {reason} | -" in text
    # Tried again, and not written twice.
    lines = len(path.read_text().splitlines())
    run.sweep(Results(path), small, given)
    assert len(path.read_text().splitlines()) == lines
    monkeypatch.setattr(run, "does_not_fit", lambda *_: None)
    run.sweep(Results(path), small, given)
    report(path)
    assert "left out" not in path.with_suffix(".md").read_text()


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


def test_pictures_of_a_trial() -> None:
    """Follow its key, not the order of trials: a resumed run must not see a picture again."""
    keys = [
        {"benchmark": "capacity", "retention": retention, "visual_tokens": 8192, "rate": rate}
        for retention in (None, 0.5, 0.1)
        for rate in ("burst", 0.25, 0.125)
    ]
    seeds = [seed_of(key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert seeds == [seed_of(dict(reversed(key.items()))) for key in keys]
    assert all(0 <= seed < 2**32 for seed in seeds)  # what numpy takes


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
            "requests_per_second": 0.25,
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
    assert "| 8192, stock | 28672 | 3 | 20 | 100 | 0 | - | - | - | - | - |" in text
    assert "| 8192, 0.1 | 28672 | 17 | 20 | 100 | 0 | 0.25 | 0.25 | 12 | 9.0 | 0.10 |" in text
    assert "Goal met: retention 0.1 holds 5 times stock's (5.7)." in text and "pressure" not in text
    for row in (trial(0.1, "burst", 16, 60.0), trial(0.1, 0.125, 8, 4.0)):
        rows.append(row | {"key": row["key"] | {"when": "pressure"}})
    text = "\n".join(capacity_table(rows, Load(ttft=30.0)))
    assert "| 8192, 0.1 | 28672 | 17 | 20 | 100 | 0 | 0.25 | 0.25 | 12 | 9.0 | 0.10 |" in text
    assert (
        "| 8192, 0.1 under pressure | 28672 | 16 | 20 | 100 | 0 | 0.125 | 0.25 | 8 | 4.0 | 0.10 |"
    ) in text
    assert (
        "Goal **missed**: pressure holds at least 0.95 of what prefill does (0.94 at 0.1)." in text
    )
    assert (
        "Goal **missed**: pressure serves in time, at its highest rate, at least 0.95 of what "
        "prefill does (0.50 at 0.1)."
    ) in text


def test_a_request_of_a_trial() -> None:
    """Rows from before `--when` keep their keys, and so do their requests."""
    assert of_request(0.1, "prefill") == {"retention": 0.1}
    assert of_request(0.1, "pressure") == {"retention": 0.1, "when": "pressure"}


def test_no_server_is_one_sentence_and_keeps_the_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where no row is missing, and with --fresh."""
    path = tmp_path / "rows.jsonl"
    results = Results(path)
    for retention in (1.0, 0.1):
        cell = Cell(retention, 1, 1024, 0)
        results.measure(cell.key(), lambda cell=cell: row(cell))
    with socket.socket() as probe:  # a port that nobody listens on
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        capsys.readouterr()
        for more in ([], ["--batch", "1", "--visual", "1024", "--rounds", "1"], ["--fresh"]):
            assert main(["--url", url, "--file", str(path), *more]) == 2
            said = capsys.readouterr()
            assert said.err == f"Nothing was measured: no SGLang server answers at {url}.\n"
            assert said.out == ""
    assert len(path.read_text().splitlines()) == 2


def test_a_run_that_fails_keeps_and_shows_what_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(results: Results, *_: object) -> None:
        for retention in (None, 1.0, 0.1):
            cell = Cell(retention, 1, 1024, 0)
            results.measure(cell.key(), lambda cell=cell: row(cell))
        raise ServerError("the server exited with code 1\nits log")

    monkeypatch.setattr(run, "sweep", fails)
    path = tmp_path / "rows.jsonl"
    assert main(["--file", str(path)]) == 1
    assert capsys.readouterr().err == (
        "its log\nThe benchmark stopped: the server exited with code 1. "
        "What it has measured is kept.\n"
    )
    text = path.with_suffix(".md").read_text()
    assert "| 1 x 1024 | 0.1 |" in text
    assert "- preset: cpu-small: answers of 97 tokens, pictures of 1024\n" in text
    assert path.with_suffix(".png").stat().st_size > 1000


def test_rows_of_something_else_are_not_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "sweep", lambda *_: None)
    path = tmp_path / "rows.jsonl"
    ways = "--fresh drops them, --file names another file"

    def refuses(name: str, before: str, now: str) -> None:
        content = path.read_bytes()
        assert main(["--file", str(path)]) == 2
        assert capsys.readouterr().err == (
            f"Nothing was measured: {path} has rows of {name} {before}, "
            f"this run's is {now}: {ways}.\n"
        )
        assert path.read_bytes() == content

    mine = Results(path, run.about(SMALL, {}))
    mine.add({"benchmark": "other"}, {"load": 0.0})
    whole = json.loads(path.read_text())

    def write(**changes: Any) -> None:
        path.write_text(json.dumps(whole | changes) + "\n")
        capsys.readouterr()

    write(device="a large machine")
    refuses("device", "a large machine", whole["device"])
    write(sglang="0.4")
    refuses("sglang", "0.4", whole["sglang"])
    write(preset="table3")
    refuses("preset", "table3", whole["preset"])
    write(model="random weights, layers 28")
    refuses("model", "random weights, layers 28", whole["model"])
    write(url="http://127.0.0.1:30000")
    refuses("url", "http://127.0.0.1:30000", "none")
    # Another commit goes on and is listed; so do rows from before the preset was written down.
    write(git="0123")
    assert main(["--file", str(path)]) == 0 and "- git: 0123\n" in capsys.readouterr().out
    whole = {name: whole[name] for name in whole if name not in ("preset", "model", "flags", "url")}
    write()
    assert main(["--file", str(path)]) == 0
    write(device="a large machine")
    assert main(["--file", str(path), "--fresh"]) == 1  # nothing is left, and nothing was measured
    assert not path.exists()


def test_what_rows_say_of_a_given_server() -> None:
    class Given(FakeServer):
        url = "http://127.0.0.1:30000"

        def info(self) -> Any:
            return super().info() | {"device": "cuda", "version": "0.5.23"}

    said = run.about(SMALL, {"aircache": Given(0)})  # type: ignore[dict-item]
    assert said["url"] == Given.url and said["model"] == "elsewhere"
    assert said["device"].startswith("cuda of the server, asked from ")
    parse = parser().parse_args
    own, other = default_file(parse([])), default_file(parse(["--url", Given.url]))
    assert own.name == "throughput-cpu-small.jsonl"
    assert other.name == "throughput-cpu-small-127.0.0.1-30000.jsonl"


def test_half_a_row_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    cells = [Cell(0.1, 1, 1024, round_) for round_ in (0, 1)]
    for cell in cells:
        Results(path).measure(cell.key(), lambda cell=cell: row(cell))
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])  # killed within the write
    assert [found["key"] for found in read(path)] == [cells[0].key()]
    report(path)
    results = Results(path)
    assert results.has(cells[0].key()) and not results.has(cells[1].key())
    results.measure(cells[1].key(), lambda: row(cells[1]))
    assert [found["key"] for found in read(path)] == [cell.key() for cell in cells]
    path.write_bytes(b"{half\n" + whole)
    with pytest.raises(ValueError, match=f"line 1 of {path} is not JSON"):
        Results(path)


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
    assert main([*argv, "--file", str(tmp_path / "rows.jsonl")]) == 2
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
