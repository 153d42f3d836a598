# SPDX-License-Identifier: Apache-2.0
"""The scheduler's own count of its load, while something else runs."""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import requests

from aircache_sglang.testing.server import Client


class LoadWatch:
    """Reads `/v1/loads` every `interval` seconds, in a thread of its own."""

    def __init__(self, client: Client, *, interval: float = 0.1) -> None:
        self._interval = interval
        self._samples: list[tuple[float, dict[str, Any]]] = []
        self._url = client.url + "/v1/loads"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> LoadWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _poll(self) -> None:
        with requests.Session() as session:
            session.trust_env = False
            while not self._stop.wait(self._interval):
                try:
                    load = session.get(self._url, timeout=60).json()["loads"][0]
                except (requests.RequestException, ValueError, LookupError, TypeError):
                    return  # the requests themselves will say what is wrong
                self._samples.append((time.perf_counter(), load))

    def loads(self, start: float = -math.inf, end: float = math.inf) -> list[dict[str, Any]]:
        """What was read, or what of it between two times of `time.perf_counter`."""
        return [load for when, load in self._samples if start <= when < end]

    def most(self, name: str) -> int | None:
        """The largest value of a field; None if nothing was read."""
        return max((load[name] for load in self.loads()), default=None)
