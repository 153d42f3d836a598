# SPDX-License-Identifier: Apache-2.0
"""`aircache audit`: what the shadows of a running server have found (`--aircache-shadow`).

Reads `internal_states[i]["aircache"]["shadow"]` of SGLang's GET /server_info; docs/audit.md lists
the fields. Needs neither torch nor SGLang.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from aircache_sglang import cache_view
from aircache_sglang.runtime.agreement import Tally

WORST = 10


def add_subcommand(subparsers: Any) -> None:
    """Add `audit` to an argparse sub-command list; its `run` default takes the parsed arguments."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "audit", help="say how far a running server's compressed answers are from the full KV"
    )
    parser.add_argument(
        "--url", default="http://127.0.0.1:30000", help="the server (default: %(default)s)"
    )
    parser.add_argument("--api-key", help="the server's --api-key")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table; returns the exit code, 2 where there is nothing to ask."""
    try:
        dumps = cache_view.fetch(args.url, api_key=args.api_key)
        found = [dump["shadow"] for dump in dumps if "shadow" in dump]
        if not found:
            raise ValueError(f"{args.url} runs without --aircache-shadow")
    except ValueError as error:
        print(f"aircache audit: {error}", file=sys.stderr)
        return 2
    report = summary(found)
    print(json.dumps(report, indent=2) if args.json else draw(report))
    return 0


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The shadows of all data-parallel ranks together; each share with its 95 % interval."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    dropped: collections.Counter[str] = collections.Counter()
    for shadow in found:
        dropped.update(shadow["dropped"])
        for row in shadow["tallies"]:
            groups.setdefault((row["policy"], row["retention"]), []).append(row)
    rows = []
    for (policy, retention), parts in sorted(groups.items()):
        tally = Tally.total(parts)
        share, low, high = tally.differing()
        mean, least, most = tally.mean_kl()
        rows.append(
            {
                "policy": policy,
                "retention": retention,
                "requests": tally.requests,
                "tokens": round(tally.n),
                "agreement": [1 - share, 1 - high, 1 - low],
                "same_answers": list(tally.same_answers()),
                # JSON has no infinity: with one request nothing bounds the mean.
                "mean_kl": [mean, least, most if math.isfinite(most) else None],
            }
        )
    worst = [row for shadow in found for row in shadow["worst"]]
    worst.sort(key=lambda row: (-row["differing"] / row["tokens"], -row["mean_kl"]))
    return {
        "share": found[0]["share"],
        "waiting": sum(shadow["waiting"] for shadow in found),
        "rows": rows,
        "worst": worst[:WORST],
        "dropped": dict(dropped),
        "guards": [shadow["guard"] for shadow in found if shadow["guard"] is not None],
    }


def draw(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    lines = [f"{report['share']:.1%} of the compressed answers are sampled."]
    if report["rows"]:
        lines += ["", *_table(report["rows"])]
    else:
        lines.append("None has been compared yet.")
    if report["worst"]:
        lines += ["", "worst requests:"]
        for row in report["worst"]:
            first = row["first_difference"]
            at = "" if first is None else f", the first at {first}"
            lines.append(
                f"  {row['rid']}  {row['policy']} {row['retention']}: {row['differing']:g} of "
                f"{row['tokens']:g} tokens differ{at}; mean KL at least {row['mean_kl']:.3g}"
            )
    dropped = ", ".join(f"{cause} {count}" for cause, count in sorted(report["dropped"].items()))
    lines += ["", f"waiting: {report['waiting']}; dropped: {dropped or 'none'}"]
    for guard in report["guards"]:
        lines.append(
            f"guard: bound {guard['bound']:g}, retention {guard['retention']:g} in force, "
            f"raised {guard['raised']}, lowered {guard['lowered']}"
        )
    return "\n".join(lines)


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    head = (
        *("policy", "retention", "requests", "tokens"),
        *("tokens that agree", "answers that agree", "mean KL, at least"),
    )
    cells = [
        (
            *(row["policy"], row["retention"], str(row["requests"]), str(row["tokens"])),
            *(_share(row["agreement"]), _share(row["same_answers"]), _mean(row["mean_kl"])),
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (head, *cells)
    ]


def _share(interval: Sequence[float]) -> str:
    share, low, high = (f"{100 * value:.1f}" for value in interval)
    return f"{share} % ({low} to {high})"


def _mean(interval: Sequence[float | None]) -> str:
    mean, low, high = ("?" if value is None else f"{value:.3g}" for value in interval)
    return f"{mean} ({low} to {high})"
