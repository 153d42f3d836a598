# SPDX-License-Identifier: Apache-2.0
"""The rising load without servers: its arrivals, what it counts, what it refuses and reports."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import requests

from aircache_sglang.testing import ServerError
from benchmarks.documents.questions import evaluation_set
from benchmarks.records import RESULTS, Results, read
from benchmarks.throughput import load
from benchmarks.throughput.__main__ import default_file, main, parser
from benchmarks.throughput.load import COMPARED, END, MODES, Answer, Load, check_mode, key_of, trial
from benchmarks.throughput.load_report import load_table
from benchmarks.throughput.report import report

SMALL = Load(requests=3, tokens=8, ttft=0.5, tpot=0.1)
QUESTIONS = evaluation_set("page", SMALL.requests)
RATE = 200.0


def packed(at: int, columns: int = 77) -> dict[str, Any]:
    freed = 768 - columns
    said = {"visual_tokens": 768, "columns": columns, "slots_freed": freed, "packed_at": at}
    return {"aircache": said, "aircache_reason": None}


WHOLE = {"aircache": None, "aircache_reason": "no_pressure"}


class FakeClient:
    """Streams SMALL.tokens chunks of each answer; its meta_info, end or error by request."""

    def __init__(self, metas: list[dict[str, Any]], wrong: tuple[int, ...] = ()) -> None:
        self.metas, self.wrong = metas, wrong
        self.flushed = 0
        self.sent: list[int] = []

    def flush_cache(self) -> None:
        self.flushed += 1

    def info(self) -> dict[str, Any]:
        return {"max_total_num_tokens": SMALL.pool}

    def stream(self, path: str, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        assert path == "/generate" and "custom_params" not in request["sampling_params"]
        index = request["index"]
        self.sent.append(index)
        meta = self.metas[index]
        if "error" in meta:
            raise meta["error"]
        said = "?" if index in self.wrong else QUESTIONS[index].answer
        for count in range(1, SMALL.tokens + 1):
            time.sleep(0.002)
            done = {"type": meta.get("end", "length"), "message": "out of memory"}
            yield {
                "text": (f"{said}{END}LLLL" if count == SMALL.tokens else said[:count]),
                "meta_info": {
                    "completion_tokens": count,
                    "num_retractions": 0,
                    "finish_reason": done if count == SMALL.tokens else None,
                    **meta,
                },
            }


def tried(mode: str, metas: list[dict[str, Any]], **fake: Any) -> dict[str, Any]:
    bodies = [{"index": i, "sampling_params": {}} for i in range(len(metas))]
    client = FakeClient(metas, **fake)
    row = trial(client, SMALL, mode, RATE, QUESTIONS, bodies)  # type: ignore[arg-type]
    assert client.flushed == 1 and sorted(client.sent) == [0, 1, 2]
    return row


def test_arrivals() -> None:
    """The same at every rate but for their scale, and as many a second as the rate says."""
    many = Load(requests=2000)
    slow, fast = many.arrivals(1.0), many.arrivals(4.0)
    assert slow == many.arrivals(1.0) and slow[0] == 0.0
    assert fast == pytest.approx([at / 4 for at in slow])
    gaps = [b - a for a, b in itertools.pairwise(slow)]
    assert min(gaps) > 0 and sum(gaps) / len(gaps) == pytest.approx(1.0, abs=0.1)
    # Poisson: the gaps spread as widely as they are long.
    assert math.sqrt(sum((gap - 1) ** 2 for gap in gaps) / len(gaps)) == pytest.approx(1, abs=0.1)


def test_the_modes_differ_in_their_flags_alone() -> None:
    request = load.body(QUESTIONS[0], 8)
    assert len(request["image_data"]) == 3 and request["text"].count("<|image_pad|>") == 3
    assert QUESTIONS[0].prompt in request["text"]
    assert list(MODES) == [*COMPARED, "shadow"] == ["stock", "prefill", "pressure", "shadow"]
    for name, flags in MODES.items():
        assert ("--aircache-when" in flags) == (name == "pressure")
        assert flags[1] == ("none" if name == "stock" else "aircache")


def test_the_prompt_is_that_of_the_chat_template() -> None:
    from transformers import AutoTokenizer

    from benchmarks.documents import CHECKPOINT

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    question = QUESTIONS[0]
    content = [{"type": "image"}] * 3 + [{"type": "text", "text": question.prompt}]
    chat = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert load.body(question, 8)["text"] == text
    # A character is a token: what `packed_early` counts by.
    for asked in QUESTIONS:
        assert len(tokenizer.encode(asked.answer, add_special_tokens=False)) == len(asked.answer)


def test_a_trial_of_pressure() -> None:
    """One request whole, one packed in the middle of its answer, one after it and retracted."""
    late = len(QUESTIONS[2].answer) + 1
    metas = [WHOLE, packed(2, 384), packed(late, 77) | {"num_retractions": 2}]
    row = tried("pressure", metas, wrong=(0,))
    assert (row["requests"], row["failed"], row["exact"], row["in_time"]) == (3, 0, 2, 3)
    assert (row["packed"], row["packed_early"]) == (2, 1)
    assert row["kept"] == pytest.approx((1 + 384 / 768 + 77 / 768) / 3)
    assert (row["retractions"], row["retracted"]) == (2, 1)
    assert row["answers"] == ["?", QUESTIONS[1].answer, QUESTIONS[2].answer]
    assert row["goodput"] == pytest.approx(3 / row["seconds"]) == row["requests_per_second"]
    assert 0.002 <= row["p50_ttft_seconds"] <= row["p99_ttft_seconds"] < 0.5
    assert 0.002 <= row["p99_tpot_seconds"] < 0.1
    assert "--aircache-when pressure" in row["mode_flags"]


def test_failed_requests_are_neither_in_time_nor_right() -> None:
    metas = [{}, {"end": "abort"}, {"error": ServerError("HTTP 503: full")}]
    row = tried("stock", metas)
    assert (row["failed"], row["in_time"], row["exact"]) == (2, 1, 1)
    assert row["answers"] == [QUESTIONS[0].answer, "", ""]
    with pytest.raises(ServerError, match="no request was answered: HTTP 503: full"):
        tried("stock", [{"error": ServerError("HTTP 503: full")}] * 3)


def test_what_is_in_time() -> None:
    assert SMALL.in_time(Answer(ttft=0.5, tpot=0.1))
    assert not SMALL.in_time(Answer(ttft=0.51, tpot=0.1))
    assert not SMALL.in_time(Answer(ttft=0.5, tpot=0.11))
    assert not SMALL.in_time(Answer(ttft=0.1, tpot=0.01, failed="aborted"))


def test_a_server_that_is_gone_ends_the_trial() -> None:
    with pytest.raises(requests.ConnectionError):
        tried("stock", [{"error": requests.ConnectionError("refused")}] * 3)


@pytest.mark.parametrize(
    ("mode", "meta", "sentence"),
    [
        ("stock", WHOLE, "the server of stock runs aircache"),
        ("prefill", {}, "the server of prefill says nothing of aircache"),
        (
            "prefill",
            {"aircache": None, "aircache_reason": "no_gain"},
            "a request in mode prefill was left alone (no_gain)",
        ),
        (
            "pressure",
            {"aircache": None, "aircache_reason": "no_free_slots"},
            "a request in mode pressure was left alone (no_free_slots)",
        ),
    ],
)
def test_a_mislabelled_mode_is_not_measured(mode: str, meta: Any, sentence: str) -> None:
    with pytest.raises(ServerError) as raised:
        check_mode(mode, [Answer(meta=meta)])
    assert str(raised.value) == sentence
    check_mode(mode, [Answer(meta=meta, failed="aborted")])


def row_of(mode: str, answers: list[str], **changes: Any) -> dict[str, Any]:
    kept = {"stock": 1.0, "prefill": 0.1, "pressure": 0.5}[mode]
    return {
        "requests": 4,
        "failed": 0,
        "tokens": 192,
        "ttft_limit_seconds": 4.0,
        "tpot_limit_seconds": 0.1,
        "mode_flags": " ".join(MODES[mode]),
        "requests_per_second": 2.0,
        "goodput": 1.5,
        "p50_ttft_seconds": 0.5,
        "p99_ttft_seconds": 3.0,
        "p99_tpot_seconds": 0.05,
        "retractions": 0,
        "exact": 3,
        "packed": 0 if mode == "stock" else 4,
        "packed_early": 0 if mode == "stock" else 1,
        "kept": kept,
        "answers": answers,
        **changes,
    }


def write(path: Path) -> None:
    results = Results(path, SMALL.about())
    stock = ["A", "B", "C", "D"]
    for rate, mode, answers, changes in (
        (1.0, "stock", stock, {}),
        (1.0, "prefill", ["A", "B", "C", "E"], {"exact": 2}),
        (1.0, "pressure", stock, {"packed": 0, "packed_early": 0, "kept": 1.0}),
        (2.0, "stock", stock, {"goodput": 0.5, "retractions": 7}),
        (2.0, "prefill", stock, {}),
        (2.0, "pressure", stock, {"goodput": 1.2, "retractions": 1}),
    ):
        results.add(key_of(mode, rate), row_of(mode, answers, **changes) | {"load": 0.0})


def test_table_and_plot(tmp_path: Path) -> None:
    path = tmp_path / "load.jsonl"
    write(path)
    report(path)
    text = path.with_suffix(".md").read_text()
    assert "token within 4 s of their arrival and 0.1 s or less" in text
    assert "| 2, stock | 0.50 | 2.00 | 0.50 | 3.00 | 0.050 | 7 | 0 | 75 % | - | - | - | - |" in text
    assert (
        "| 1, prefill | 1.50 | 2.00 | 0.50 | 3.00 | 0.050 | 0 | 0 | 50 % | 75 % | 100 % | 25 % "
        "| 0.10 |"
    ) in text
    assert "Goal met: where nothing is packed, pressure answers as stock does (4 of 4)." in text
    assert "Goal **missed**: pressure retracts no more than prefill does (1 and 0)." in text
    assert "Pressure's goodput is 0.80 to 1.00 of prefill's." in text
    assert "- pressure: `--kv-policy aircache" in text
    assert path.with_suffix(".png").stat().st_size > 1000


def test_a_table_without_pressure(tmp_path: Path) -> None:
    path = tmp_path / "load.jsonl"
    write(path)
    rows = [row for row in read(path) if row["key"]["mode"] != "pressure"]
    text = "\n".join(load_table(rows))
    assert "| 2, prefill |" in text and "Goal" not in text
    assert not list(load_table([]))


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--rate", "0"], "a rate must be above 0, got 0"),
        (["--rate", "nan"], "a rate must be above 0, got nan"),
        (["--mode", "late"], "a mode must be one of stock, prefill, pressure, shadow, got 'late'"),
    ],
)
def test_bad_load(
    argv: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--load", *argv, "--file", str(tmp_path / "rows.jsonl")]) == 2
    assert capsys.readouterr().err == f"Nothing was measured: {sentence}.\n"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--load", "--capacity"], "--load and --capacity are two runs"),
        (["--load", "--url", "http://127.0.0.1:1"], "--load does not read --url"),
        (["--load", "--batch", "4"], "--load does not read --batch"),
        (["--load", "--rounds", "2"], "--load does not read --rounds"),
        (["--load", "--when", "pressure"], "--load does not read --when"),
        (["--capacity", "--rate", "1"], "--capacity does not read --rate"),
        (["--mode", "stock"], "the sweep does not read --mode"),
        (["--load", "--when", "pressure"], "--load does not read --when"),
    ],
)
def test_what_a_run_does_not_read(
    argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {sentence}\n")


def test_a_measured_rate_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No server is started where nothing is missing, and none of a mode that misses nothing."""
    path = tmp_path / "load.jsonl"
    write(path)
    monkeypatch.setattr(load, "servers", lambda _, modes: pytest.fail(f"started {modes}"))
    load.measure(Results(path, SMALL.about()), SMALL, list(COMPARED), [1.0, 2.0])
    with pytest.raises(pytest.fail.Exception, match=r"started \['stock'\]"):
        load.measure(Results(path, SMALL.about()), SMALL, ["stock"], [1.0, 3.0])
    assert default_file(parser().parse_args(["--load"])) == RESULTS / "load.jsonl"
