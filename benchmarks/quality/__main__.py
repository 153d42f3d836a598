# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.quality`: ask; `python -m benchmarks.quality report`: tables and plots."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.documents import CHECKPOINT
from benchmarks.quality.client import Answer, Client, RequestError
from benchmarks.quality.datasets import load, names
from benchmarks.quality.grid import Ask, Grid, Rows
from benchmarks.quality.samples import Sample
from benchmarks.quality.settings import GRIDS, POLICIES, PRUNING, Setting, grid
from benchmarks.records import RESULTS, path_label, provenance, weights


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description="Answers under compression. A run that was cut off goes on where it stopped.",
        epilog="Grids: " + "; ".join(f"{name}: {what}" for name, what in GRIDS.items()) + ".",
        allow_abbrev=False,
    )
    top.add_argument("action", nargs="?", choices=("run", "report"), default="run")
    top.add_argument("--grid", choices=GRIDS, action="append", help="may be repeated (table1)")
    top.add_argument("--dataset", choices=names(), default="ours")
    top.add_argument("--path", type=Path, help="folder of a published data set")
    top.add_argument("--samples", type=int, default=100, help="of each kind; 0: all (100)")
    top.add_argument("--kinds", nargs="+", metavar="KIND", help="of the data set (all)")
    top.add_argument("--policies", nargs="+", default=POLICIES, metavar="POLICY")
    top.add_argument("--retentions", nargs="+", type=float, metavar="R")
    top.add_argument("--url", help="of a running server; otherwise one is started for the run")
    top.add_argument("--model", type=Path, default=CHECKPOINT, help="checkpoint (our own)")
    top.add_argument("--server-flags", default="", help="further flags of the started server")
    top.add_argument("--concurrency", type=int, default=8)
    top.add_argument("--no-logprobs", action="store_true", help="for servers without logprobs")
    top.add_argument("--file", type=Path, default=RESULTS / "quality.jsonl")
    top.add_argument("--page", type=Path, help="that `report` writes into (quality.md)")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        if arguments.action == "report":
            from benchmarks.quality.report import PAGE, report

            report(arguments.file, arguments.page or PAGE)
            return 0
        return run(arguments, sys.argv[1:] if argv is None else argv)
    except (ValueError, RequestError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    # Read when torch is imported, here and in a server: threads that wait for one another multiply
    # any disturbance, and the tokenizer and the client need a core too.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # Leave through the server's context manager, which ends it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if arguments.samples < 0 or arguments.concurrency < 1:
        raise ValueError("--samples must be at least 0 and --concurrency at least 1")
    settings = [
        setting
        for name in arguments.grid or ["table1"]
        for setting in grid(name, arguments.policies, arguments.retentions)
    ]
    samples = of_kinds(
        load(arguments.dataset, arguments.path, arguments.samples or None), arguments.kinds
    )
    with server_url(arguments) as url:
        client = Client(url, logprobs=not arguments.no_logprobs)
        about = provenance() | {
            "command": shlex.join(["python", "-m", "benchmarks.quality", *argv]),
            "time": time.strftime("%FT%TZ", time.gmtime()),
            "model": path_label(Path(client.model)),
            "weights": weights(Path(client.model)),
        }
        with Rows(arguments.file, about) as rows:
            work = Grid(
                *(rows, samples, settings, answering(client, settings)),
                concurrency=arguments.concurrency,
                compare=not arguments.no_logprobs,
            )
            work.run()
    if work.failed:
        print(f"error: requests failed: {len(work.failed)}, as {work.failed[0]}", file=sys.stderr)
    return 1 if work.failed else 0


def of_kinds(samples: Sequence[Sample], kinds: Sequence[str] | None) -> Sequence[Sample]:
    """The samples of these kinds; of all for None."""
    known = dict.fromkeys(sample.kind for sample in samples)
    for kind in kinds or ():
        if kind not in known:
            raise ValueError(f"--kinds must be of {', '.join(known)}, got {kind!r}")
    return [sample for sample in samples if kinds is None or sample.kind in kinds]


@contextlib.contextmanager
def server_url(arguments: argparse.Namespace) -> Iterator[str]:
    """The given server's, or that of one that runs until the end of the block."""
    if arguments.url:
        yield arguments.url
        return
    from aircache_sglang.platform import has_accelerator
    from aircache_sglang.testing import Server

    if not (arguments.model / "config.json").is_file():
        raise ValueError(f"--model must be a checkpoint folder, got {arguments.model}")
    device = () if has_accelerator() else ("--device", "cpu")
    flags = [*device, "--dtype", "float32", "--kv-policy", "aircache"]
    flags += shlex.split(arguments.server_flags)
    print("starting the server", file=sys.stderr, flush=True)
    with Server(arguments.model.resolve(), flags) as server:
        yield server.url


def answering(client: Client, settings: Sequence[Setting]) -> Ask:
    """The server answers, but for pruning, which runs in this process."""
    if not any(setting.policy in PRUNING for setting in settings):
        return client.ask
    from benchmarks.quality.pruning import Pruner

    pruner = Pruner(client.model)

    def ask(sample: Sample, setting: Setting) -> Answer:
        return (pruner if setting.policy in PRUNING else client).ask(sample, setting)

    return ask


if __name__ == "__main__":
    sys.exit(main())
