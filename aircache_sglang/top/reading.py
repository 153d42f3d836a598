# SPDX-License-Identifier: Apache-2.0
"""What a running server says of itself at one moment: SGLang's /v1/loads and /metrics."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

from aircache_sglang.connection import Connection

OURS = "sglang:aircache_"
TIMEOUT = 10.0
Samples = dict[str, list[tuple[dict[str, str], float]]]


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """Counts of one server, or of several together.

    seconds: of a clock that only goes forward. loads: of each data-parallel rank, as /v1/loads has
    them. samples: (labels, value) of each metric, by its name.
    """

    seconds: float
    loads: tuple[dict[str, Any], ...]
    samples: Samples

    def load(self, *path: str) -> float:
        """A field of /v1/loads over all ranks; 0 where a server does not have it."""
        total = 0.0
        for load in self.loads:
            found: Any = load
            for name in path:
                found = (found or {}).get(name)
            total += found or 0
        return total

    def total(self, name: str, **labels: str) -> float:
        """A metric over all its labels, or over those that are named."""
        return sum(
            value
            for known, value in self.samples.get(name, ())
            if all(known.get(label) == wanted for label, wanted in labels.items())
        )

    def by(self, name: str, label: str) -> dict[str, float]:
        """What of a metric is not 0, by one of its labels."""
        found: Counter[str] = Counter()
        for known, value in self.samples.get(name, ()):
            found[known.get(label, "")] += value  # type: ignore[assignment]
        return {key: found[key] for key in sorted(found) if found[key]}


def together(readings: Iterable[Reading]) -> Reading:
    """Several servers as one."""
    readings = list(readings)
    samples: Samples = {}
    for name, found in itertools.chain.from_iterable(each.samples.items() for each in readings):
        samples.setdefault(name, []).extend(found)
    loads = tuple(load for each in readings for load in each.loads)
    return Reading(max(each.seconds for each in readings), loads, samples)


class Watched(Connection):
    """A running server with a policy and metrics."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        super().__init__(url, api_key, timeout=TIMEOUT)

    def check(self) -> None:
        """Raises ValueError for a server that has nothing to be watched."""
        info = self.call("/server_info")
        if not isinstance(info, dict):
            raise ValueError(f"no server of SGLang answers at {self.url}")
        if (info.get("kv_policy") or "none") == "none":
            raise ValueError(f"{self.url} runs without --kv-policy, so it drops nothing")
        if not info.get("enable_metrics"):
            raise ValueError(f"{self.url} runs without --enable-metrics, so it counts nothing")

    def read(self) -> Reading:
        """Raises ValueError."""
        loads = self.call("/v1/loads")
        samples = parse(self.text("/metrics"))
        return Reading(time.monotonic(), tuple(loads.get("loads") or ()), samples)


def parse(text: str) -> Samples:
    """Prometheus' text format; raises ValueError."""
    from prometheus_client.parser import text_string_to_metric_families

    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append((dict(sample.labels), sample.value))
    return samples
