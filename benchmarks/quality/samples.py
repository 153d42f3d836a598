# SPDX-License-Identifier: Apache-2.0
"""One question of a data set, and how an answer to it is scored."""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Callable, Mapping
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


def data_url(path: Path) -> str:
    """A file as it is, as a `data:` URL."""
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
