# SPDX-License-Identifier: Apache-2.0
"""Prometheus families of `--aircache-shadow` and `--aircache-guard`; none without them."""

from __future__ import annotations

from collections.abc import Sequence

from aircache_sglang.runtime.agreement import Comparison

_KL = (1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
_FIRST = (0, 1, 2, 4, 8, 16, 32, 64, 128)


class ShadowMetrics:
    """What one scheduler process counts; silent where `Metrics` is (engine/metrics.py)."""

    def __init__(self, labels: dict[str, str] | None) -> None:
        self._labels = labels
        if labels is None:
            return
        from prometheus_client import Counter, Gauge, Histogram

        names = list(labels)
        by = [*names, "retention"]
        self._requests = Counter(
            "sglang:aircache_shadow_requests",
            "Compressed answers compared with the full KV, by whether all tokens agree",
            [*by, "agree"],
        )
        self._tokens = Counter(
            "sglang:aircache_shadow_tokens",
            "Their tokens, by whether the arg max agrees",
            [*by, "agree"],
        )
        self._kl = Histogram(
            "sglang:aircache_shadow_kl",
            "Lower bound of KL(full || compressed) in nats, a token",
            by,
            buckets=_KL,
        )
        self._first = Histogram(
            "sglang:aircache_shadow_first_difference",
            "Index in the answer of the first token whose arg max differs",
            by,
            buckets=_FIRST,
        )
        self._dropped = Counter(
            "sglang:aircache_shadow_dropped",
            "Sampled answers that were not compared, by cause",
            [*names, "cause"],
        )
        self._moves = Counter(
            "sglang:aircache_guard_moves",
            "Times that the guard has moved the default retention",
            [*names, "direction"],
        )
        self._retention = Gauge(
            "sglang:aircache_guard_retention",
            "The default retention in force",
            names,
            multiprocess_mode="mostrecent",
        )

    def compared(
        self, policy: str, retention: str, one: Comparison, bounds: Sequence[float]
    ) -> None:
        """An answer was compared; bounds: of each token."""
        if self._labels is None:
            return
        labels = {**self._labels, "policy": policy, "retention": retention}
        agree = "no" if one.differing else "yes"
        self._requests.labels(**labels, agree=agree).inc()
        self._tokens.labels(**labels, agree="no").inc(one.differing)
        self._tokens.labels(**labels, agree="yes").inc(one.tokens - one.differing)
        for bound in bounds:
            self._kl.labels(**labels).observe(bound)
        if one.first is not None:
            self._first.labels(**labels).observe(one.first)

    def dropped(self, cause: str) -> None:
        """A sampled answer is not compared."""
        if self._labels is not None:
            self._dropped.labels(**self._labels, cause=cause).inc()

    def guarded(self, retention: float, direction: str | None) -> None:
        """The default retention in force; direction: `raised` or `lowered`, None at the start."""
        if self._labels is None:
            return
        self._retention.labels(**self._labels).set(retention)
        if direction is not None:
            self._moves.labels(**self._labels, direction=direction).inc()
