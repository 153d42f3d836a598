# SPDX-License-Identifier: Apache-2.0
"""Rows of `aircache top` from what servers say, and how they are drawn."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from aircache_sglang.top import command
from aircache_sglang.top.reading import Reading, parse, together
from aircache_sglang.top.view import Row, line, rows, table, text

METRICS = """
# TYPE sglang:aircache_requests_compressed counter
sglang:aircache_requests_compressed_total{policy="aircache",dp_rank="0"} 4.0
sglang:aircache_requests_compressed_total{policy="snapkv",dp_rank="0"} 1.0
# TYPE sglang:aircache_slots_freed counter
sglang:aircache_slots_freed_total{policy="aircache"} 900.0
# TYPE sglang:aircache_seconds counter
sglang:aircache_seconds_total{policy="aircache"} 0.02
# TYPE sglang:aircache_columns_held gauge
sglang:aircache_columns_held{policy="aircache"} 52.0
# TYPE sglang:aircache_hit_tokens counter
sglang:aircache_hit_tokens_total{reuse="exact"} 300.0
sglang:aircache_hit_tokens_total{reuse="compressed"} 100.0
# TYPE sglang:prefill_effective_tokens counter
sglang:prefill_effective_tokens_total{mode="input"} 600.0
sglang:prefill_effective_tokens_total{mode="device_hit"} 400.0
# TYPE sglang:aircache_packs counter
sglang:aircache_packs_total{cause="decode",policy="aircache"} 3.0
sglang:aircache_packs_total{cause="admission",policy="aircache"} 0.0
# TYPE sglang:aircache_requests_at_rung gauge
sglang:aircache_requests_at_rung{rung="whole"} 2.0
sglang:aircache_requests_at_rung{rung="0"} 1.0
# TYPE sglang:num_retracted_requests counter
sglang:num_retracted_requests_total 7.0
"""
LOAD = {
    "num_running_reqs": 3,
    "num_waiting_reqs": 5,
    "num_used_tokens": 750,
    "max_total_num_tokens": 1000,
    "queues": {"grammar": 2, "retracted": 1},
    "disaggregation": {"mode": "null", "prefill_inflight_queue_reqs": 0},
}


def reading(seconds: float, *changes: tuple[str, str]) -> Reading:
    said = METRICS
    for old, new in changes:
        assert old in said
        said = said.replace(old, new)
    return Reading(seconds, (LOAD,), parse(said))


def by_key(found: list[Row]) -> dict[str, Row]:
    return {row.key: row for row in found}


def test_one_reading_has_totals_and_no_rates() -> None:
    found = by_key(rows(reading(0.0)))
    assert all(row.now is None for row in found.values())
    values = {key: row.value for key, row in found.items()}
    assert values["compressed"] == 5 and values["slots_freed"] == 900
    assert values["pool_use"] == 0.75 and values["columns_held"] == 52
    assert values["hit_rate_exact"] == 0.3 and values["hit_rate_compressed"] == 0.1
    assert values["packs"] == {"decode": 3} and values["at_rung"] == {"rung 0": 1, "whole": 2}
    assert values["held_up"] == {"for a grammar": 2} and values["retractions"] == 7
    assert values["pass_ms"] == pytest.approx(4)
    assert values["left_alone"] == {} and text(found["left_alone"]) == "-"


def test_two_readings_have_rates() -> None:
    later = reading(
        *(4.0, ("} 900.0", "} 1000.0"), ('reuse="exact"} 300', 'reuse="exact"} 320')),
        ('mode="input"} 600', 'mode="input"} 680'),
    )
    found = by_key(rows(later, reading(2.0)))
    assert found["slots_freed"].now == 50 and text(found["slots_freed"]) == "1,000  50.0/s"
    assert found["hit_rate_exact"].now == 0.2 and found["hit_rate_compressed"].now == 0
    assert text(found["hit_rate_exact"]) == "29%  now 20%"
    # Nothing was prefilled: there is nothing to divide by.
    assert by_key(rows(reading(4.0), reading(2.0)))["hit_rate_exact"].now is None


def test_a_restarted_server_has_no_negative_rate() -> None:
    found = by_key(rows(reading(4.0, ("} 900.0", "} 10.0")), reading(2.0)))
    assert found["slots_freed"].value == 10 and found["slots_freed"].now is None


def test_a_silent_server_has_nothing_to_divide_by() -> None:
    found = rows(Reading(0.0, (), {}))
    values = {row.key: row.value for row in found}
    assert values["pool_use"] is values["pass_ms"] is values["hit_rate_exact"] is None
    said = line(found)
    assert "running=0" in said and "pool_use" not in said and "packs" not in said


def test_several_servers_add_up() -> None:
    both = by_key(rows(together([reading(0.0), reading(1.0)])))
    assert both["running"].value == 6 and both["compressed"].value == 10
    assert both["pool_use"].value == 0.75 and both["packs"].value == {"decode": 6}
    assert both["hit_rate_exact"].value == 0.3


def test_a_line() -> None:
    said = dict(part.split("=") for part in line(rows(reading(0.0))).split(" "))
    assert said["running"] == "3" and said["pool_use"] == "0.75" and said["packs.decode"] == "3"
    assert said["held_up.for_a_grammar"] == "2" and said["at_rung.rung_0"] == "1"


def drawn(width: int, *cells: list[Row] | str) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table("top", [f"server {i}" for i in range(len(cells))], cells))
    return console.export_text()


def test_a_table_fits_a_small_terminal() -> None:
    said = drawn(80, rows(reading(4.0), reading(2.0)))
    assert len(said.rstrip("\n").splitlines()) <= 24
    assert "███████████████░░░░░ 75%" in said and "decode 3" in said and "0.0/s" in said


def test_a_server_that_is_away_says_so() -> None:
    said = drawn(120, rows(reading(0.0)), "no server answers at http://b: gone")
    assert "no server answers at http://b: gone" in said and "900" in said
    assert "gone" in drawn(80, "gone")


class Server:
    """Says what it is told to, in order; a string is the sentence that it fails with."""

    def __init__(self, *said: Reading | str) -> None:
        self._said = iter(said)

    def read(self) -> Reading:
        said = next(self._said)
        if isinstance(said, str):
            raise ValueError(said)
        return said


def test_a_server_goes_away_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.time, "sleep", lambda _: None)
    steady = [reading(float(second)) for second in range(4)]
    servers: Any = [Server(*steady), Server(steady[0], "gone", steady[2], steady[3])]
    found = command.looks(servers, 1.0, once=False)
    shown = [next(found) for _ in range(4)]

    def rate(cell: Any) -> Any:
        return cell if isinstance(cell, str) else by_key(cell)["slots_freed"].now

    assert [[rate(cell) for cell in cells] for cells in shown] == [
        [None, None, None],
        [0.0, "gone", None],
        [0.0, None, None],
        [0.0, 0.0, 0.0],
    ]
    assert by_key(shown[1][2])["compressed"].value == 5  # type: ignore[arg-type]
    unanswered: Any = [Server("gone")]
    with pytest.raises(ValueError, match=r"^gone$"):
        next(command.looks(unanswered, 1.0, once=False))
