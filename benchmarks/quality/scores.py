# SPDX-License-Identifier: Apache-2.0
"""Rows of a data set by setting: totals, the samples that settings share, differences."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.quality import metrics
from benchmarks.quality.settings import Setting
from benchmarks.records import Row, identity

PLAIN = {"policy", "retention", "revision"}  # the keys of a setting without knobs


class Scores:
    """The rows of one data set by setting and sample."""

    def __init__(self, rows: Iterable[Row], kind: str | None = None) -> None:
        self._rows: dict[str, dict[str, Row]] = {}
        self._settings: dict[str, Row] = {}
        for row in rows:
            key = row["key"]
            if kind is None or key["kind"] == kind:
                setting = identity(key["setting"])
                self._settings[setting] = key["setting"]
                self._rows.setdefault(setting, {})[key["sample"]] = row

    def has(self, setting: Setting) -> bool:
        return identity(setting.key()) in self._rows

    def of(self, setting: Setting) -> dict[str, Row]:
        return self._rows.get(identity(setting.key()), {})

    def retentions(self, policies: Sequence[str]) -> list[float]:
        """Those of plain settings of the policies, falling."""
        found = {
            setting["retention"]
            for setting in self._settings.values()
            if setting["policy"] in policies and setting.keys() <= PLAIN
        }
        return sorted(found, reverse=True)

    def common(self, settings: Iterable[Setting]) -> list[str]:
        """The samples that every setting with any row has answered, so that they compare."""
        answered = [self.of(setting).keys() for setting in settings if self.has(setting)]
        first = answered[0] if answered else ()
        return [sample for sample in first if all(sample in others for others in answered)]

    def score(self, setting: Setting, samples: Sequence[str]) -> float | None:
        """In per cent (MME: its own sum); None without rows."""
        rows = self.of(setting)
        return total([rows[sample] for sample in samples]) if rows and samples else None

    def mean(self, setting: Setting, samples: Sequence[str], name: str) -> float | None:
        """Of a number that rows may carry, over those of the samples that do."""
        rows = self.of(setting)
        values = [
            rows[sample][name]
            for sample in samples
            if sample in rows and rows[sample].get(name) is not None
        ]
        return statistics.fmean(values) if values else None


def total(rows: Sequence[Row]) -> float:
    """The data set's figure: of groups the mean of the least, MME's acc + acc+ over tasks."""
    if rows[0]["metric"] == "yes_no":
        tasks: dict[str, dict[str, list[float]]] = {}
        for row in rows:
            tasks.setdefault(row["key"]["kind"], {}).setdefault(row["group"], []).append(
                row["score"]
            )
        return metrics.mme_score(tasks)
    return 100 * statistics.fmean(by_group(rows).values())


def by_group(rows: Iterable[Row]) -> dict[str, float]:
    groups: dict[str, float] = {}
    for row in rows:
        groups[row["group"]] = min(row["score"], groups.get(row["group"], 1.0))
    return groups


def interval(scores: Scores, setting: Setting, samples: Sequence[str]) -> tuple[float, float]:
    """The 95 % interval of a score in per cent: a bootstrap over groups, seed 0."""
    rows = scores.of(setting)
    return _bootstrap([100 * least for least in by_group(rows[s] for s in samples).values()])


def difference(scores: Scores, one: Setting, other: Setting) -> tuple[float, float, float] | None:
    """one - other in points and its 95 % interval: a paired bootstrap over groups, seed 0."""
    samples = scores.common([one, other])
    if not (samples and scores.has(one) and scores.has(other)):
        return None
    sides = [by_group(scores.of(setting)[s] for s in samples) for setting in (one, other)]
    gaps = [100 * (sides[0][group] - sides[1][group]) for group in sides[0]]
    return mean_gap(gaps)


def mean_gap(gaps: Sequence[float]) -> tuple[float, float, float]:
    """The mean of differences in pairs and its 95 % interval."""
    return (statistics.fmean(gaps), *_bootstrap(gaps))


def gap_text(gap: tuple[float, float, float]) -> str:
    """`mean_gap` as a cell of a table."""
    mean, low, high = gap
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def _bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean: 2000 draws, seed 0."""
    drawn = np.array(values)
    draws = np.random.default_rng(0).integers(0, len(drawn), (2000, len(drawn)))
    low, high = np.percentile(drawn[draws].mean(axis=1), (2.5, 97.5))
    return float(low), float(high)
