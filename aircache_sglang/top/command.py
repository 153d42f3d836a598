# SPDX-License-Identifier: Apache-2.0
"""`aircache top`: a table that refreshes, or plain lines where nobody looks at a terminal."""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from aircache_sglang.top.reading import Reading, Watched, together
from aircache_sglang.top.view import Row, line, rows, table

DEFAULT_URL = "http://127.0.0.1:30000"
SHORTEST = 0.2  # seconds between two readings


def add_subcommand(subparsers: Any) -> None:
    """Add `top` to an argparse sub-command list."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "top",
        help="watch running servers on a terminal",
        description="Shows requests, slots, columns, hits, packing and retractions of running "
        "servers, and refreshes (docs/monitoring.md). Without a terminal: a line a server.",
        allow_abbrev=False,
    )
    parser.add_argument(
        *("--url", "-u"),
        action="append",
        help=f"a server; again for more (default: {DEFAULT_URL})",
    )
    parser.add_argument("--api-key", help="the servers' --api-key")
    parser.add_argument(
        "--interval", type=float, default=2.0, metavar="S", help="seconds (default: %(default)s)"
    )
    parser.add_argument("--once", action="store_true", help="look once, and end")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Watch until interrupted; returns the exit code."""
    try:
        if not SHORTEST <= args.interval < float("inf"):
            raise ValueError(f"--interval must be at least {SHORTEST}, got {args.interval:g}")
        urls = dict.fromkeys(args.url or [DEFAULT_URL])
        servers = [Watched(url, args.api_key) for url in urls]
        for server in servers:
            server.check()
        show = _on_a_terminal if sys.stdout.isatty() else _in_lines
        show(servers, args.interval, args.once)
    except ValueError as error:
        print(f"aircache top: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass  # how it is ended
    return 0


Cells = list[list[Row] | str]


def looks(servers: Sequence[Watched], interval: float, once: bool) -> Iterator[Cells]:
    """What each server says, then all together if there are several, every `interval` seconds.

    A server that does not answer later is a sentence in its place; at the first look it raises
    ValueError.
    """
    before: list[Reading | None] = [None] * (len(servers) + 1)
    first = True
    while True:
        readings: list[Reading | str] = []
        for server in servers:
            try:
                readings.append(server.read())
            except ValueError as error:
                if first:
                    raise
                readings.append(" ".join(str(error).split()))
        known = [each for each in readings if not isinstance(each, str)]
        if len(servers) > 1 and known:
            # Not what a part of them has added: a server that is away would count as a restart.
            readings.append(together(known))
        cells: Cells = []
        for place, each in enumerate(readings):
            if isinstance(each, str):
                cells.append(each)
                before[place] = None
                continue
            whole = place < len(servers) or len(known) == len(servers)
            cells.append(rows(each, before[place] if whole else None))
            before[place] = each if whole else None
        yield cells
        if once:
            return
        first = False
        time.sleep(interval)


def _on_a_terminal(servers: Sequence[Watched], interval: float, once: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    names = [server.url.partition("://")[2] for server in servers]
    names += ["together"] if len(servers) > 1 else []
    console = Console()

    def drawn(cells: Cells) -> Any:
        ends = "" if once else f", every {interval:g} s; Ctrl+C ends"
        return table(f"aircache top, {datetime.datetime.now():%H:%M:%S}{ends}", names, cells)

    if once:
        for cells in looks(servers, interval, once):
            console.print(drawn(cells))
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        for cells in looks(servers, interval, once):
            live.update(drawn(cells), refresh=True)


def _in_lines(servers: Sequence[Watched], interval: float, once: bool) -> None:
    for cells in looks(servers, interval, once):
        when = f"{datetime.datetime.now().astimezone():%Y-%m-%dT%H:%M:%S%z}"
        for server, cell in zip(servers, cells, strict=False):
            if isinstance(cell, str):
                print(f"aircache top: {cell}", file=sys.stderr, flush=True)
            else:
                print(f"{when} url={server.url} {line(cell)}", flush=True)
