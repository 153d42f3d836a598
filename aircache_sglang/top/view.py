# SPDX-License-Identifier: Apache-2.0
"""One or two readings as rows; rows as a table of a terminal, or as a line of a log."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from aircache_sglang.top.reading import OURS, Reading

if TYPE_CHECKING:
    from rich.console import RenderableType

BAR = 20  # characters


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One line of a server.

    key: its name in plain lines. value: a number, numbers by a label, or None where there is
    nothing to divide by. now: the same since the last reading, a second for what is counted. unit:
    "" for a count, "share", "ms".
    """

    section: str
    label: str
    key: str
    value: float | dict[str, float] | None
    now: float | None = None
    unit: str = ""


def rows(now: Reading, before: Reading | None = None) -> list[Row]:
    """What is shown of a server, always the same rows in the same order."""

    def since(name: str, **labels: str) -> float | None:
        """What was added to a counter since `before`; None after a restart."""
        if before is None:
            return None
        added = now.total(name, **labels) - before.total(name, **labels)
        return added if added >= 0 else None

    def a_second(name: str) -> float | None:
        added = since(name)
        if added is None or before is None or now.seconds <= before.seconds:
            return None
        return added / (now.seconds - before.seconds)

    def counter(section: str, label: str, key: str, name: str) -> Row:
        return Row(section, label, key, now.total(name), a_second(name))

    def hit_rate(label: str, reuse: str) -> Row:
        hits, computed = f"{OURS}hit_tokens_total", "sglang:prefill_effective_tokens_total"
        total = now.total(hits) + now.total(computed, mode="input")
        share = now.total(hits, reuse=reuse) / total if total else None
        recent = None
        new = [since(hits, reuse=reuse), since(hits), since(computed, mode="input")]
        found, all_hits, prefilled = new
        if found is not None and all_hits is not None and prefilled:
            recent = found / (all_hits + prefilled)
        return Row("prefix cache", label, f"hit_rate_{reuse}", share, recent, "share")

    passes = now.total(f"{OURS}requests_compressed_total")
    pass_ms = 1000 * now.total(f"{OURS}seconds_total") / passes if passes else None
    size = now.load("max_total_num_tokens")
    held_up = {
        "for a grammar": now.load("queues", "grammar"),
        "to be sent": now.load("disaggregation", "prefill_inflight_queue_reqs"),
        "to be received": now.load("disaggregation", "decode_prealloc_queue_reqs")
        + now.load("disaggregation", "decode_transfer_queue_reqs"),
        "retracted": now.load("disaggregation", "decode_retracted_queue_reqs"),
    }
    at_rung = {
        rung if rung == "whole" else f"rung {rung}": count
        for rung, count in now.by(f"{OURS}requests_at_rung", "rung").items()
    }
    return [
        Row("requests", "running", "running", now.load("num_running_reqs")),
        Row("requests", "waiting", "waiting", now.load("num_waiting_reqs")),
        Row("requests", "held up", "held_up", {k: n for k, n in held_up.items() if n}),
        Row("requests", "under pressure", "at_rung", at_rung),
        counter("requests", "retractions", "retractions", "sglang:num_retracted_requests_total"),
        Row(
            *("memory", "pool in use", "pool_use"),
            now.load("num_used_tokens") / size if size else None,
            unit="share",
        ),
        Row("memory", "slots of the pool", "pool_slots", size),
        Row("memory", "columns held", "columns_held", now.total(f"{OURS}columns_held")),
        counter("memory", "slots freed", "slots_freed", f"{OURS}slots_freed_total"),
        counter("pictures", "compressed", "compressed", f"{OURS}requests_compressed_total"),
        Row(
            *("pictures", "left alone", "left_alone"),
            now.by(f"{OURS}requests_left_alone_total", "reason"),
        ),
        Row("pictures", "host time of a pass", "pass_ms", pass_ms, unit="ms"),
        hit_rate("hits, exact", "exact"),
        hit_rate("hits, compressed", "compressed"),
        Row(
            *("prefix cache", "slots evicted", "evicted"),
            now.by(f"{OURS}evicted_slots_total", "kind"),
        ),
        counter("prefix cache", "slots put back", "refilled", f"{OURS}refilled_slots_total"),
        Row("pressure", "packed", "packs", now.by(f"{OURS}packs_total", "cause")),
        Row(
            *("pressure", "slots won", "packed_slots"),
            now.by(f"{OURS}packed_slots_total", "cause"),
        ),
        counter(
            *("pressure", "retractions avoided", "retractions_avoided"),
            f"{OURS}retractions_avoided_total",
        ),
    ]


def figure(value: float, unit: str) -> str:
    if unit == "share":
        return f"{value:.0%}"
    if unit == "ms":
        return f"{value:.1f} ms"
    return f"{value:,.0f}"


def text(row: Row) -> str:
    """A row's cell for people."""
    if row.value is None:
        return "-"
    if isinstance(row.value, dict):
        said = [f"{key} {figure(value, row.unit)}" for key, value in row.value.items()]
        return ", ".join(said) or "-"
    said = [figure(row.value, row.unit)]
    if row.now is not None:
        said.append(f"now {row.now:.0%}" if row.unit == "share" else f"{row.now:,.1f}/s")
    return "  ".join(said)


def line(found: Sequence[Row]) -> str:
    """`key=value` of every row that has one, in one line; values by label as `key.label=value`."""
    parts = []
    for row in found:
        values: dict[str, Any] = row.value if isinstance(row.value, dict) else {"": row.value}
        for label, value in values.items():
            if value is not None:
                key = f"{row.key}.{label.replace(' ', '_')}" if label else row.key
                parts.append(f"{key}={value:.6g}" if row.unit else f"{key}={value:.0f}")
    return " ".join(parts)


def table(
    title: str, columns: Sequence[str], cells: Sequence[Sequence[Row] | str]
) -> RenderableType:
    """A column a server; what is a string says why a server has no rows."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", expand=True)
    drawn.add_column("", no_wrap=True, style="bold")
    drawn.add_column("", no_wrap=True)
    for column in columns:
        drawn.add_column(column, overflow="fold", ratio=1)
    known = next((cell for cell in cells if not isinstance(cell, str)), [])
    section = ""
    for index, row in enumerate(known):
        shown = [
            Text("" if isinstance(cell, str) else _bar(cell[index]) + text(cell[index]))
            for cell in cells
        ]
        drawn.add_row("" if row.section == section else row.section, row.label, *shown)
        section = row.section
    silent = [Text("" if not isinstance(cell, str) else cell, style="bold red") for cell in cells]
    if any(silent):
        drawn.add_row("", "", *silent)
    return drawn


def _bar(row: Row) -> str:
    if row.key != "pool_use" or not isinstance(row.value, float):
        return ""
    full = round(min(1.0, row.value) * BAR)
    return "█" * full + "░" * (BAR - full) + " "
