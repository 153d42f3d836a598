# SPDX-License-Identifier: Apache-2.0
"""A result file of the sweep as Markdown and as a picture, written beside it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.records import RESULTS, ROOT, Row, read
from benchmarks.report import Cells, goal, header, median, milliseconds, setting, table

PASS_SHARE, GAIN_SHARE, NEVER_SLOWER = 0.01, 0.9, 0.98
MANY_ROUNDS = 20  # for an interval to mean something
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
    def speeds(self) -> list[float]:
        """Of each round the base's prefill + decode over this setting's, which followed it."""
        return speeds(self.base, self.rows, lambda r: r["prefill_seconds"] + r["decode_seconds"])

    @property
    def name(self) -> str:
        return f"{self.batch} x {self.visual_tokens}, {retention_name(self.retention)}"

    @property
    def bound_share(self) -> float | None:
        """How much of the time of a step its bytes account for."""
        return None if self.bound_seconds is None else self.bound_seconds / self.of("token_seconds")

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


def speeds(base: list[Row], rows: list[Row], seconds: Callable[[Row], float]) -> list[float]:
    """base / rows of each round that both have."""
    of_base = {row["key"]["round"]: seconds(row) for row in base}
    return [
        of_base[row["key"]["round"]] / seconds(row)
        for row in rows
        if row["key"]["round"] in of_base
    ]


def spread(values: list[float]) -> str:
    """Median, and the range over rounds."""
    if not values:
        return "-"
    return f"{statistics.median(values):.2f} ({min(values):.2f}..{max(values):.2f})"


def retention_name(retention: float | None) -> str:
    return "stock" if retention is None else f"retention {retention:g}"


def half(cells: Cells) -> bool:
    """Whether rounding depends on a batch's company; so taken where the precision is unknown."""
    return any(row["dtype"] != "float32" for row in cells.rows)


def pairs(cells: Cells, batch: int, visual_tokens: int) -> list[tuple[Row, Row]]:
    """Stock's row and retention 1's of each round that has both."""
    at = {"batch": batch, "visual_tokens": visual_tokens}
    ours = {row["key"]["round"]: row for row in cells.find(**at, retention=1.0)}
    return [
        (row, ours[row["key"]["round"]])
        for row in cells.find(**at, retention=None)
        if row["key"]["round"] in ours
    ]


def refusal(cells: Cells, batch: int, visual_tokens: int) -> str | None:
    """Why a cell is not reported: retention 1 did not answer as stock SGLang does, or is not known.

    In half precision rounding depends on the batch's company: there the single requests decide.
    """
    deciding = pairs(cells, 1 if half(cells) else batch, visual_tokens)
    if not pairs(cells, batch, visual_tokens):
        return "refused: retention 1 and stock were not measured in the same round"
    if not deciding:
        return "refused: in half precision single requests are compared, and --batch 1 is missing"
    if any(stock["outputs"] != ours["outputs"] for stock, ours in deciding):
        return "refused: answers at retention 1 differ from stock's"
    return None


def same_answers(cells: Cells, batch: int, visual_tokens: int) -> float | None:
    """The share of requests whose tokens at retention 1 are stock's; None where rows do not say."""
    found = [
        a == b
        for stock, ours in pairs(cells, batch, visual_tokens)
        for a, b in zip(
            stock.get("request_outputs", []), ours.get("request_outputs", []), strict=False
        )
    ]
    return statistics.mean(found) if found else None


def half_precision_note(cells: Cells) -> Iterator[str]:
    """What the refusal does not look at: whether larger batches answer as stock's."""
    shares = [
        f"{batch} x {n}: {'unknown' if share is None else f'{100 * share:.0f} %'}"
        for n in sorted(cells.values("visual_tokens"))
        for batch in sorted(cells.values("batch"))
        if batch > 1 and pairs(cells, batch, n)
        for share in [same_answers(cells, batch, n)]
    ]
    if half(cells) and shares:
        yield (
            "Half precision rounds by a batch's company, so only single requests must answer as "
            f"stock's. Requests of larger batches that did: {'; '.join(shares)}.\n"
        )


def left_out(rows: list[Row], cells: Cells) -> Iterator[tuple[int, int, str]]:
    """Cells that no run could hold, with the last reason."""
    found = {
        (key["visual_tokens"], key["batch"], key["retention"]): key["reason"]
        for key in (row["key"] for row in Cells(rows, "left out").rows)
    }
    for (n, batch, retention), reason in found.items():
        if not cells.find(visual_tokens=n, batch=batch, retention=retention):
            yield batch, n, f"{retention_name(retention)} left out: {reason}"


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
            # A server given alone is compared with itself.
            reason = refusal(cells, batch, n) if base is None else None
            if reason is not None:
                yield batch, n, reason
                continue
            for retention in sorted(found, key=lambda r: -2 if r is None else -r):
                yield Line(batch, n, retention, found[retention], found[base], bandwidth)


