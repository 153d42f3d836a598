# SPDX-License-Identifier: Apache-2.0
"""The rising load as a table, and as the picture of goodput and quality against it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from benchmarks.records import Row
from benchmarks.report import Cells, goal, table

# Stock's line lies below the others where they agree, and must not be hidden.
STYLES = {
    "stock": {"color": "0.55", "lw": 5, "marker": "o", "ms": 9, "label": "stock SGLang"},
    "prefill": {"color": "C1", "lw": 2.5, "marker": "s", "ms": 6, "label": "prefill"},
    "pressure": {"color": "C0", "lw": 1.5, "marker": "o", "ms": 4, "label": "pressure"},
    "shadow": {"color": "C2", "lw": 1.5, "marker": "v", "ms": 6, "label": "every answer compared"},
}


def load_table(rows: list[Row]) -> Iterator[str]:
    """Each rate in each mode, and what pressure is to hold."""
    cells = Cells(rows, "load")
    if not cells.rows:
        return
    found = sorted(cells.rows, key=lambda row: row["key"]["rate"])
    ttft, tpot = (found[0][f"{name}_limit_seconds"] for name in ("ttft", "tpot"))
    lines = [cells_of(row, same_as_stock(cells, row)) for row in found]
    yield "## A rising load\n"
    yield (
        f"{found[0]['requests']} requests at each rate, open loop, Poisson arrivals; the same "
        f"questions at the same moments in all modes. Answers have {found[0]['tokens']} tokens, "
        "the end ignored; *exact* compares what stands before the end with what stands on the "
        f"page. *Goodput* counts requests with a first token within {ttft:g} s of their arrival "
        f"and {tpot:g} s or less a token after it. *Early* are requests that were packed before "
        "the end of their answer, which alone can lose it; *kept* is the mean share of the visual "
        "KV when they ended; *as stock's* are answers equal to stock's at the rate.\n"
    )
    head = ["rate, mode", "goodput, 1/s", "served, 1/s", "p50 TTFT, s", "p99 TTFT, s"]
    head += ["p99 TPOT, s", "retractions", "failed", "exact", "as stock's"]
    head += ["packed", "early", "kept"]
    yield table(head, lines)
    for mode in cells.values("mode"):
        flags = next(row["mode_flags"] for row in found if row["key"]["mode"] == mode)
        yield f"- {mode}: `{flags}`"
    yield ""
    yield from goals(cells)


def cells_of(row: Row, same: int | None) -> list[str]:
    """One row of the table."""
    n = row["requests"]

    def share(count: int) -> str:
        return f"{100 * count / n:.0f} %"

    compressed = row["key"]["mode"] != "stock"
    return [
        f"{row['key']['rate']:g}, {row['key']['mode']}",
        f"{row['goodput']:.2f}",
        f"{row['requests_per_second']:.2f}",
        f"{row['p50_ttft_seconds']:.2f}",
        f"{row['p99_ttft_seconds']:.2f}",
        f"{row['p99_tpot_seconds']:.3f}",
        str(row["retractions"]),
        str(row["failed"]),
        share(row["exact"]),
        "-" if same is None else share(same),
        share(row["packed"]) if compressed else "-",
        share(row["packed_early"]) if compressed else "-",
        f"{row['kept']:.2f}" if compressed else "-",
    ]


def same_as_stock(cells: Cells, row: Row) -> int | None:
    """Answers that are stock's at the same rate; None for stock itself and without it."""
    stock = cells.find(mode="stock", rate=row["key"]["rate"])
    if row["key"]["mode"] == "stock" or not stock:
        return None
    pairs = zip(row["answers"], stock[0]["answers"], strict=True)
    return sum(ours == other for ours, other in pairs)


def goals(cells: Cells) -> Iterator[str]:
    """Of pressure: stock's answers where nothing was packed, and what it does beside prefill."""
    pressure = cells.find(mode="pressure")
    light = [row for row in pressure if row["packed"] == 0]
    same = [(row["requests"], same_as_stock(cells, row)) for row in light]
    compared = [(asked, equal) for asked, equal in same if equal is not None]
    if compared:
        asked, equal = (sum(values) for values in zip(*compared, strict=True))
        yield goal(
            asked == equal,
            f"where nothing is packed, pressure answers as stock does ({equal} of {asked})",
        )
    pairs = [
        (row, prefill[0])
        for row in pressure
        if (prefill := cells.find(mode="prefill", rate=row["key"]["rate"]))
    ]
    if not pairs:
        return
    retractions = [sum(row["retractions"] for row in of) for of in zip(*pairs, strict=True)]
    yield goal(
        retractions[0] <= retractions[1],
        f"pressure retracts no more than prefill does ({retractions[0]} and {retractions[1]})",
    )
    shares = [row["goodput"] / other["goodput"] for row, other in pairs if other["goodput"]]
    if shares:
        yield f"Pressure's goodput is {min(shares):.2f} to {max(shares):.2f} of prefill's.\n"


def plot_load(path: Path, rows: list[Row]) -> None:
    """Goodput, and exact answers, over the requests that arrive a second."""
    cells = Cells(rows, "load")
    if not cells.rows:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6))
    for mode in filter(cells.values("mode").__contains__, STYLES):
        of = sorted(cells.find(mode=mode), key=lambda row: row["key"]["rate"])
        rates = [row["key"]["rate"] for row in of]
        left.plot(rates, [row["goodput"] for row in of], **STYLES[mode])
        right.plot(rates, [100 * row["exact"] / row["requests"] for row in of], **STYLES[mode])
    left.set_ylabel("requests in time per second")
    right.set_ylabel("answers that are right, %")
    left.set_ylim(bottom=0)
    # A few points are what there is to see; the axis says where it begins.
    least = min(100 * row["exact"] / row["requests"] for row in cells.rows)
    right.set_ylim(max(0, 10 * math.floor(least / 10 - 1)), 101)
    for axis in (left, right):
        axis.set_xlabel("requests that arrive per second")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles, names = left.get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    figure.legend(handles, names, loc="upper center", ncols=len(names), frameon=False)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    pyplot.close(figure)
