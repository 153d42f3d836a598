# SPDX-License-Identifier: Apache-2.0
"""Samples x settings, asked many at a time, written row by row; what is there is not asked again.

A file is JSON lines: of each run one `{"run": n, ...}` that says what was run where, then rows
`{"key": {"dataset", "kind", "sample", "setting"}, "run": n, "answer", "score", ...}`.
"""

from __future__ import annotations

import fcntl
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks import records
from benchmarks.quality.client import Answer, RequestError
from benchmarks.quality.metrics import token_divergence
from benchmarks.quality.samples import Sample
from benchmarks.quality.settings import FULL, Setting
from benchmarks.records import Row, cut_unfinished_line, identity

FAILURES = 10  # in a row: then something is wrong with more than a sample
REPORTED = ("visual_tokens", "columns", "layer_budgets", "visual_mass")

Ask = Callable[[Sample, Setting], Answer]


class Rows:
    """A result file, open for one run. Threads may append; a row is on disk when `add` returns.

    Runs may share a file at the same time; they do not see each other's rows, so that each must
    have samples of its own, as by `--kinds`.

    Args:
        run: what this run's rows are under: versions, device, command, `model`, `weights`.

    Raises:
        ValueError: the file has another model's answers, or is not such a file.
    """

    def __init__(self, path: Path, run: Row) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        runs, rows = read(path) if records.stored(path).exists() else ([], [])
        for other in runs:
            # Weights are the same wherever they stand.
            if (other["weights"] or other["model"]) != (run["weights"] or run["model"]):
                raise ValueError(
                    f"{path} has answers of {other['model']} ({other['weights']}), not of "
                    f"{run['model']} ({run['weights']}): name another --file"
                )
        records.unpack(path)
        if path.exists():
            cut_unfinished_line(path)
        self._path, self._run = path, run
        self._number: int | None = None  # until there is a row to go with it
        self._known = {identity(row["key"]) for row in rows}
        self._lock = threading.Lock()
        self._file = path.open("a")

    def __enter__(self) -> Rows:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def has(self, key: Row) -> bool:
        return identity(key) in self._known

    def add(self, key: Row, row: Row) -> None:
        with self._lock:
            if self._number is None:
                self._number = self._begin()
            self._write({"key": key, "run": self._number, **row})
            self._known.add(identity(key))

    def _begin(self) -> int:
        """Write what this run's rows are under; its number, which no other run of the file has."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            number: int = 1 + max((other["run"] for other in read(self._path)[0]), default=0)
            self._write({"run": number, **self._run})
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        return number

    def _write(self, row: Row) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def read(path: Path) -> tuple[list[Row], list[Row]]:
    """The runs and the rows of a file."""
    lines = records.read(path)
    return [row for row in lines if "key" not in row], [row for row in lines if "key" in row]


def key_of(sample: Sample, setting: Setting) -> Row:
    return {
        "dataset": sample.dataset,
        "kind": sample.kind,
        "sample": sample.id,
        "setting": setting.key(),
    }


class Grid:
    """Asks what the file lacks.

    One thread takes all settings of a sample, the full cache first: its prompt stays in the
    server's radix tree for the others, and its distributions are what theirs are compared with.

    Args:
        ask: answers one sample under one setting; called from several threads.
        compare: whether answers carry logprobs, to be compared with the full cache's.
    """

    def __init__(
        self,
        rows: Rows,
        samples: Sequence[Sample],
        settings: Sequence[Setting],
        ask: Ask,
        *,
        concurrency: int = 8,
        compare: bool = True,
        out: Any = sys.stderr,
    ) -> None:
        self.rows = rows
        self.settings = sorted(dict.fromkeys(settings), key=lambda s: s.policy != FULL)
        self.ask = ask
        self.concurrency = concurrency
        self._compare = compare and Setting.of(FULL) in settings
        self.failed: list[str] = []
        missing = [(sample, self._missing(sample)) for sample in samples]
        self._samples = [(sample, settings) for sample, settings in missing if settings]
        total = len(samples) * len(self.settings)
        self._progress = Progress(total, sum(len(settings) for _, settings in self._samples), out)
        self._in_a_row = 0
        self._stop = threading.Event()

    def _missing(self, sample: Sample) -> list[Setting]:
        return [s for s in self.settings if not self.rows.has(key_of(sample, s))]

    def run(self) -> None:
        """Ask; afterwards `failed` has the message of each request that failed.

        Raises:
            RequestError: FAILURES requests failed in a row.
        """
        with ThreadPoolExecutor(self.concurrency) as pool:
            work = [pool.submit(self._sample, *one) for one in self._samples]
            try:
                for done in as_completed(work):
                    done.result()
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
            finally:
                self._progress.end()

    def _sample(self, sample: Sample, missing: Sequence[Setting]) -> None:
        reference = None
        settings = list(missing)
        if self._compare and settings[0].policy != FULL:
            settings.insert(0, Setting.of(FULL))
        for setting in settings:
            if self._stop.is_set():
                return
            try:
                answer = self.ask(sample, setting)
            except RequestError as error:
                self._fail(f"{sample.dataset} {sample.id}, {setting.policy}: {error}")
                if self._compare and setting.policy == FULL:
                    return  # rows without a divergence would never be asked again
                continue
            self._in_a_row = 0
            if setting.policy == FULL:
                reference = answer
            if setting in missing:
                self.rows.add(key_of(sample, setting), row_of(sample, setting, answer, reference))
                self._progress.step()

    def _fail(self, message: str) -> None:
        self.failed.append(message)
        self._in_a_row += 1
        self._progress.step()
        if self._in_a_row >= FAILURES:
            self._stop.set()
            raise RequestError(f"{self._in_a_row} requests in a row failed, the last: {message}")


def row_of(sample: Sample, setting: Setting, answer: Answer, full: Answer | None) -> Row:
    """`same` tokens begin both this answer and the full cache's; `divergence` is the mean, in bits.

    Of the next-token distributions up to the first different token, without the first: the prefill
    draws it from the whole cache. None where there is nothing to compare.
    """
    row: Row = {
        "answer": answer.text,
        "score": sample.score(answer.text),
        "metric": sample.metric,
        "group": sample.group or sample.id,
        "seconds": round(answer.seconds, 3),
    }
    if answer.report is not None:
        row |= {name: answer.report[name] for name in REPORTED if name in answer.report}
    if full is None or not answer.tokens or not full.tokens or setting.policy == FULL:
        return row
    pairs = list(zip(answer.tokens, full.tokens, strict=False))
    same = next((i for i, (a, b) in enumerate(pairs) if a[0] != b[0]), len(pairs))
    bits = [token_divergence(a[1], b[1]) for a, b in pairs[1 : same + 1]]
    row["same"] = same
    row["divergence"] = round(sum(bits) / len(bits), 6) if bits else None
    return row


class Progress:
    """How many of the rows are there: a line rewritten on a terminal, a line a minute elsewhere."""

    def __init__(self, total: int, missing: int, out: Any) -> None:
        self.total, self.missing, self.out = total, missing, out
        self.done = 0
        self._started = time.monotonic()
        self._shown = 0.0
        self._lock = threading.Lock()
        self._live = out.isatty()

    def step(self) -> None:
        with self._lock:
            self.done += 1
            now = time.monotonic()
            if now - self._shown >= (0.2 if self._live else 60):
                self._shown = now
                self._show()

    def end(self) -> None:
        with self._lock:
            self._show()
            if self._live:
                print(file=self.out)

    def _show(self) -> None:
        had = self.total - self.missing
        share = (had + self.done) / self.total if self.total else 1.0
        seconds = time.monotonic() - self._started
        left = seconds / self.done * (self.missing - self.done) if self.done else 0.0
        bar = "#" * int(24 * share)
        line = f"[{bar:24}] {had + self.done}/{self.total} rows, {had} old, {left:.0f} s left"
        if self._live:
            line = f"\r{line}\x1b[K"
        print(line, end="" if self._live else "\n", file=self.out, flush=True)
