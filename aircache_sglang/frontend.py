# SPDX-License-Identifier: Apache-2.0
"""SGLang's frontend language (`sgl.function`, `sgl.gen`, `fork`, `run_batch`) with overrides.

Imports SGLang's client alone, so that a program needs no accelerator and no server of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.interpreter import StreamExecutor
from sglang.lang.ir import SglSamplingParams

from aircache_sglang.config import REQUEST_KEY


@dataclasses.dataclass
class _SamplingParams(SglSamplingParams):
    """SGLang's, whose own list of what is sent has no `custom_params`."""

    overrides: dict[str, Any] | None = None

    def to_srt_kwargs(self) -> dict[str, Any]:
        custom = {} if self.overrides is None else {REQUEST_KEY: self.overrides}
        return super().to_srt_kwargs() | {"custom_params": custom}


class AirCacheEndpoint(RuntimeEndpoint):
    """A running server as the backend of frontend programs.

    `sgl.gen` cannot carry `custom_params`, so a program names its overrides in a variable or an
    argument called `aircache`; the variable goes first, since each branch of a fork has its own:

        @sgl.function
        def describe(s, picture, aircache=None):
            s += sgl.user(sgl.image(picture) + "What is this?")
            s += sgl.assistant(sgl.gen("answer", max_tokens=64))

        backend = AirCacheEndpoint("http://127.0.0.1:30000")
        state = describe.run(picture="a.png", aircache={"retention": 0.05}, backend=backend)
        state.get_meta_info("answer")["aircache"]

    A branch sets `branch["aircache"] = {"retention": 0.5}` before its first `sgl.gen`. The server
    checks the overrides: its HTTP 400 ends the program, and is `state.error()`. What `sgl.select`
    scores is never compressed, since nothing is decoded for it.
    """

    def generate(self, s: StreamExecutor, sampling_params: SglSamplingParams) -> Any:
        return super().generate(s, _with_overrides(s, sampling_params))

    def generate_stream(
        self, s: StreamExecutor, sampling_params: SglSamplingParams
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        return super().generate_stream(s, _with_overrides(s, sampling_params))


def _with_overrides(s: StreamExecutor, sampling_params: SglSamplingParams) -> _SamplingParams:
    overrides = s.variables.get(REQUEST_KEY, s.arguments.get(REQUEST_KEY))
    return _SamplingParams(**vars(sampling_params), overrides=overrides)
