# SPDX-License-Identifier: Apache-2.0
"""Samples of all data sets in one record: the repository's own documents, and published sets."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.quality.layouts import LAYOUTS
from benchmarks.quality.samples import Sample


def load(name: str, path: Path | None, samples: int | None) -> list[Sample]:
    """A data set, at most `samples` groups of each kind (None: all), in its own order.

    Raises:
        ValueError: an unknown name, no path, or a file or folder that is not as published.
    """
    if name == "ours":
        return ours(samples)
    if name not in LAYOUTS:
        raise ValueError(f"the data set must be one of {', '.join(names())}, got {name!r}")
    if path is None:
        raise ValueError(f"{name} is not part of this repository: name its folder with --path")
    if not path.exists():
        raise ValueError(f"{path} does not exist: --path must name where {name} was unpacked")
    return first(LAYOUTS[name](path), samples)


def names() -> list[str]:
    return ["ours", *LAYOUTS]


def ours(samples: int | None) -> list[Sample]:
    """The documents that `benchmarks/documents` renders; their evaluation set is endless."""
    from benchmarks.documents.questions import KINDS, Question, evaluation_set

    def pictures(question: Question) -> list[str]:
        from aircache_sglang.testing import png_data_url

        return [png_data_url(image) for image in question.images()]

    return [
        Sample(
            *("ours", kind, question.id, question.prompt, (question.answer,), "exact_match"),
            pictures=lambda question=question: pictures(question),
            max_tokens=16,
        )
        for kind in KINDS
        for question in evaluation_set(kind, 100 if samples is None else samples)
    ]


def first(samples: Iterable[Sample], count: int | None) -> list[Sample]:
    """The samples of the first `count` groups of each kind."""
    groups: dict[str, dict[str, None]] = {}
    kept = []
    for sample in samples:
        seen = groups.setdefault(sample.kind, {})
        name = sample.group or sample.id
        if name in seen or count is None or len(seen) < count:
            seen[name] = None
            kept.append(sample)
    return kept