def tables(rows: list[Row]) -> Iterator[str]:
    cells = Cells(rows, "serving")
    missing = list(left_out(rows, cells))
    if not cells.rows and not missing:
        return
    lines = [*lines_of(cells, bandwidth_of(rows)), *missing]
    yield "## Servers\n"
    stock = None in cells.values("retention")
    base = "stock" if stock else "retention 1"
    bandwidth = bandwidth_of(rows)
    yield (
        f"Medians over rounds; x is the share of {base}'s value. *Pass* is the compression pass's "
        f"part of the prefill. *Speed* is {base}'s prefill + decode over the setting's, compared "
        "round by round, with its range over the rounds. *Bound* is the time that reading weights "
        "and KV once would take"
        + (f" at the measured {bandwidth / 1e9:.1f} GB/s" if bandwidth else "")
        + ", *reached* its share of the time per token; *gain reached* is the share of the "
        "possible gain: the time a step lost over the time it would have lost had it shrunk as "
        "the bytes it reads.\n"
    )
    head = ["batch x visual tokens", "retention", "prefill, s", "x", "pass", "decode, s"]
    head += ["ms per token", "x", "CPU, ms", "x", "speed", "tokens/s", "bound, ms", "reached"]
    head += ["gain reached", "KV tokens: peak", "in decode"]
    yield table(head, [cells_of(line, len(head)) for line in lines])
    if not stock and cells.rows:
        yield "No stock server was measured: nobody checked these answers.\n"
    yield from half_precision_note(cells)
    gate, gate_speeds = gate_table(rows)
    yield from gate
    yield from goals([line for line in lines if isinstance(line, Line)], gate_speeds, base)


def bandwidth_of(rows: list[Row]) -> float | None:
    """Bytes a second; None where servers were given."""
    found = Cells(rows, "bandwidth").rows
    return float(found[-1]["bytes_per_second"]) if found else None


def gate_table(rows: list[Row]) -> tuple[list[str], dict[str, list[float]]]:
    """Short answers with the gate and without it; and the speeds with it, by name."""
    cells = Cells(rows, "gate")
    lines, found = [], {}
    for n in cells.values("visual_tokens"):
        for tokens in cells.values("tokens"):
            at = {"visual_tokens": n, "tokens": tokens}
            stock, auto, off = (cells.find(**at, gate=gate) for gate in (None, "auto", "off"))
            if not stock or not auto or not off:
                continue
            alone = all(row["reason"] == "no_gain" for row in auto)
            answers = {row["outputs"] for row in stock}
            name = f"{n} visual tokens, answer of {tokens}"
            if alone and not half(cells) and answers != {row["outputs"] for row in auto}:
                lines.append([name, "refused: left alone, but its answer differs from stock's"])
                lines[-1] += ["-"] * 3
                continue
            ratios = [speeds(stock, of, lambda row: row["total_seconds"]) for of in (auto, off)]
            found[f"{name}, gate auto"] = ratios[0]
            total = f"{median(stock, 'total_seconds'):.2f}"
            what = "left alone" if alone else "compressed"
            lines.append([name, what, total, *(spread(ratio) for ratio in ratios)])
    if not lines:
        return [], found
    retention = cells.values("retention")[-1]
    text = (
        f"Single requests with short answers at retention {retention:g}: what `auto` does with "
        "them, and stock's prefill + decode over that of each gate.\n"
    )
    head = ["request", "`auto`", "stock, s", "speed, `auto`", "speed, `off`"]
    return ["## Short answers and the gate\n", text, table(head, lines)], found


def cells_of(line: Line | tuple[int, int, str], width: int) -> list[str]:
    """One row of the table."""
    if isinstance(line, tuple):
        batch, n, reason = line
        return [f"{batch} x {n}", reason, *["-"] * (width - 2)]
    cpu = line.rows[0]["token_cpu_seconds"] is not None
    bound, share, gain = line.bound_seconds, line.bound_share, line.gain
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
        "-" if line.rows is line.base else spread(line.speeds),
        f"{line.tokens_per_second:.0f}",
        "-" if bound is None else milliseconds(bound),
        "-" if share is None else f"{100 * share:.0f} %",
        "-" if gain is None else f"{100 * gain:.0f} %",
        *counts,
    ]


def interval(values: list[float]) -> tuple[float, float, float]:
    """The median, and the values of the ranks between which it lies with 95 % probability.

    A busy machine makes some rounds odd, which a mean and its deviation would follow.
    """
    ordered, n = sorted(values), len(values)
    reach = statistics.NormalDist().inv_cdf(0.975) * math.sqrt(n) / 2
    low, high = max(0, math.floor(n / 2 - reach)), min(n - 1, math.ceil(n / 2 + reach))
    return statistics.median(ordered), ordered[low], ordered[high]


