# SPDX-License-Identifier: Apache-2.0
"""Samples of all data sets in one record: the repository's own documents, and published sets."""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.quality import metrics

METRICS: dict[str, Callable[[str, tuple[str, ...]], float]] = {
    "exact_match": metrics.exact_match,
    "anls": metrics.anls,
    "relaxed_accuracy": metrics.relaxed_accuracy,
    "vqa_accuracy": metrics.vqa_accuracy,
    "yes_no": metrics.yes_no,
}


@dataclass(frozen=True)
class Sample:
    """One question about pictures or a video.

    dataset, kind, id: its key; `id` is unique within the data set, `kind` is what tables list.
    group: samples that count as one (rotations of a choice, both questions on an MME picture).
    pictures: gives the pictures as data URLs; called when the question is asked.
    video: a file; sent as it is, the server takes its frames.
    metric: a key of METRICS, or "choice" with `options` by letter.
    """

    dataset: str
    kind: str
    id: str
    prompt: str
    answers: tuple[str, ...]
    metric: str
    pictures: Callable[[], list[str]] = field(default=lambda: [], repr=False, compare=False)
    video: Path | None = None
    group: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    max_tokens: int = 32

    def score(self, prediction: str) -> float:
        """In [0, 1]."""
        if self.metric == "choice":
            return float(metrics.choice(prediction, self.options) == self.answers[0])
        return METRICS[self.metric](prediction, self.answers)


def load(name: str, path: Path | None, samples: int | None) -> list[Sample]:
    """A data set, at most `samples` groups of each kind (None: all), in its own order.

    Raises:
        ValueError: an unknown name, no path, or a file or folder that is not as published.
    """
    from benchmarks.quality.layouts import LAYOUTS

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
    from benchmarks.quality.layouts import LAYOUTS

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


def data_url(path: Path) -> str:
    """A file as it is, as a `data:` URL."""
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
