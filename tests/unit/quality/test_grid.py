# SPDX-License-Identifier: Apache-2.0
"""A grid that is cut off goes on without losing or repeating a row."""

from __future__ import annotations

import io
import json
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.quality.client import Answer, RequestError
from benchmarks.quality.grid import FAILURES, Grid, Rows, read
from benchmarks.quality.samples import Sample
from benchmarks.quality.settings import FULL, REVISIONS, Setting, current
from benchmarks.records import identity

RUN = {"model": "a", "weights": None, "command": "test"}
SAMPLES = [Sample("ours", "value", f"{i}", "?", ("a",), "exact_match") for i in range(7)]
SETTINGS = [Setting.of(p, r) for p in ("snapkv", "aircache") for r in (0.1, 0.01)]
SETTINGS.insert(2, Setting.of(FULL))


class Server:
    """Answers at once; `fails` says which requests do not get one, by their number."""

    def __init__(self, cut: int | None = None, fails: Sequence[int] = ()) -> None:
        self.asked: list[tuple[str, Setting]] = []
        self._cut, self._fails = cut, fails
        self._lock = threading.Lock()

    def __call__(self, sample: Sample, setting: Setting) -> Answer:
        with self._lock:
            number = len(self.asked)
            if number == self._cut:
                raise KeyboardInterrupt
            self.asked.append((sample.id, setting))
        if number in self._fails:
            raise RequestError(f"request {number}")
        return Answer("a", (), {"columns": 1} if setting.compresses else None, 0.01)


def run(path: Path, server: Any, **options: Any) -> Grid:
    with Rows(path, RUN) as rows:
        options = {"concurrency": 3, "compare": False, **options}
        grid = Grid(rows, SAMPLES, SETTINGS, server, out=io.StringIO(), **options)
        grid.run()
    return grid


def test_runs_of_one_moment_have_numbers_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with (
        Rows(path, {**RUN, "command": "a"}) as first,
        Rows(path, {**RUN, "command": "b"}) as second,
    ):
        for number in range(3):
            first.add({"sample": f"a{number}"}, {})
            second.add({"sample": f"b{number}"}, {})
    runs, rows = read(path)
    command = {row["run"]: row["command"] for row in runs}
    assert sorted(command.values()) == ["a", "b"]
    assert Counter(command[row["run"]] for row in rows) == {"a": 3, "b": 3}
    assert all(row["key"]["sample"][0] == command[row["run"]] for row in rows)