def retention_1_table(rows: list[Row]) -> Iterator[str]:
    """What it costs to serve without compressing, where enough rounds were measured to say."""
    cells, lines = Cells(rows, "serving"), []
    for n in sorted(cells.values("visual_tokens")):
        for batch in sorted(cells.values("batch")):
            found = pairs(cells, batch, n)
            if len(found) < MANY_ROUNDS or refusal(cells, batch, n) is not None:
                continue
            line = [f"{batch} x {n}", str(len(found))]
            for name in ("batch_cpu_seconds", "token_seconds"):
                if any(row.get(name) is None for pair in found for row in pair):
                    line.append("-")
                    continue
                middle, low, high = interval([ours[name] / stock[name] for stock, ours in found])
                line.append(f"{middle:.3f} ({low:.3f}..{high:.3f})")
            lines.append(line)
    if not lines:
        return
    yield "## Nothing compressed, against stock\n"
    yield (
        "Retention 1 compresses nothing, nor does pressure where there is room: what it takes more "
        "than stock is what this project costs every request. Median ratio of the rounds, with its "
        "95 % interval, of the scheduler's CPU time for prefill and decode, and of the time a "
        "token.\n"
    )
    yield table(["batch x visual tokens", "rounds", "CPU", "time of a token"], lines)


def goals(lines: list[Line], gate: dict[str, list[float]], base: str) -> Iterator[str]:
    """gate: the speeds of the requests with the gate, by name."""
    by_name = {line.name: line.speeds for line in lines if line.rows is not line.base} | gate
    found = {name: values for name, values in by_name.items() if values}
    if found:
        slowest = min(found, key=lambda name: statistics.median(found[name]))
        below = sum(statistics.median(values) < NEVER_SLOWER for values in found.values())
        yield goal(
            not below,
            f"prefill + decode at no cell and setting below {NEVER_SLOWER:g} of {base}'s speed "
            f"({below} of {len(found)} are; worst {spread(found[slowest])} at {slowest})",
        )
    compressed = [line for line in lines if line.retention not in (None, 1.0)]
    if not compressed:
        return
    worst = max(line.relative("token_seconds") for line in compressed)
    yield goal(
        worst <= 1 / NEVER_SLOWER,
        f"decode alone, compressed, at no cell below {NEVER_SLOWER:g} of {base}'s speed "
        f"(worst {1 / worst:.2f})",
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
    from matplotlib.lines import Line2D

    cells, bandwidth = Cells(rows, "serving"), bandwidth_of(rows)
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
            name = retention_name(retention)
            lengths = [line.visual_tokens for line in of]
            # Retention 1 lies on stock's line, and must not hide it.
            width, style = 4 if retention is None else 1.5, {"color": f"C{color}"}
            times = [1000 * line.of("token_seconds") for line in of]
            upper.plot(lengths, times, marker="o", lw=width, label=name, **style)
            bounds = [line.bound_seconds for line in of]
            if all(bound is not None for bound in bounds):
                upper.plot(lengths, [1000 * (b or 0) for b in bounds], linestyle=":", **style)
            used = [(line.visual_tokens, line.rows[0]["kv_decode"]) for line in of]
            lower.plot(*zip(*used, strict=True), marker="o", lw=width, **style)
        upper.set_title(f"batch {batch}")
        lower.set_xlabel("visual tokens per request")
        for axis in (upper, lower):
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("ms per token")
    axes[1][0].set_ylabel("KV tokens in decode")
    handles, _ = axes[0][0].get_legend_handles_labels()
    if bandwidth:
        bound = f"bound: weights and KV read once at {bandwidth / 1e9:.1f} GB/s"
        handles.append(Line2D([], [], color="black", linestyle=":", label=bound))
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.legend(handles=handles, loc="upper center", ncols=len(handles), frameon=False)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    pyplot.close(figure)


def report(path: Path) -> None:
    """Write the tables and the plot beside `path`, and print the tables.

    Those of this repository's own results also go between their marks in docs/performance.md.
    """
    from benchmarks.throughput.capacity import capacity_table
    from benchmarks.throughput.load_report import load_table, plot_load

    rows = read(path)
    parts = (tables(rows), retention_1_table(rows), capacity_table(rows), load_table(rows))
    body = "\n".join(itertools.chain.from_iterable(parts))
    text = f"{header(path, rows)}\n{body}"
    path.with_suffix(".md").write_text(text)
    plot(path, rows)
    plot_load(path, rows)
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
