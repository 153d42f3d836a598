# SPDX-License-Identifier: Apache-2.0
"""A result file of the sweep as Markdown and as a picture, written beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from benchmarks.records import RESULTS, ROOT, Row, read
from benchmarks.report import Cells, goal, header, median, milliseconds, setting, table

PASS_SHARE, GAIN_SHARE, NEVER_SLOWER = 0.01, 0.9, 0.98
DOCUMENT = ROOT / "docs" / "performance.md"


@dataclasses.dataclass(frozen=True, slots=True)
class Bound:
    """What a decode step must read, in bytes: of the middle of an answer."""

    row: Row
    batch: int
    visual_tokens: int

    @property
    def bytes(self) -> float | None:
        if self.row.get("kv_bytes") is None:
            return None
        kept = self.row["columns"] or self.visual_tokens
        tokens = self.row["prompt_tokens"] - self.visual_tokens + kept + self.row["tokens"] / 2
        return float(self.row["weight_bytes"] + self.batch * tokens * self.row["kv_bytes"])


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """A cell in one setting: medians over its rounds, `base` those of the setting compared with."""

    batch: int
    visual_tokens: int
    retention: float | None
    rows: list[Row]
    base: list[Row]
    bandwidth: float | None

    def of(self, name: str) -> float:
        return median(self.rows, name)

    def relative(self, name: str) -> float:
        return self.of(name) / median(self.base, name)

    @property
    def bound_seconds(self) -> float | None:
        """Weights and KV of a step over the bandwidth."""
        size = Bound(self.rows[0], self.batch, self.visual_tokens).bytes
        return None if size is None or self.bandwidth is None else size / self.bandwidth

    @property
    def gain(self) -> float | None:
        """The share of the possible gain that was reached: the time a step lost, over the time it
        would have lost had it shrunk as the bytes that it must read."""
        ours = Bound(self.rows[0], self.batch, self.visual_tokens).bytes
        base = Bound(self.base[0], self.batch, self.visual_tokens).bytes
        if ours is None or base is None or ours >= base:
            return None
        return (1 - self.relative("token_seconds")) / (1 - ours / base)

    @property
    def pass_share(self) -> float:
        return median(self.rows, lambda row: row["pass_seconds"] / row["prefill_seconds"])

    @property
    def tokens_per_second(self) -> float:
        """Of all requests while all decode."""
        return self.batch / self.of("token_seconds")


def refusal(cells: Cells, batch: int, visual_tokens: int) -> str | None:
    """Why a cell is not reported: retention 1 did not answer as stock SGLang does.

    In half precision rounding depends on the batch's company: there the single requests decide.
    """
    half = any(row["dtype"] != "float32" for row in cells.rows)
    at = {"batch": 1 if half else batch, "visual_tokens": visual_tokens}
    stock = {row["key"]["round"]: row["outputs"] for row in cells.find(**at, retention=None)}
    ours = {row["key"]["round"]: row["outputs"] for row in cells.find(**at, retention=1.0)}
    rounds = stock.keys() & ours.keys()
    if not rounds and stock:
        return "refused: retention 1 is not measured"
    if any(stock[round_] != ours[round_] for round_ in rounds):
        return "refused: answers at retention 1 differ from stock's"
    return None


def lines_of(cells: Cells, bandwidth: float | None) -> Iterator[Line | tuple[int, int, str]]:
    """Lines in the order of the cells' sizes; in place of a refused cell's, its reason."""
    retentions = cells.values("retention")
    base = None if None in retentions else 1.0
    for n in sorted(cells.values("visual_tokens")):
        for batch in sorted(cells.values("batch")):
            found = {
                retention: rows
                for retention in retentions
                if (rows := cells.find(visual_tokens=n, batch=batch, retention=retention))
            }
            if base not in found:
                continue
            reason = refusal(cells, batch, n)
            if reason is not None:
                yield batch, n, reason
                continue
            for retention in sorted(found, key=lambda r: -2 if r is None else -r):
                yield Line(batch, n, retention, found[retention], found[base], bandwidth)


def tables(rows: list[Row]) -> Iterator[str]:
    cells = Cells(rows, "serving")
    if not cells.rows:
        return
    speeds = Cells(rows, "bandwidth").rows
    bandwidth = speeds[-1]["bytes_per_second"] if speeds else None
    lines = list(lines_of(cells, bandwidth))
    yield "## Servers\n"
    base = "stock's" if None in cells.values("retention") else "retention 1's"
    yield (
        f"Medians over rounds; x is the share of {base} value. *Pass* is the compression pass's "
        "part of the prefill. *Bound* is the time that reading weights and KV once would take"
        + (f" at the measured {bandwidth / 1e9:.1f} GB/s" if bandwidth else "")
        + "; *gain reached* is the share of the possible gain: the time a step lost over the time "
        "it would have lost had it shrunk as the bytes it reads.\n"
    )
    head = ["batch x visual tokens", "retention", "prefill, s", "x", "pass", "decode, s"]
    head += ["ms per token", "x", "CPU, ms", "x", "tokens/s", "bound, ms", "gain reached"]
    head += ["KV tokens: peak", "in decode"]
    yield table(head, [cells_of(line, len(head)) for line in lines])
    yield from goals([line for line in lines if isinstance(line, Line)])


def cells_of(line: Line | tuple[int, int, str], width: int) -> list[str]:
    """One row of the table."""
    if isinstance(line, tuple):
        batch, n, reason = line
        return [f"{batch} x {n}", reason, *["-"] * (width - 2)]
    cpu = line.rows[0]["token_cpu_seconds"] is not None
    bound, gain = line.bound_seconds, line.gain
    compressed = line.retention not in (None, 1.0)
    counts = [
        f"{median(known, name):.0f}" if (known := [r for r in line.rows if r[name]]) else "-"
        for name in ("kv_peak", "kv_decode")
    ]
    return [
        f"{line.batch} x {line.visual_tokens}",
        setting(line.retention),
        f"{line.of('prefill_seconds'):.2f}",
        f"{line.relative('prefill_seconds'):.2f}",
        f"{100 * line.pass_share:.1f} %" if compressed else "-",
        f"{line.of('decode_seconds'):.2f}",
        milliseconds(line.of("token_seconds")),
        f"{line.relative('token_seconds'):.2f}",
        milliseconds(line.of("token_cpu_seconds")) if cpu else "-",
        f"{line.relative('token_cpu_seconds'):.2f}" if cpu else "-",
        f"{line.tokens_per_second:.0f}",
        "-" if bound is None else milliseconds(bound),
        "-" if gain is None else f"{100 * gain:.0f} %",
        *counts,
    ]


def goals(lines: list[Line]) -> Iterator[str]:
    compressed = [line for line in lines if line.retention not in (None, 1.0)]
    if not compressed:
        return
    worst = max(line.relative("token_seconds") for line in compressed)
    yield goal(
        worst <= 1 / NEVER_SLOWER,
        f"no cell below {NEVER_SLOWER:g} of the stock speed in decode (worst {1 / worst:.2f})",
    )
    gains = [line.gain for line in compressed if line.gain is not None]
    if gains:
        yield goal(
            min(gains) >= GAIN_SHARE,
            f"at least {100 * GAIN_SHARE:g} % of the possible gain at every cell "
            f"(worst {100 * min(gains):.0f} %)",
        )
    shares = [line.pass_share for line in compressed]
    yield goal(
        max(shares) <= PASS_SHARE,
        f"the pass takes at most {100 * PASS_SHARE:g} % of the prefill "
        f"(worst {100 * max(shares):.1f} %)",
    )


def plot(path: Path, rows: list[Row]) -> None:
    """Time per token with its bound, and KV in use, over the prompt's length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = Cells(rows, "serving")
    speeds = Cells(rows, "bandwidth").rows
    bandwidth = speeds[-1]["bytes_per_second"] if speeds else None
    lines = [line for line in lines_of(cells, bandwidth) if isinstance(line, Line)]
    if not lines:
        return
    batches = sorted({line.batch for line in lines})
    retentions = list(dict.fromkeys(line.retention for line in lines))
    figure, axes = pyplot.subplots(
        2, len(batches), figsize=(4 * len(batches), 6), squeeze=False, sharex=True
    )
    for place, batch in enumerate(batches):
        upper, lower = axes[0][place], axes[1][place]
        for color, retention in enumerate(retentions):
            of = [x for x in lines if x.batch == batch and x.retention == retention]
            if not of:
                continue
            name = setting(retention) if retention is None else f"retention {retention:g}"
            lengths = [line.visual_tokens for line in of]
            style = {"color": f"C{color}"}
            times = [1000 * line.of("token_seconds") for line in of]
            upper.plot(lengths, times, marker="o", label=name, **style)
            bounds = [line.bound_seconds for line in of]
            if all(bound is not None for bound in bounds):
                upper.plot(lengths, [1000 * (b or 0) for b in bounds], linestyle=":", **style)
            used = [(line.visual_tokens, line.rows[0]["kv_decode"]) for line in of]
            lower.plot(*zip(*used, strict=True), marker="o", **style)
        upper.set_title(f"batch {batch}")
        lower.set_xlabel("visual tokens per request")
        for axis in (upper, lower):
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("ms per token (dotted: bound)")
    axes[1][0].set_ylabel("KV tokens in decode")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110)
    pyplot.close(figure)


