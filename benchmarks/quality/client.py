# SPDX-License-Identifier: Apache-2.0
"""Questions to any server with an OpenAI chat endpoint, many at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import requests

from benchmarks.quality.samples import Sample, data_url
from benchmarks.quality.settings import Setting

TOP_LOGPROBS = 20  # the most that the protocol allows


class RequestError(RuntimeError):
    """The server refused or failed a request; the message is its own."""


@dataclass(frozen=True)
class Answer:
    """What came back.

    tokens: of each generated token its text and the top logprobs by text; empty without logprobs.
    report: the server's meta_info.aircache; None where nothing was compressed.
    seconds: from the request to the whole answer.
    """

    text: str
    tokens: tuple[tuple[str, Mapping[str, float]], ...]
    report: Mapping[str, Any] | None
    seconds: float


class Client:
    """Asks `url` (without /v1); one connection a thread. Greedy decoding.

    Args:
        model: name in the requests; by default the first of /v1/models.
        logprobs: whether answers carry the top logprobs of their tokens.

    Raises:
        RequestError: nothing answers at `url`.
    """

    def __init__(
        self, url: str, *, model: str | None = None, logprobs: bool = True, timeout: float = 600.0
    ) -> None:
        self.url = url.rstrip("/")
        self.logprobs = logprobs
        self.timeout = timeout
        self._local = threading.local()
        self.model = model or self._send("GET", "/v1/models")["data"][0]["id"]

    @property
    def model_name(self) -> str:
        """The model without the folders above it."""
        return PurePath(self.model).name

    def ask(self, sample: Sample, setting: Setting) -> Answer:
        """The pictures or the video first, then the text, in one user turn."""
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": url}} for url in self._pictures(sample)
        ]
        if sample.video is not None:
            content.append({"type": "video_url", "video_url": {"url": data_url(sample.video)}})
        content.append({"type": "text", "text": sample.prompt})
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": sample.max_tokens,
            "temperature": 0.0,
        }
        if self.logprobs:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        overrides = setting.overrides()
        if overrides is not None:
            body |= {"custom_params": {"aircache": overrides}, "return_meta_info": True}
        started = time.monotonic()
        choice = self._send("POST", "/v1/chat/completions", body)["choices"][0]
        seconds = time.monotonic() - started
        logprobs = choice.get("logprobs") or {}
        return Answer(
            text=choice["message"]["content"] or "",
            tokens=tuple(
                (step["token"], {top["token"]: top["logprob"] for top in step["top_logprobs"]})
                for step in logprobs.get("content") or ()
            ),
            report=(choice.get("meta_info") or {}).get("aircache"),
            seconds=seconds,
        )

    def _pictures(self, sample: Sample) -> list[str]:
        """Rendered once for all settings, which a thread asks one after another."""
        if getattr(self._local, "sample", None) is not sample:
            self._local.sample, self._local.pictures = sample, sample.pictures()
        return list(self._local.pictures)

    def _send(self, method: str, path: str, body: Any = None) -> Any:
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            self._local.session.trust_env = False  # a proxy must not see a server of this machine
        try:
            response = self._local.session.request(
                method, self.url + path, json=body, timeout=self.timeout
            )
        except requests.RequestException as error:
            raise RequestError(f"{self.url} does not answer: {error}") from error
        if response.status_code != 200:
            raise RequestError(f"HTTP {response.status_code}: {response.text[:500]}")
        return response.json()
