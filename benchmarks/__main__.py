# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks`: measure on this machine's CPU; `python -m benchmarks report`: show it."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.records import RESULTS, Results

PARTS = ("attention", "pass", "overhead", "serving")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Stock SGLang against AirCache on a CPU. A run that was cut off goes on.",
        allow_abbrev=False,
    )
    top.add_argument("action", nargs="?", choices=("run", "report"), default="run")
    top.add_argument("--quick", action="store_true", help="few cells, a few minutes")
    top.add_argument("--only", choices=PARTS, action="append", help="this part; may be repeated")
    top.add_argument("--rounds", type=int, help="times each server is started (default 2)")
    top.add_argument(
        "--file",
        type=Path,
        help="the result file (default benchmarks/results/cpu.jsonl, quick.jsonl with --quick)",
    )
    top.add_argument("--fresh", action="store_true", help="drop the file's rows first")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.rounds is not None and arguments.rounds < 1:
        parser().error(f"--rounds must be at least 1, got {arguments.rounds}")
    path = arguments.file or RESULTS / ("quick.jsonl" if arguments.quick else "cpu.jsonl")
    if arguments.action == "run":
        run(path, arguments)
    if not path.exists():
        print(f"no results in {path}; measure first", file=sys.stderr)
        return 1
    from benchmarks.report import report

    report(path)
    return 0


def run(path: Path, arguments: argparse.Namespace) -> None:
    # Read when torch is imported, here and in the servers. One thread: two cores also have to run
    # the tokenizer and the client, and threads that wait for one another multiply any disturbance.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Leave through the servers' context managers, which end them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
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

        passes(results, visual, [0.1] if quick else [0.5, 0.1], budget=0.3 if quick else 1.0)
    if "overhead" in parts:
        from benchmarks.decode_attention import overhead

        overhead(results, [6, 28], budget=0.5)
    if "serving" in parts:
        from benchmarks.compare_cpu import serve

        retentions = [1.0, 0.1] if quick else [1.0, 0.5, 0.1]
        serve(results, batches, visual, retentions, arguments.rounds or (1 if quick else 2))


if __name__ == "__main__":
    sys.exit(main())
