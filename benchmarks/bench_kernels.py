# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.bench_kernels`: the kernels against the floor of the machine they run on.

Every case is checked against the torch oracle before it is timed; a case that fails its check is
reported as failed, not timed, and the exit code is 1. The floor is bytes over the copy bandwidth
measured here, or FLOP over the matrix rate measured here, whichever is longer. One JSON line each.
Others' decode attention (rival_decode.py) is checked and timed on the same uncompressed batch where
it is installed. `--smoke` runs tiny cases, on a CPU in Triton's interpreter, and claims no speed.
A run ends with the project's goals, each met, not met or not measured. `plot` draws a result file
(plot_kernels.py). Needs torch and triton; matplotlib for `plot`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.kernel_cases import (
    DEVICE,
    MODELS,
    Timer,
    decode_cases,
    machine_rates,
    mixed_case,
    pass_cases,
    tables_case,
)
from benchmarks.plot_kernels import plot
from benchmarks.records import RESULTS, Row, provenance
from benchmarks.rival_decode import rival_cases

FILE = RESULTS / "kernels.jsonl"


def goals(rows: Sequence[Row]) -> list[str]:
    """The goals of the project on an H200, each with what `rows` of one run say about it."""

    def at(kernel: str, batch: int, retention: float) -> list[Row]:
        wanted = (batch, 16384, retention)
        return [
            row
            for row in rows
            if row["kernel"] == kernel
            and (row["batch"], row["visual"], row["retention"]) == wanted
            and "seconds" in row
        ]

    def bandwidth(row: Row) -> float:
        return row["bytes"] / row["seconds"] / row["copy_bytes_per_s"]

    full, tenth = at("decode", 16, 1.0), at("decode", 16, 0.1)
    rivals = [row for row in rows if "ours_over_it" in row]
    one = [row for row in at("pass", 1, 0.1) if "share_of_prefill" in row]
    claims: list[tuple[str, list[float], Callable[[float], bool]]] = [
        ("decode, 16 x 16k, retention 1: share of copy bandwidth, at least 0.85",
         [bandwidth(row) for row in full], lambda x: x >= 0.85),
        ("decode, uncompressed: time over others', at most 1",
         [row["ours_over_it"] for row in rivals], lambda x: x <= 1.0),
        ("decode, 16 x 16k, retention 0.1: time over the bytes' floor, at most 1.3",
         [1.0 / bandwidth(row) for row in tenth], lambda x: x <= 1.3),
        ("decode, 1 x 32k whole among 63 x 1k packed: time over the bytes' floor, at most 1.15",
         [1.0 / bandwidth(row) for row in rows
          if row["kernel"] == "decode mixed" and "seconds" in row], lambda x: x <= 1.15),
        ("pass, one request of 16k: share of its prefill, below 0.01",
         [row["share_of_prefill"] for row in one], lambda x: x < 0.01),
        ("pass: launches, at most 8",
         [row["launches"] for row in rows if row["kernel"] == "pass"], lambda x: x <= 8),
    ]  # fmt: skip
    lines: list[str] = []
    for claim, values, holds in claims:
        verdict = "not measured"
        if values:
            verdict = "met" if all(holds(value) for value in values) else "NOT met"
            verdict += " (" + ", ".join(f"{value:.3g}" for value in values) + ")"
        lines.append(f"{claim}: {verdict}")
    return lines


def show(row: Row) -> None:
    label = (
        f"{row['kernel']:20} {row['model']:13} batch {row['batch']:2} visual {row['visual']:6} "
        f"retention {row['retention']:4}"
    )
    if not row["checked"]:
        print(f"{label}  FAILED its check, not timed", flush=True)
    elif row["smoke"]:
        print(f"{label}  checked", flush=True)
    else:
        speed = f"  {row['speedup']:.2f}x of retention 1" if "speedup" in row else ""
        if "ours_over_it" in row:
            speed = f"  ours takes {row['ours_over_it']:.2f}x of its time"
        print(
            f"{label}  {row['seconds'] * 1e3:9.3f} ms  {row['of_floor']:6.2f}x its floor{speed}",
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_kernels", description=__doc__)
    parser.add_argument("action", nargs="?", choices=["run", "plot"], default="run")
    parser.add_argument("--smoke", action="store_true", help="tiny cases; runs without a GPU")
    parser.add_argument("--model", choices=sorted(MODELS), action="append")
    parser.add_argument("--batch", type=int, action="append", help="default 8 and 16")
    parser.add_argument("--visual", type=int, action="append", help="default 2048 to 32768")
    parser.add_argument("--retention", type=float, action="append", help="default .5, .1, .05")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tune", action="store_true", help="search the launch shape of decode")
    parser.add_argument("--file", type=Path, default=FILE, help="JSON lines are appended to it")
    arguments = parser.parse_args(argv)
    if arguments.action == "plot":
        try:
            print(plot(arguments.file))
        except (OSError, ValueError) as error:
            print(f"Nothing to plot: {error}.", file=sys.stderr)
            return 1
        return 0
    if DEVICE.type != "cuda" and not arguments.smoke:
        parser.error("no GPU here: only --smoke runs without one")
    smoke = arguments.smoke
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    models = arguments.model or (["tiny"] if smoke else ["qwen2-vl-7b", "internvl2-8b"])
    batches = arguments.batch or ([2] if smoke else [8, 16])
    visual = arguments.visual or ([96] if smoke else [2048, 8192, 16384, 32768])
    retentions = arguments.retention or ([0.1] if smoke else [0.5, 0.1, 0.05])

    timer = Timer(arguments.repeats)
    copy, matrix = machine_rates(timer, dtype, smoke)
    if not smoke:
        print(f"copy {copy / 1e12:.2f} TB/s, {dtype} matrix {matrix / 1e12:.0f} TFLOP/s")
    where = provenance() | {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU, interpreter",
        "cuda": torch.version.cuda if DEVICE.type == "cuda" else None,
        "time": time.strftime("%FT%TZ", time.gmtime()),
    }
    failed = False
    seen: list[Row] = []

    def cases() -> Iterator[Row]:
        for name in models:
            for n_visual in visual:
                for batch, retention in itertools.product([1, *batches], retentions):
                    yield from pass_cases(timer, name, batch, n_visual, retention, dtype)
                for batch in batches:
                    yield from decode_cases(
                        *(timer, name, batch, n_visual, retentions, dtype, arguments.tune),
                        rivals=rival_cases,
                    )
                    yield tables_case(timer, name, batch, n_visual, dtype)
            yield mixed_case(timer, name, smoke, dtype)

    for row in cases():
        row |= {**where, "smoke": smoke, "dtype": str(dtype)}
        row |= {"copy_bytes_per_s": copy, "matrix_flop_per_s": matrix}
        if smoke:
            row.pop("speedup", None)
            row.pop("ours_over_it", None)
        elif row["checked"]:
            row["floor_seconds"] = max(row["bytes"] / copy, row["flop"] / matrix)
            row["of_floor"] = row["seconds"] / row["floor_seconds"]
            if row["kernel"] == "pass":
                row["share_of_prefill"] = row["seconds"] * matrix / row["prefill_flop"]
        failed |= not row["checked"]
        show(row)
        seen.append(row)
        if not smoke:
            arguments.file.parent.mkdir(parents=True, exist_ok=True)
            with arguments.file.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print("Goals on an H200; a prefill is its FLOP over the matrix rate measured here:")
    # a smoke run's times are the interpreter's
    for line in goals([row for row in seen if not smoke or row["kernel"] == "pass"]):
        print(f"  {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
