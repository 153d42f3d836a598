# SPDX-License-Identifier: Apache-2.0
"""From the scheduler to the answer: the scheduler's side."""

from __future__ import annotations

from typing import Any, ClassVar

from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

from aircache_sglang.config import REASON_KEY, REQUEST_KEY
from aircache_sglang.engine.request import state_of


class AirCacheOutputStreamer(SchedulerOutputStreamer):
    """Sends along how a request was compressed, or why not, by the extension point SGLang made."""

    __slots__ = ()

    has_additional_customized_info: ClassVar[bool] = True

    def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list[Any]]:
        """For each key one list a request: its value if it has not been sent yet, else nothing."""
        return {
            REQUEST_KEY: [state_of(req).unsent("report") for req in reqs],
            REASON_KEY: [state_of(req).unsent("reason") for req in reqs],
        }
