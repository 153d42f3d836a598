# SPDX-License-Identifier: Apache-2.0
"""The plot of bench_kernels.py: decode of a step, and every kernel against its floor."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.records import Row, read


def timed_rows(path: Path) -> list[Row]:
    """Of a result file; the last measurement of a case counts."""
    rows = read(path)
    names = ("kernel", "model", "batch", "visual", "retention")
    timed = [row for row in rows if "seconds" in row and not row["smoke"]]
    return list({tuple(row[name] for name in names): row for row in timed}.values())


def plot(path: Path) -> Path:
    """Draw the rows of `path` into a PNG beside it, and return that; a column for each model.

    Raises ValueError where the file holds no timed row.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = timed_rows(path)
    if not rows:
        raise ValueError(f"{path} has no timed rows: smoke runs claim no speed")
    models = sorted({row["model"] for row in rows})
    figure, axes = pyplot.subplots(2, len(models), figsize=(6 * len(models), 8), squeeze=False)
    for (step, floor), model in zip(axes.T, models, strict=True):
        mine = [row for row in rows if row["model"] == model]
        batch = max((row["batch"] for row in mine if "decode" in row["kernel"]), default=1)
        for (kernel, retention), points in _lines(
            row for row in mine if "decode" in row["kernel"] and row["batch"] == batch
        ):
            x = [row["visual"] for row in points]
            (line,) = step.plot(
                x, [1e3 * row["seconds"] for row in points], "o-", label=f"{kernel} {retention:g}"
            )
            if kernel == "decode":
                bound = [1e3 * row["floor_seconds"] for row in points]
                step.plot(x, bound, ":", color=line.get_color())
        step.set_title(f"{model}, batch {batch}: decode attention of a step")
        step.set_ylabel("ms, all layers")
        step.set_xscale("log", base=2)
        step.set_yscale("log")
        for (kernel, retention), points in _lines(
            row for row in mine if row["retention"] in (0.1, 1.0) and row["batch"] in (1, batch)
        ):
            x = [row["visual"] for row in points]
            y = [row["of_floor"] for row in points]
            floor.plot(x, y, "o-", label=f"{kernel} {retention:g}")
        floor.axhline(1.0, color="grey", linewidth=1)
        floor.set_ylabel("time over its floor")
        floor.set_xlabel("visual tokens per request")
        floor.set_xscale("log", base=2)
        floor.set_yscale("log")
        for axis in (step, floor):
            axis.grid(alpha=0.3)
            axis.legend(fontsize="small")
    figure.suptitle(f"{rows[-1]['device']}, {rows[-1]['dtype']}; dotted: the floor")
    figure.tight_layout()
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=110)
    pyplot.close(figure)
    return target


def _lines(rows: Iterable[Row]) -> list[tuple[tuple[str, float], list[Row]]]:
    """Rows by kernel and retention, each in the order of the visual tokens."""
    lines: dict[tuple[str, float], list[Row]] = {}
    for row in sorted(rows, key=lambda row: int(row["visual"])):
        lines.setdefault((row["kernel"], row["retention"]), []).append(row)
    return sorted(lines.items())
