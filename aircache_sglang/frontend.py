# SPDX-License-Identifier: Apache-2.0
"""SGLang's frontend language (`sgl.function`, `sgl.gen`, `fork`, `run_batch`) with overrides.

Imports SGLang's client alone, so that a program needs no accelerator and no server of its own.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import requests
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.global_config import global_config
from sglang.lang.interpreter import StreamExecutor
from sglang.lang.ir import SglSamplingParams

from aircache_sglang.config import REQUEST_KEY

# By its value the router's policy `manual` chooses the server.
KEY_HEADER = "X-SMG-Routing-Key"
# Fields of `sgl.gen` that stand beside the sampling parameters in a request.
_BESIDE = ("return_logprob", "logprob_start_len", "top_logprobs_num", "return_text_in_logprobs")


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

    The URL may be that of SGLang's router: prompts that begin with the same picture have the same
    routing key, by which its policy `manual` sends them to the same server. The router drops the
    overrides (docs/deployment.md).
    """

    def generate(self, s: StreamExecutor, sampling_params: SglSamplingParams) -> Any:
        answer = self._post(s, self._body(s, sampling_params)).json()
        return answer["text"], answer["meta_info"]

    def generate_stream(
        self, s: StreamExecutor, sampling_params: SglSamplingParams
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        said = 0
        for line in self._post(s, self._body(s, sampling_params), stream=True).iter_lines():
            if line.startswith(b"data:") and line != b"data: [DONE]":
                chunk = json.loads(line.removeprefix(b"data:"))
                yield chunk["text"][said:], chunk["meta_info"]
                said = len(chunk["text"])

    def commit_lazy_operations(self, s: StreamExecutor) -> None:
        self._generate_http_request(s, {"text": s.text_, "sampling_params": {"max_new_tokens": 0}})

    fill_image = commit_lazy_operations

    def _generate_http_request(self, s: StreamExecutor, data: dict[str, Any]) -> Any:
        return self._post(s, data).json()

    def _body(self, s: StreamExecutor, sampling_params: SglSamplingParams) -> dict[str, Any]:
        """What SGLang's own `generate` sends, and the overrides."""
        self._handle_dtype_to_regex(sampling_params)
        params = _with_overrides(s, sampling_params)
        beside = {name: getattr(params, name) for name in _BESIDE}
        config = global_config
        return {
            "text": s.text_,
            "sampling_params": {
                "skip_special_tokens": config.skip_special_tokens_in_output,
                "spaces_between_special_tokens": config.spaces_between_special_tokens_in_out,
                **params.to_srt_kwargs(),
            },
            **{name: value for name, value in beside.items() if value is not None},
        }

    def _post(
        self, s: StreamExecutor, body: dict[str, Any], *, stream: bool = False
    ) -> requests.Response:
        """POST /generate with picture and key. Raises RuntimeError unless the status is 200."""
        self._add_images(s, body)
        headers = {}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        if s.images_:
            headers[KEY_HEADER] = routing_key(base64.b64decode(s.images_[0][1]))
        response = requests.post(
            f"{self.base_url}/generate",
            json={**body, "stream": stream},
            headers=headers,
            stream=stream,
            verify=self.verify or True,
        )
        self._assert_success(response)
        return response


def routing_key(picture: bytes) -> str:
    """What requests about one picture have in common; picture: the bytes of its file."""
    return hashlib.sha256(picture).hexdigest()


def _with_overrides(s: StreamExecutor, sampling_params: SglSamplingParams) -> _SamplingParams:
    overrides = s.variables.get(REQUEST_KEY, s.arguments.get(REQUEST_KEY))
    return _SamplingParams(**vars(sampling_params), overrides=overrides)
