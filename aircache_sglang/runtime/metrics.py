# SPDX-License-Identifier: Apache-2.0
"""Prometheus counters under SGLang's `--enable-metrics`."""

from __future__ import annotations

from typing import Any

from aircache_sglang.runtime.record import CompressionRecord


class Metrics:
    """Counts of one scheduler process; silent where SGLang's metrics are off.

    Only the first tensor-parallel rank counts, since all ranks see the same requests.
    """

    def __init__(self, labels: dict[str, str] | None) -> None:
        self._labels = labels
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
        if self._labels is None:
            return
        n_visual, m = record.intent.prompt.n_visual, record.intent.columns
        self._of(self._requests).inc()
        self._of(self._visual).inc(n_visual)
        self._of(self._freed).inc(n_visual - m)
        self._of(self._seconds).inc(record.seconds)
        self._of(self._columns).inc(m)

    def finished(self, record: CompressionRecord) -> None:
        """A compressed request has freed its columns."""
        if self._labels is not None:
            self._of(self._columns).dec(record.intent.columns)

    def left_alone(self, reason: str) -> None:
        """A request with visual tokens is served uncompressed."""
        if self._labels is not None:
            self._left_alone.labels(**self._labels, reason=reason).inc()

    def _of(self, metric: Any) -> Any:
        return metric.labels(**(self._labels or {}))
