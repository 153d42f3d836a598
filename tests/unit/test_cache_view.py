# SPDX-License-Identifier: Apache-2.0
"""The console's drawing of the tree's dump."""

from __future__ import annotations

from typing import Any

from aircache_sglang.cache_view import draw
from aircache_sglang.engine.metrics import LABELS, Metrics
from aircache_sglang.engine.tree import Kind


def node(depth: int, kind: str, tokens: int, **fields: Any) -> dict[str, Any]:
    plain = {"name": "", "slots": tokens, "columns": 0, "tombstone": False, "locks": 0}
    plain |= {"host_slots": 0, "state": False, "idle_seconds": 2.4}
    return {"depth": depth, "kind": kind, "tokens": tokens, **plain, **fields}


def test_a_tombstone_a_lock_and_left_out_nodes() -> None:
    pool = {"size": 100, "free": 40, "evictable": 30, "protected": 20, "private": 10}
    dump = {
        "pool": {**pool, "unlocked_text": 7, "text_bound": 50},
        "totals": {"refilled_slots": 5, "evicted_slots_visual": 12},
        "nodes": [
            node(0, "prompt", 4, locks=2),
            node(1, "visual", 12, name="f4240", slots=0, tombstone=True),
            node(2, "prompt", 3, host_slots=3),
            node(1, "visual", 8, slots=0, tombstone=True, host_slots=8),
            node(1, "packed", 15, name="aircache/0.1", slots=4, columns=1, locks=1),
        ],
        "nodes_left_out": 6,
    }
    assert draw(dump).splitlines() == [
        "pool 100 slots: 40 free, 30 evictable, 20 held, 10 with requests; "
        "unlocked text 7 of at most 50",
        "evicted_slots_visual 12, refilled_slots 5",
        "- prompt: 4 tokens, 4 slots, held 2x, used 2 s ago",
        "  - visual f4240: 12 tokens, tombstone, used 2 s ago",
        "    - prompt: 3 tokens, 3 slots (and in host memory), used 2 s ago",
        "  - visual: 8 tokens, in host memory, used 2 s ago",
        "  - packed aircache/0.1: 15 tokens, 4 slots (1 columns), held 1x, used 2 s ago",
        "... 6 nodes more",
    ]
    whole = {**dump, "totals": {}, "nodes": [], "nodes_left_out": 0}
    assert draw(whole).count("\n") == 0


def test_recurrent_states() -> None:
    pool = {"size": 9, "free": 5, "evictable": 4, "protected": 0, "private": 0}
    pool |= {"unlocked_text": 4, "text_bound": 4, "states_size": 6, "states_free": 4, "states": 1}
    nodes = [node(0, "prompt", 4, state=True)]
    dump = {"pool": pool, "totals": {}, "nodes": nodes, "nodes_left_out": 0}
    assert draw(dump).splitlines()[1:] == [
        "6 recurrent states: 4 free, 1 in the tree",
        "- prompt: 4 tokens, 4 slots, a state, used 2 s ago",
    ]


def test_totals_begin_at_zero_for_all_that_is_counted() -> None:
    totals = Metrics(None).totals
    assert set(totals.values()) == {0}
    assert {f"evicted_slots_{label}" for label in LABELS} < set(totals)
    assert set(LABELS) == {kind.value for kind in Kind} | {"lossy"}
