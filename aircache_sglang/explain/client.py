# SPDX-License-Identifier: Apache-2.0
"""Asks a running server the same question with and without compression, over its chat endpoint."""

from __future__ import annotations

import base64
import dataclasses
import mimetypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aircache_sglang.connection import Connection

TOP = 5  # of the tokens that each step could have given instead


@dataclasses.dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer.

    logprob: of the token, natural logarithm. others: the likeliest tokens of the step, with theirs.
    """

    text: str
    logprob: float
    others: dict[str, float]


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What one request was answered.

    report, reason: `meta_info["aircache"]` and `meta_info["aircache_reason"]` (docs/answers.md).
    """

    text: str
    tokens: tuple[Token, ...]
    report: dict[str, Any] | None
    reason: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """Pictures first, then videos, then the text, in one user turn."""

    text: str
    images: tuple[Path, ...]
    videos: tuple[Path, ...]
    max_tokens: int

    def content(self) -> list[dict[str, Any]]:
        """The turn as the OpenAI protocol writes it; raises OSError for a file that is not one."""
        parts: list[dict[str, Any]] = []
        for kind, paths in (("image_url", self.images), ("video_url", self.videos)):
            parts += [{"type": kind, kind: {"url": data_url(path)}} for path in paths]
        return [*parts, {"type": "text", "text": self.text}]


def data_url(path: Path) -> str:
    """A file as a `data:` URL; raises OSError."""
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


class Server(Connection):
    """A running server that reads pictures."""

    def check(self) -> tuple[str, str]:
        """(its policy, its checkpoint); refuses a server that cannot be asked about pictures."""
        info, model = self.call("/server_info"), self.call("/model_info")
        if not (isinstance(info, dict) and isinstance(model, dict)):
            raise ValueError(f"no server of SGLang answers at {self.url}")
        policy, path = str(info.get("kv_policy") or "none"), str(model.get("model_path"))
        if policy == "none":
            raise ValueError(f"{self.url} runs without --kv-policy, so it drops nothing")
        if not model.get("has_image_understanding"):
            raise ValueError(f"{path} at {self.url} reads no pictures, so nothing is dropped")
        return policy, path

    def ask(self, content: Sequence[dict[str, Any]], max_tokens: int, **overrides: Any) -> Answer:
        """The greedy answer under overrides of `custom_params["aircache"]`."""
        body = {
            "model": "default",
            "messages": [{"role": "user", "content": list(content)}],
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "logprobs": True,
            "top_logprobs": TOP,
            "return_meta_info": True,
            "custom_params": {"aircache": overrides},
        }
        return read_answer(self.call("/v1/chat/completions", body))


def read_answer(response: dict[str, Any]) -> Answer:
    """The first choice of an OpenAI answer with log-probabilities and `meta_info`."""
    if not (isinstance(response, dict) and response.get("choices")):
        raise ValueError("the server's answer has no choices")
    choice = response["choices"][0]
    meta = choice.get("meta_info") or {}
    steps = ((choice.get("logprobs") or {}).get("content")) or []
    tokens = tuple(
        Token(
            str(step["token"]),
            float(step["logprob"]),
            {str(one["token"]): float(one["logprob"]) for one in step.get("top_logprobs") or ()},
        )
        for step in steps
    )
    text = str(choice["message"].get("content") or "")
    return Answer(text, tokens, meta.get("aircache"), meta.get("aircache_reason"))


def first_difference(left: Sequence[Token], right: Sequence[Token]) -> int | None:
    """The first step at which two answers differ, None where they are the same."""
    for step, (one, other) in enumerate(zip(left, right, strict=False)):
        if one.text != other.text:
            return step
    return None if len(left) == len(right) else min(len(left), len(right))
