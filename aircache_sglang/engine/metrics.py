# SPDX-License-Identifier: Apache-2.0
"""Prometheus counters under SGLang's `--enable-metrics`."""

from __future__ import annotations

import collections
from typing import Any

from aircache_sglang.runtime.record import CompressionRecord

# What an eviction takes: `Node.label` of engine/tree.py.
LABELS = ("visual", "packed", "lossy", "generated", "prompt")


class Metrics:
    """Counts of one scheduler process; silent where SGLang's metrics are off.

    Only the first tensor-parallel rank counts, since all ranks see the same requests.

    labels: of every family; None where nothing is counted.
    """

    def __init__(self, labels: dict[str, str] | None) -> None:
        self.labels = labels
        # What the tree's dump reports, with SGLang's metrics or without (cache_view.py).
        names = ["hit_tokens_exact", "hit_tokens_compressed", "refilled_slots"]
        names += [f"evicted_slots_{label}" for label in LABELS]
        self.totals: collections.Counter[str] = collections.Counter(dict.fromkeys(names, 0))
        if labels is None:
            return
        # Imported after SGLang has set PROMETHEUS_MULTIPROC_DIR, as its own collectors are.
        from prometheus_client import Counter, Gauge

        names = list(labels)
        self._requests = Counter(
            "sglang:aircache_requests_compressed", "Requests whose visual KV was compressed", names
        )
        self._left_alone = Counter(
            "sglang:aircache_requests_left_alone",
            "Requests with visual tokens that were served uncompressed, by reason",
            [*names, "reason"],
        )
        self._visual = Counter(
            "sglang:aircache_visual_tokens", "Visual tokens of compressed requests", names
        )
        self._freed = Counter(
            "sglang:aircache_slots_freed", "KV slots given back, net of the columns", names
        )
        self._seconds = Counter(
            "sglang:aircache_seconds", "Host seconds spent in compression passes", names
        )
        self._hits = Counter(
            "sglang:aircache_hit_tokens",
            "Prompt tokens found in the radix tree, in exact KV or through a compressed replica",
            [*names, "reuse"],
        )
        self._refilled = Counter(
            "sglang:aircache_refilled_slots", "Slots of visual KV put back into the tree", names
        )
        self._evicted = Counter(
            "sglang:aircache_evicted_slots",
            "Slots evicted from the radix tree, by what they held",
            [*names, "kind"],
        )
        self._packs = Counter(
            "sglang:aircache_packs",
            "Times that a request was packed under pressure, by what needed the slots",
            [*names, "cause"],
        )
        self._packed_slots = Counter(
            "sglang:aircache_packed_slots",
            "KV slots won by packing under pressure, by what needed them",
            [*names, "cause"],
        )
        self._at_rung = Gauge(
            "sglang:aircache_requests_at_rung",
            "Running requests that pressure may pack, by the rung they are at",
            [*names, "rung"],
            multiprocess_mode="livesum",
        )
        self._avoided = Counter(
            "sglang:aircache_retractions_avoided",
            "Decode steps that packing gave the slots for which SGLang retracts requests",
            names,
        )
        self._columns = Gauge(
            "sglang:aircache_columns_held",
            "Columns that running requests hold",
            names,
            multiprocess_mode="livesum",
        )

    @classmethod
    def create(cls, policy: str) -> Metrics:
        """Read SGLang's published settings of this process."""
        from sglang.srt.runtime_context import get_observability, get_parallel, get_serving

        parallel = get_parallel()
        if not get_observability().enable_metrics or parallel.tp_rank != 0:
            return cls(None)
        labels = {
            "model_name": str(get_serving().served_model_name),
            "policy": policy,
            "dp_rank": str(parallel.dp_rank or 0),
        }
        labels.update(get_observability().extra_metric_labels or {})
        return cls(labels)

    def compressed(self, record: CompressionRecord) -> None:
        """A request's pass is done and its visual slots are given back."""
        if self.labels is None:
            return
        n_visual, m = record.intent.prompt.n_visual, record.intent.columns
        policy = record.intent.config.policy
        self._of(self._requests, policy).inc()
        self._of(self._visual, policy).inc(n_visual)
        self._of(self._freed, policy).inc(record.intent.n_freed)
        self._of(self._seconds, policy).inc(record.seconds)
        self._of(self._columns, policy).inc(m)

    def back(self, record: CompressionRecord) -> None:
        """A request that was retracted has its columns again, without another pass."""
        if self.labels is not None:
            self._of(self._columns, record.intent.config.policy).inc(record.intent.columns)

    def packed(self, before: CompressionRecord | None, record: CompressionRecord) -> None:
        """A request goes to the rung of `record`, from that of `before` or from a whole picture."""
        self.at_rung(before, -1)
        self.at_rung(record, 1)
        if before is None:
            self.compressed(record)
        elif self.labels is not None:
            policy = record.intent.config.policy
            fewer = before.intent.columns - record.intent.columns
            self._of(self._freed, policy).inc(record.intent.n_freed - before.intent.n_freed)
            self._of(self._columns, policy).dec(fewer)

    def packed_for(self, cause: str, requests: int, slots: int) -> None:
        """Requests were packed under pressure, which won `slots`."""
        if self.labels is not None:
            self._packs.labels(**self.labels, cause=cause).inc(requests)
            self._packed_slots.labels(**self.labels, cause=cause).inc(slots)

    def at_rung(self, record: CompressionRecord | None, step: int) -> None:
        """One request more, or less, at the rung of a record; None for a picture that is whole."""
        if self.labels is not None:
            # Not the share, of which clients could make any number of labels.
            rung = "whole" if record is None else str(record.rung)
            self._at_rung.labels(**self.labels, rung=rung).inc(step)

    def retraction_avoided(self) -> None:
        """A decode step has got its slots by packing."""
        if self.labels is not None:
            self._of(self._avoided).inc()

    def finished(self, record: CompressionRecord) -> None:
        """A compressed request has freed its columns."""
        if self.labels is not None:
            self._of(self._columns, record.intent.config.policy).dec(record.intent.columns)

    def left_alone(self, reason: str) -> None:
        """A request with visual tokens is served uncompressed."""
        if self.labels is not None:
            self._left_alone.labels(**self.labels, reason=reason).inc()

    def hit(self, tokens: int, *, compressed: bool) -> None:
        """A request was admitted with this many tokens of its prompt in the tree."""
        reuse = "compressed" if compressed else "exact"
        self.totals[f"hit_tokens_{reuse}"] += tokens
        if self.labels is not None:
            self._hits.labels(**self.labels, reuse=reuse).inc(tokens)

    def refilled(self, slots: int) -> None:
        """A tombstone of the tree has got slots again."""
        self.totals["refilled_slots"] += slots
        if self.labels is not None:
            self._of(self._refilled).inc(slots)

    def evicted(self, kind: str, slots: int) -> None:
        """A node of the tree has lost its slots."""
        self.totals[f"evicted_slots_{kind}"] += slots
        if self.labels is not None:
            self._evicted.labels(**self.labels, kind=kind).inc(slots)

    def _of(self, metric: Any, policy: str | None = None) -> Any:
        """The metric under this process's labels; policy: a request's own, if it has one."""
        labels = dict(self.labels or {})
        if policy is not None:
            labels["policy"] = policy
        return metric.labels(**labels)