def report(path: Path) -> None:
    """Write the tables and the plot beside `path`, and print the tables.

    Those of this repository's own results also go between their marks in docs/performance.md.
    """
    from benchmarks.throughput.capacity import capacity_table

    rows = read(path)
    body = "\n".join([*tables(rows), *capacity_table(rows)])
    text = f"{header(path, rows)}\n{body}"
    path.with_suffix(".md").write_text(text)
    plot(path, rows)
    if path.parent.resolve() == RESULTS and body:
        fill_in(DOCUMENT, path, body)
    print(text)


def fill_in(document: Path, path: Path, body: str) -> None:
    """Replace what stands between the marks of a result file, if the document has them."""
    begin, end = (f"<!-- {mark} {path.stem} -->\n" for mark in ("begin", "end"))
    before, found, rest = document.read_text().partition(begin)
    if not found:
        return
    after = rest[rest.index(end) :]
    results = f"../benchmarks/results/{path.stem}"
    links = f"[Rows]({results}.jsonl), [machine and command]({results}.md)."
    if path.with_suffix(".png").exists():
        links += f"\n\n![{path.stem}]({results}.png)"
    # Its headings are a level below the document's.
    lowered = f"\n{body}".replace("\n## ", "\n### ").lstrip()
    document.write_text(f"{before}{begin}{lowered}\n{links}\n{after}")
