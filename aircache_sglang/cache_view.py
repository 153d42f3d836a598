# SPDX-License-Identifier: Apache-2.0
"""`aircache cache`: the radix tree of a running server, drawn on a terminal or as JSON.

Reads `internal_states[i]["aircache"]` of SGLang's GET /server_info; docs/radix-cache.md lists the
fields. Needs neither torch nor SGLang.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from aircache_sglang.connection import Connection

TIMEOUT = 30.0
DEFAULT_URL = "http://127.0.0.1:30000"


def add_subcommand(subparsers: Any) -> None:
    """Add `cache` to an argparse sub-command list; its `run` default takes the parsed arguments."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "cache", help="draw the radix tree of a running server"
    )
    parser.add_argument(
        "--url", action="append", help=f"a server, may be repeated (default: {DEFAULT_URL})"
    )
    parser.add_argument("--api-key", help="the server's --api-key")
    parser.add_argument("--json", action="store_true", help="print the dump as it is")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the tree of each data-parallel rank of each server; returns the exit code."""
    urls = args.url or [DEFAULT_URL]
    try:
        dumps = [(url, dump) for url in urls for dump in fetch(url, api_key=args.api_key)]
    except ValueError as error:
        print(f"aircache cache: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps([dump for _, dump in dumps], indent=2))
    elif len(dumps) == 1:
        print(draw(dumps[0][1]))
    else:
        head = "{}, data-parallel rank {}\n{}"
        print("\n\n".join(head.format(url, dump["dp_rank"], draw(dump)) for url, dump in dumps))
    return 0


def fetch(url: str, *, api_key: str | None = None) -> list[dict[str, Any]]:
    """The dump of each data-parallel rank. Raises ValueError that says what is wrong with `url`."""
    info = Connection(url, api_key, timeout=TIMEOUT).call("/server_info")
    states = info.get("internal_states") if isinstance(info, dict) else None
    dumps = [state["aircache"] for state in states or () if "aircache" in state]
    if not dumps:
        raise ValueError(f"{url} runs without --kv-policy")
    return sorted(dumps, key=lambda dump: int(dump["dp_rank"]))


def draw(dump: dict[str, Any]) -> str:
    """One rank's tree as indented lines under a summary."""
    pool, totals = dump["pool"], dump["totals"]
    lines = [
        f"pool {pool['size']} slots: {pool['free']} free, {pool['evictable']} evictable, "
        f"{pool['protected']} held, {pool['private']} with requests; "
        f"unlocked text {pool['unlocked_text']} of at most {pool['text_bound']}"
    ]
    if "states" in pool:
        lines.append(
            f"{pool['states_size']} recurrent states: {pool['states_free']} free, "
            f"{pool['states']} in the tree"
        )
    if totals:
        lines.append(", ".join(f"{name} {count}" for name, count in sorted(totals.items())))
    for node in dump["nodes"]:
        what = "tombstone" if node["tombstone"] else f"{node['slots']} slots"
        if node["host_slots"]:
            what = "in host memory" if node["tombstone"] else f"{what} (and in host memory)"
        if node["columns"]:
            what += f" ({node['columns']} columns)"
        if node["state"]:
            what += ", a state"
        held = f", held {node['locks']}x" if node["locks"] else ""
        name = f" {node['name']}" if node["name"] else ""
        lines.append(
            f"{'  ' * node['depth']}- {node['kind']}{name}: {node['tokens']} tokens, {what}{held}, "
            f"used {node['idle_seconds']:.0f} s ago"
        )
    if dump["nodes_left_out"]:
        lines.append(f"... {dump['nodes_left_out']} nodes more")
    return "\n".join(lines)
