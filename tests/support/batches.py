# SPDX-License-Identifier: Apache-2.0
"""Requests that reach a server while it is busy, so that it prefills them together."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aircache_sglang.testing.prompts import words
from aircache_sglang.testing.server import Server

PREFILL_BATCH = re.compile(r"Prefill batch.*?#new-seq: (\d+), #new-token: (\d+)")
LONG = 4000


def at_once(server: Server, questions: Sequence[Callable[[], Any]]) -> tuple[list[Any], list[int]]:
    """Their answers, and the sizes of the prefill batches since.

    A long text keeps the server busy meanwhile; a batch with the whole of it is not counted, since
    on a slow machine some of the questions may come before it. Timing decides who shares a
    batch: the caller looks at the sizes, and tries again.
    """
    read = server.log_path.stat().st_size
    with ThreadPoolExecutor(len(questions) + 1) as threads:
        threads.submit(server.generate, words(LONG, seed=read), max_new_tokens=1)
        futures = [threads.submit(ask) for ask in questions]
        answers = [future.result() for future in futures]
    with server.log_path.open() as log:
        log.seek(read)
        batches = [(int(size), int(new)) for size, new in PREFILL_BATCH.findall(log.read())]
    return answers, [size for size, new in batches if new < LONG]
