# SPDX-License-Identifier: Apache-2.0
"""From the scheduler to the answer: the scheduler's side."""

from __future__ import annotations

from typing import Any, ClassVar

from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

from aircache_sglang.config import REQUEST_KEY


class AirCacheOutputStreamer(SchedulerOutputStreamer):
    """Sends a compressed request's report along, by the extension point SGLang made for it."""

    __slots__ = ()

    has_additional_customized_info: ClassVar[bool] = True

    def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list[Any]]:
        """One list a request: its report if it has not been sent yet, else nothing."""
        values: list[list[Any]] = []
        for req in reqs:
            info = getattr(req, "aircache_info", None)
            fresh = info is not None and info is not getattr(req, "aircache_sent", None)
            if fresh:
                req.aircache_sent = info
            values.append([info] if fresh else [])
        return {REQUEST_KEY: values}
