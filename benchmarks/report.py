# SPDX-License-Identifier: Apache-2.0
"""A result file as Markdown and as a picture, written beside it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from benchmarks.records import Row

# The project's goals for this path; the report says of each whether it is met.
PASS_SHARE, ATTENTION_RATIO, NOTHING_COMPRESSED = 0.05, 0.3, 0.02


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
    """The pass in CPU seconds against those of stock's prefill of the same prompt."""
    cells, serving = Cells(rows, "compression pass"), Cells(rows, "serving")
    if not cells.rows:
        return
    lines, shares = [], []
    for row in cells.rows:
        n, retention = row["key"]["visual_tokens"], row["key"]["retention"]
        line = [f"{n}", f"{retention:g}", milliseconds(row["seconds"])]
        stock = serving.find(visual_tokens=n, batch=1, retention=None)
        if stock:
            share = row["seconds"] / median(stock, "prefill_cpu_seconds")
            shares.append(share)
            line.append(f"{100 * share:.1f} %")
        else:
            line.append("-")
        lines.append(line)
    yield "## The compression pass alone\n"
    yield "One request on one thread; as a share of the CPU time of stock's prefill of it.\n"
    yield table(["visual tokens", "retention", "ms", "share of the prefill"], lines)
    if shares:
        yield goal(
            max(shares) < PASS_SHARE,
            f"in CPU time, the pass costs less than {100 * PASS_SHARE:g} % of the prefill "
            f"(worst {100 * max(shares):.1f} %)",
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


def serving_tables(rows: list[Row]) -> Iterator[str]:
    cells = Cells(rows, "serving")
    if not cells.rows:
        return
    lines, shares, plain = [], [], []
    same = compared = 0
    for n in cells.values("visual_tokens"):
        for batch in cells.values("batch"):
            stock = cells.find(visual_tokens=n, batch=batch, retention=None)
            for retention in cells.values("retention"):
                found = cells.find(visual_tokens=n, batch=batch, retention=retention)
                if not found or not stock:
                    continue

                def relative(name: str, found: list[Row] = found, stock: list[Row] = stock) -> str:
                    # A count read in the middle of a very short decode may have missed it.
                    base = median(stock, name)
                    return f"{median(found, name) / base:.2f}" if base else "-"

                share = median(found, lambda row: row["pass_seconds"] / row["prefill_seconds"])
                line = [f"{batch} x {n}", setting(retention)]
                line += [f"{median(found, 'prefill_seconds'):.2f}", relative("prefill_seconds")]
                line += ["-" if retention in (None, 1.0) else f"{100 * share:.1f} %"]
                line += [milliseconds(median(found, "token_seconds")), relative("token_seconds")]
                line += [milliseconds(median(found, "token_cpu_seconds"))]
                line += [relative("token_cpu_seconds")]
                line += [f"{median(found, 'kv_in_use'):.0f}", relative("kv_in_use")]
                lines.append(line)
                if retention not in (None, 1.0):
                    shares.append(share)
                if retention == 1.0:
                    name = "token_cpu_seconds"
                    plain.append(median(found, name) / median(stock, name) - 1)
                    for row in found:
                        pair = [s for s in stock if s["key"]["round"] == row["key"]["round"]]
                        compared += len(pair)
                        same += sum(s["outputs"] == row["outputs"] for s in pair)
    yield "## Servers\n"
    yield (
        "Medians over rounds; x is the share of stock's value. *Pass* is the compression pass's "
        "part of the prefill, *CPU* what the scheduler process spends a decode step.\n"
    )
    head = ["batch x visual tokens", "retention", "prefill, s", "x", "pass"]
    head += ["ms per token", "x", "CPU, ms", "x", "KV tokens in use", "x"]
    yield table(head, lines)
    if compared:
        yield f"Retention 1 gave stock's tokens in {same} of {compared} batches.\n"
    if shares:
        yield goal(
            max(shares) < PASS_SHARE,
            f"by the clock, the pass takes less than {100 * PASS_SHARE:g} % of the prefill "
            f"(median {100 * statistics.median(shares):.1f} %, worst {100 * max(shares):.1f} %)",
        )
    if plain:
        yield goal(
            statistics.median(plain) < NOTHING_COMPRESSED,
            f"nothing compressed costs less than {100 * NOTHING_COMPRESSED:g} % of a decode step's "
            f"CPU time (median {100 * statistics.median(plain):+.1f} %, from "
            f"{100 * min(plain):+.1f} to {100 * max(plain):+.1f} %)",
        )


def goal(met: bool, text: str) -> str:
    return f"Goal {'met' if met else '**missed**'}: {text}.\n"


def header(path: Path, rows: list[Row]) -> str:
    names = ("version", "sglang", "torch", "device", "threads", "git", "command")
    seen = {name: list(dict.fromkeys(str(row[name]) for row in rows)) for name in names}
    loads = [row["load"] for row in rows]
    lines = [f"# {path.name}\n", *(f"- {name}: {'; '.join(seen[name])}" for name in names)]
    first, last = min(row["time"] for row in rows), max(row["time"] for row in rows)
    lines.append(f"- measured: {first} to {last}")
    lines.append(f"- load average before each row: {min(loads):.1f} to {max(loads):.1f}\n")
    return "\n".join(lines)


def plot(path: Path, rows: list[Row]) -> None:
    """Time per token and KV in use over the prompt's length, a panel a batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = Cells(rows, "serving")
    if not cells.rows:
        return
    batches, visual = cells.values("batch"), cells.values("visual_tokens")
    panels = (("token_seconds", 1000, "ms per token"), ("kv_in_use", 1, "KV tokens in use"))
    figure, axes = pyplot.subplots(
        len(panels), len(batches), figsize=(4 * len(batches), 6), squeeze=False, sharex=True
    )
    for line, (name, factor, label) in zip(axes, panels, strict=True):
        for axis, batch in zip(line, batches, strict=True):
            for retention in cells.values("retention"):
                points = [
                    (n, factor * median(found, name))
                    for n in visual
                    if (found := cells.find(visual_tokens=n, batch=batch, retention=retention))
                ]
                legend = setting(retention) if retention is None else f"retention {retention:g}"
                axis.plot(*zip(*points, strict=True), marker="o", label=legend)
            axis.set_title(f"batch {batch}")
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
        line[0].set_ylabel(label)
    for axis in axes[-1]:
        axis.set_xlabel("visual tokens per request")
        axis.set_xticks(visual)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110)
    pyplot.close(figure)


def report(path: Path) -> None:
    """Write the table and the plot beside `path`, and print the table."""
    from benchmarks.records import read

    rows = read(path)
    parts = [header(path, rows), *serving_tables(rows)]
    parts += [*pass_table(rows), *attention_tables(rows), *overhead_table(rows)]
    text = "\n".join(parts)
    path.with_suffix(".md").write_text(text)
    plot(path, rows)
    print(text)
