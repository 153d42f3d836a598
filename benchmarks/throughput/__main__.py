# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.throughput`: batches, the capacity of a fixed pool, and a rising load."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.records import RESULTS, Results, Row, read

BAD_INPUT = 2  # exit code: nothing was measured, and there is nothing new to report


def parser() -> argparse.ArgumentParser:
    from benchmarks.throughput.load import MODES
    from benchmarks.throughput.plan import PRESETS

    top = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description="Stock SGLang against AirCache by batch size and prompt length. A run that was "
        "cut off goes on; `report` writes table and plot again.",
        allow_abbrev=False,
    )
    top.add_argument("action", nargs="?", choices=("run", "report"), default="run")
    top.add_argument("--preset", choices=tuple(PRESETS), default="cpu-small")
    top.add_argument(
        "--capacity",
        action="store_true",
        help="instead of the sweep: requests held, and the highest rate, at a fixed pool",
    )
    top.add_argument(
        "--when",
        choices=("prefill", "pressure"),
        default="prefill",
        help="`pressure` with --capacity: the retentions packed under pressure too; with "
        "--retention 1: requests that a pool with room leaves whole",
    )
    top.add_argument(
        "--load",
        action="store_true",
        help="instead of the sweep: stock, prefill and pressure at rising request rates",
    )
    top.add_argument(
        "--rate", type=float, action="append", help="with --load: only this one; may be repeated"
    )
    top.add_argument(
        "--mode",
        action="append",
        help=f"with --load: only this of {', '.join(MODES)}; may be repeated",
    )
    top.add_argument(
        "--url",
        help="a running server of Qwen2-VL or Qwen2.5-VL with --kv-policy aircache "
        "--enable-metrics --load-snapshot-publish-interval 1",
    )
    top.add_argument("--stock-url", help="beside --url: the same with --kv-policy none")
    top.add_argument("--batch", type=int, action="append", help="only this one; may be repeated")
    top.add_argument(
        "--visual", type=int, action="append", help="only this prompt length; may be repeated"
    )
    top.add_argument(
        "--retention", type=float, action="append", help="only this one; may be repeated"
    )
    top.add_argument("--rounds", type=int, help="times each cell is measured (the preset says)")
    top.add_argument(
        "--file",
        type=Path,
        help="the result file; by default named by the preset, and by the URL if one is given",
    )
    top.add_argument("--fresh", action="store_true", help="drop the file's rows first")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    # Read when torch is imported, here and in the servers. On a CPU one thread: two cores also have
    # to run tokenizer and client, and threads that wait for one another multiply any disturbance.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    arguments = parser().parse_args(argv)
    if arguments.rounds is not None and arguments.rounds < 1:
        parser().error(f"--rounds must be at least 1, got {arguments.rounds}")
    if arguments.stock_url and not arguments.url:
        parser().error("--stock-url needs --url beside it")
    refused = unread(arguments)
    if refused:
        parser().error(refused)
    path = arguments.file or default_file(arguments)
    code = run(path, arguments) if arguments.action == "run" else 0
    if code == BAD_INPUT:
        return code
    from benchmarks.throughput.report import report

    try:
        if not path.exists() or not read(path):
            raise ValueError(f"no results in {path}, measure first")
        report(path)
    except ValueError as error:
        print(f"Nothing to report: {error}.", file=sys.stderr)
        return code or 1
    return code


def unread(arguments: argparse.Namespace) -> str | None:
    """Of an argument that the chosen run does not read, one sentence."""
    if arguments.load and arguments.capacity:
        return "--load and --capacity are two runs"
    sweep = not arguments.load and not arguments.capacity
    given = {
        "--url": arguments.url and arguments.load,
        "--batch": arguments.batch and arguments.load,
        "--visual": arguments.visual and arguments.load,
        "--rounds": arguments.rounds and arguments.load,
        "--rate": arguments.rate and not arguments.load,
        "--mode": arguments.mode and not arguments.load,
        "--when": arguments.when != "prefill" and arguments.load,
    }
    asked = "the sweep" if sweep else "--load" if arguments.load else "--capacity"
    return next((f"{asked} does not read {name}" for name, wrong in given.items() if wrong), None)


def default_file(arguments: argparse.Namespace) -> Path:
    """Named by what is measured, and by the server where it is not one of our own."""
    if arguments.load:
        return RESULTS / "load.jsonl"
    name = "capacity" if arguments.capacity else arguments.preset
    if arguments.url:
        name += "-" + re.sub(r"[^\w.]+", "-", arguments.url.rpartition("://")[2]).strip("-")
    return RESULTS / f"throughput-{name}.jsonl"


def chosen(arguments: argparse.Namespace) -> tuple[Row, Callable[[Results], None]]:
    """What rows say of the servers, and what measures them; an error if they cannot be."""
    from benchmarks.throughput import capacity, load, run
    from benchmarks.throughput.plan import PRESETS

    if arguments.load:
        modes, rates = arguments.mode or load.COMPARED, arguments.rate or load.RATES
        load.check(modes, rates)
        asked = load.Load()
        return asked.about(), lambda results: load.measure(results, asked, modes, rates)
    given = {"aircache": arguments.url, "none": arguments.stock_url}
    clients = run.connect({policy: url for policy, url in given.items() if url})
    if arguments.capacity:
        held = capacity.Load()
        said = run.about(capacity.PRESET, clients) | {"preset": f"capacity: {held}"}
        return said, lambda results: capacity.measure(
            results, capacity.PRESET, held, clients, arguments.when
        )
    narrowed = {
        "batches": arguments.batch,
        "visual": arguments.visual,
        "retentions": arguments.retention,
        "rounds": arguments.rounds,
    }
    preset = dataclasses.replace(
        PRESETS[arguments.preset],
        when=arguments.when,
        **{name: value for name, value in narrowed.items() if value},
    )
    preset.check()
    said = run.about(preset, clients)
    return said, lambda results: run.sweep(results, preset, clients)


def run(path: Path, arguments: argparse.Namespace) -> int:
    """Measure; what was measured before a failure is kept. Returns the exit code."""
    import psutil

    # requests' errors are OSErrors; ServerError, and torch's want of memory, are RuntimeErrors.
    expected = (ValueError, OSError, RuntimeError, psutil.Error)
    try:
        said, measure = chosen(arguments)
        if arguments.fresh:
            path.unlink(missing_ok=True)
        results = Results(path, said)
    except expected as error:
        print(f"Nothing was measured: {error}.", file=sys.stderr)
        return BAD_INPUT
    # Leave through the servers' context managers, which end them.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        measure(results)
    except expected as error:
        # A server's error is followed by the end of its log.
        first, _, log = str(error).partition("\n")
        if log:
            print(log, file=sys.stderr)
        print(f"The benchmark stopped: {first}. What it has measured is kept.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("The benchmark was interrupted. What it has measured is kept.", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
