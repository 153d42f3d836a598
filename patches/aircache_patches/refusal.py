# SPDX-License-Identifier: Apache-2.0
"""Refusing to start: one sentence on stderr, exit code 1."""

from __future__ import annotations

import sys
from types import TracebackType


class Refusal(ValueError):
    """A server that was asked to compress, and cannot, must not start."""


def refuse(sentence: str) -> Refusal:
    """Make a refusal whose traceback is not printed if nobody catches it."""
    if sys.excepthook is not _print_sentence:
        global _previous
        _previous = sys.excepthook
        sys.excepthook = _print_sentence
    return Refusal(sentence)


_previous = sys.excepthook


def _print_sentence(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if issubclass(kind, Refusal):
        print(f"aircache: {error}", file=sys.stderr, flush=True)
    else:
        _previous(kind, error, trace)