def asked_keys(path: Path) -> Counter[str]:
    return Counter(identity(row["key"]) for row in read(path)[1])


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    cuts=st.lists(st.integers(0, 20), max_size=3),
    torn=st.integers(0, 30),
    fails=st.lists(st.integers(0, 5), max_size=2),
)
def test_no_row_is_lost_or_repeated(
    cuts: list[int], torn: int, fails: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("grid") / "rows.jsonl"
    for cut in cuts:
        try:
            run(path, Server(cut, fails))
        except KeyboardInterrupt:
            pass
        before = read(path)[1] if path.exists() else []
        if torn and path.exists():  # killed within a write
            with path.open("a") as file:
                file.write('{"key": {"dataset": "ours", "kin'[:torn])
    last = Server()
    run(path, last)
    keys = asked_keys(path)
    assert len(keys) == len(SAMPLES) * len(SETTINGS) and set(keys.values()) == {1}
    if cuts:
        assert read(path)[1][: len(before)] == before
        assert len(last.asked) == len(keys) - len(before)
    assert all("columns" in row for row in read(path)[1] if row["key"]["setting"]["retention"] < 1)
    again = Server()
    run(path, again)
    assert again.asked == []


def test_more_samples_and_settings_extend_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with Rows(path, RUN) as rows:
        Grid(rows, SAMPLES[:2], SETTINGS[:1], Server(), out=io.StringIO()).run()
    server = Server()
    run(path, server)
    assert len(server.asked) == len(SAMPLES) * len(SETTINGS) - 2
    runs, rows = read(path)
    assert [one["run"] for one in runs] == [1, 2]
    assert Counter(row["run"] for row in rows) == {1: 2, 2: len(server.asked)}


def test_a_failed_request_is_asked_again_in_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    grid = run(path, Server(fails=[3, 9]))
    assert len(grid.failed) == 2 and "request 3" in grid.failed[0]
    server = Server()
    assert run(path, server).failed == [] and len(server.asked) == 2


def test_a_server_that_only_fails_ends_the_run(tmp_path: Path) -> None:
    server = Server(fails=range(1000))
    with pytest.raises(RequestError, match=f"{FAILURES} requests in a row failed, the last: ours"):
        run(tmp_path / "rows.jsonl", server, concurrency=1)
    assert len(server.asked) == FAILURES


def test_another_models_answers_are_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    run(path, Server())
    with pytest.raises(ValueError, match=r"answers of a \(None\), not of b \(None\)"):
        Rows(path, {**RUN, "model": "b"})
    path.unlink()
    with Rows(path, {**RUN, "weights": "w"}) as rows:
        rows.add({"sample": "s"}, {})
    with Rows(path, {**RUN, "weights": "w", "model": "b"}) as rows:  # moved
        rows.add({"sample": "t"}, {})
    with pytest.raises(ValueError, match=r"answers of a \(w\), not of a \(v\)"):
        Rows(path, {**RUN, "weights": "v"})


def test_the_full_cache_comes_first_and_is_the_reference(tmp_path: Path) -> None:
    """Tokens "x" agree, then the answers part; the last distribution compared is where they do."""
    path = tmp_path / "rows.jsonl"
    near, far = {"x": -0.2, "y": -2.0}, {"x": -2.0, "y": -0.2}

    def ask(sample: Sample, setting: Setting) -> Answer:
        if setting.policy == FULL:
            return Answer("a", (("x", near), ("x", near), ("x", near), ("x", near)), None, 0)
        if setting.retention == 0.1:
            return Answer("a", (("x", near),) * 4, {}, 0)
        return Answer("b", (("x", near), ("x", near), ("y", far), ("y", far)), {}, 0)

    grid = run(path, ask, compare=True, concurrency=1)
    assert grid.settings[0].policy == FULL
    rows = {identity(row["key"]["setting"]): row for row in read(path)[1]}
    assert "same" not in rows[identity(Setting.of(FULL).key())]
    high, low = (rows[identity(Setting.of("snapkv", r).key())] for r in (0.1, 0.01))
    assert (high["same"], high["divergence"], high["score"]) == (4, 0.0, 1.0)
    assert low["same"] == 2 and low["score"] == 0.0
    # Of the second token's and the third's distributions only the third's differs.
    from benchmarks.quality.metrics import token_divergence

    assert low["divergence"] == pytest.approx(token_divergence(near, far) / 2, abs=1e-6)


def test_the_reference_is_asked_again_but_not_written_twice(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with Rows(path, RUN) as rows:
        Grid(rows, SAMPLES, [Setting.of(FULL)], Server(), out=io.StringIO()).run()
    server = Server()
    run(path, server, compare=True)
    assert len(server.asked) == len(SAMPLES) * len(SETTINGS)
    assert set(asked_keys(path).values()) == {1}


def test_a_sample_without_its_full_cache_is_left_to_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    pair = Answer("a", (("x", {"x": -0.1}), ("x", {"x": -0.1})), {}, 0)
    failing = {"2", "4"}

    def ask(sample: Sample, setting: Setting) -> Answer:
        if sample.id in failing and setting.policy == FULL:
            failing.remove(sample.id)
            raise RequestError("once")
        return pair

    assert len(run(path, ask, compare=True).failed) == 2
    rows = read(path)[1]
    assert {row["key"]["sample"] for row in rows} == {"0", "1", "3", "5", "6"}
    assert run(path, ask, compare=True).failed == []
    rows = read(path)[1]
    assert len(rows) == len(SAMPLES) * len(SETTINGS)
    compared = [row for row in rows if row["key"]["setting"]["policy"] != FULL]
    assert all(row["divergence"] == 0.0 for row in compared)


def test_rows_of_an_older_revision_are_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    run(path, Server())
    monkeypatch.setitem(REVISIONS, "snapkv", 2)
    server = Server()
    run(path, server)
    assert {setting.policy for _, setting in server.asked} == {"snapkv"}
    assert len(server.asked) == 2 * len(SAMPLES)
    of_today = [row for row in read(path)[1] if current(row["key"]["setting"])]
    assert len(of_today) == len(SAMPLES) * len(SETTINGS)
    assert [row["run"] for row in of_today if row["key"]["setting"]["policy"] == "snapkv"] == (
        [2] * len(server.asked)
    )


def test_progress_says_what_is_left(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    out = io.StringIO()
    with Rows(path, RUN) as rows:
        Grid(rows, SAMPLES[:1], SETTINGS, Server(), out=out).run()
        Grid(rows, SAMPLES[:2], SETTINGS, Server(), out=out).run()
    assert "5/5 rows, 0 old, 0 s left" in out.getvalue()
    assert "10/10 rows, 5 old, 0 s left" in out.getvalue()
    assert json.loads(path.read_text().splitlines()[0])["command"] == "test"
