# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks`: measure on this machine's CPU; `python -m benchmarks report`: show it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.records import RESULTS, Results, read

PARTS = ("attention", "pass", "budgets", "overhead")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Parts of AirCache against stock SGLang's on a CPU, without a server (that is "
        "`python -m benchmarks.throughput`). A run that was cut off goes on.",
        allow_abbrev=False,
    )
    top.add_argument("action", nargs="?", choices=("run", "report"), default="run")
    top.add_argument("--quick", action="store_true", help="few cells, a few minutes")
    top.add_argument("--only", choices=PARTS, action="append", help="this part; may be repeated")
    top.add_argument(
        "--file",
        type=Path,
        help="the result file (default benchmarks/results/cpu.jsonl, quick.jsonl with --quick)",
    )
    top.add_argument("--fresh", action="store_true", help="drop the file's rows first")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    path = arguments.file or RESULTS / ("quick.jsonl" if arguments.quick else "cpu.jsonl")
    try:
        if arguments.action == "run":
            run(path, arguments)
        if not path.exists() or not read(path):
            raise ValueError(f"no results in {path}, measure first")
        from benchmarks.report import report

        report(path)
    except ValueError as error:
        print(f"The benchmark stopped: {error}.", file=sys.stderr)
        return 1
    return 0


def run(path: Path, arguments: argparse.Namespace) -> None:
    # Read when torch is imported. One thread: threads that wait for one another multiply any
    # disturbance.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if arguments.fresh:
        path.unlink(missing_ok=True)
    quick = arguments.quick
    parts = arguments.only or PARTS
    batches = [1, 4] if quick else [1, 4, 8]
    visual = [1024, 4096] if quick else [1024, 4096, 8192]
    results = Results(path)
    if "attention" in parts:
        from benchmarks.decode_attention import attention

        attention(results, batches, visual, budget=0.3 if quick else 1.0)
    if "pass" in parts:
        from benchmarks.compression_pass import passes

        instructions = [64] if quick else [24, 64, 128, 256, 512]
        retentions = [0.1] if quick else [0.5, 0.1]
        passes(results, visual, instructions, retentions, budget=0.3 if quick else 1.0)
    if "budgets" in parts:
        from benchmarks.compression_pass import one_threshold

        instructions, retentions = ([64], [0.1]) if quick else ([24, 64, 128], [0.1, 0.02])
        one_threshold(results, visual[:2], instructions, retentions, budget=0.3 if quick else 1.0)
    if "overhead" in parts:
        from benchmarks.decode_attention import overhead

        overhead(results, [6, 28], budget=0.5)


if __name__ == "__main__":
    sys.exit(main())
