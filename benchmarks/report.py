# SPDX-License-Identifier: Apache-2.0
"""A result file as Markdown, written beside it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from aircache_sglang.policy import columns
from aircache_sglang.runtime.gate import CPU
from benchmarks.records import SHARED, Row

# The project's goals for this path; the report says whether they are met.
ATTENTION_RATIO = 0.3
THRESHOLD_RATIO = 1.2  # of the pass with budgets from one threshold, to eq. 11's


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    align = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, align, *rows)) + "\n"


class Cells:
    """The rows of one benchmark by what was measured."""

    def __init__(self, rows: Iterable[Row], benchmark: str) -> None:
        self.rows = [row for row in rows if row["key"]["benchmark"] == benchmark]

    def values(self, name: str) -> list:
        """The distinct values of a key, in the order in which they were measured."""
        return list(dict.fromkeys(row["key"][name] for row in self.rows))

    def find(self, **key: object) -> list[Row]:
        return [row for row in self.rows if all(row["key"][name] == key[name] for name in key)]


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.2f}" if seconds < 0.01 else f"{1000 * seconds:.1f}"


def setting(retention: float | None) -> str:
    return "stock" if retention is None else f"{retention:g}"


def median(rows: list[Row], of: str | Callable[[Row], float]) -> float:
    read = of if callable(of) else lambda row: row[of]
    return statistics.median(read(row) for row in rows)


def attention_tables(rows: list[Row]) -> Iterator[str]:
    cells = Cells(rows, "decode attention")
    if not cells.rows:
        return
    lines, at_8k = [], []
    for shape in cells.values("shape"):
        for n in cells.values("visual_tokens"):
            for batch in cells.values("batch"):
                stock = cells.find(shape=shape, visual_tokens=n, batch=batch, retention=None)
                if not stock:
                    continue
                line = [f"{shape}, {batch} x {n}", milliseconds(stock[0]["seconds"])]
                for retention in cells.values("retention"):
                    ours = cells.find(
                        shape=shape, visual_tokens=n, batch=batch, retention=retention
                    )
                    if retention is None or not ours:
                        continue
                    ratio = ours[0]["seconds"] / stock[0]["seconds"]
                    line.append(f"{ratio:.2f}")
                    if n == 8192 and retention == 0.1:
                        at_8k.append(ratio)
                lines.append(line)
    yield "## Attention of one decode step\n"
    yield "One thread, all layers, our sorting into buckets included; as a share of stock's.\n"
    names = [f"retention {r:g}" for r in cells.values("retention") if r is not None]
    yield table(["shape, batch x visual tokens", "stock, ms", *names], lines)
    if at_8k:
        yield goal(
            max(at_8k) < ATTENTION_RATIO,
            f"at 8192 visual tokens and retention 0.1 less than {ATTENTION_RATIO} of stock's "
            f"(worst {max(at_8k):.2f})",
        )


def pass_table(rows: list[Row]) -> Iterator[str]:
    """The pass in milliseconds and in reads, the unit of the gate, beside the gate's model."""
    cells, attention = Cells(rows, "compression pass"), Cells(rows, "decode attention")
    if not cells.rows:
        return
    lines, shares = [], []
    for row in cells.rows:
        key = row["key"]
        n, n_text, retention = key["visual_tokens"], key["instruction_tokens"], key["retention"]
        model = CPU.of_pass(n, columns(retention, n), n_text) / n
        line = [f"{n}", f"{n_text}", f"{retention:g}", milliseconds(row["seconds"])]
        stock = attention.find(shape=key["shape"], visual_tokens=n, batch=1, retention=None)
        if stock:
            measured = row["seconds"] / stock[0]["seconds"]
            shares.append(measured / model)
            line.append(f"{measured:.1f}")
        else:
            line.append("-")
        lines.append([*line, f"{model:.1f}"])
    yield "## The compression pass alone\n"
    yield (
        "One request on one thread. *Steps* is the pass over stock's decode attention of one step "
        "of the same request; *gate* what `--aircache-gate auto` takes it for.\n"
    )
    yield table(["visual tokens", "instruction", "retention", "ms", "steps", "gate"], lines)
    if shares:
        yield (
            f"The pass costs {min(shares):.2f} to {max(shares):.2f} of what the gate takes it for "
            f"(median {statistics.median(shares):.2f}).\n"
        )


def budgets_table(rows: list[Row]) -> Iterator[str]:
    cells = Cells(rows, "layer budgets")
    if not cells.rows:
        return
    lines = []
    for row in cells.rows:
        key = row["key"]
        shown = [f"{key['instruction_tokens']}", f"{key['retention']:g}"]
        shown += [*map(milliseconds, row["seconds"]), f"{row['ratio']:.2f}"]
        lines.append([f"{key['shape']}, {key['visual_tokens']}", *shown])
    yield "## The pass with budgets from one threshold beside eq. 11's\n"
    yield "One request on one thread, in turns.\n"
    head = ["shape, visual tokens", "instruction", "retention", "eq. 11, ms", "global, ms", "x"]
    yield table(head, lines)
    ratios = [row["ratio"] for row in cells.rows]
    yield goal(
        max(ratios) <= THRESHOLD_RATIO,
        f"at most {THRESHOLD_RATIO} of eq. 11's (median {statistics.median(ratios):.2f}, worst "
        f"{max(ratios):.2f})",
    )


def overhead_table(rows: list[Row]) -> Iterator[str]:
    cells = Cells(rows, "step overhead")
    if not cells.rows:
        return
    yield "## What our backend adds to a decode step with nothing compressed\n"
    lines = []
    for layers in cells.values("layers"):
        stock, ours = (cells.find(layers=layers, backend=b)[0] for b in ("none", "aircache"))
        lines.append([str(layers), f"{1e6 * (ours['seconds'] - stock['seconds']):.1f}"])
    yield table(["layers", "microseconds a step"], lines)


def goal(met: bool, text: str) -> str:
    return f"Goal {'met' if met else '**missed**'}: {text}.\n"


def header(path: Path, rows: list[Row]) -> str:
    names = ("version", *SHARED, "git", "command")
    seen = {
        name: list(dict.fromkeys(str(row[name]) for row in rows if row.get(name) is not None))
        for name in names
    }
    loads = [row["load"] for row in rows if "load" in row]
    lines = [f"# {path.name}\n"]
    lines += [f"- {name}: {'; '.join(values)}" for name, values in seen.items() if values]
    first, last = min(row["time"] for row in rows), max(row["time"] for row in rows)
    lines.append(f"- measured: {first} to {last}")
    if loads:
        lines.append(f"- load average before each row: {min(loads):.1f} to {max(loads):.1f}")
    return "\n".join([*lines, ""])


def write(path: Path, rows: list[Row], parts: Iterable[str]) -> None:
    """Write what the rows of `path` come to beside it, and print it."""
    text = "\n".join([header(path, rows), *parts])
    path.with_suffix(".md").write_text(text)
    print(text)


def report(path: Path) -> None:
    """Write the tables beside `path`, and print them."""
    from benchmarks.records import read

    rows = read(path)
    parts = (pass_table, budgets_table, attention_tables, overhead_table)
    write(path, rows, [text for part in parts for text in part(rows)])
