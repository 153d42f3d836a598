# SPDX-License-Identifier: Apache-2.0
"""A camera-like stream: a frame a turn, a question about it, in one conversation of bounded memory.

    python -m sglang.launch_server --model-path CHECKPOINT --kv-policy aircache \\
        --aircache-reuse compressed --aircache-session-columns 160 --aircache-rungs 0.3,0.1
    python -m examples.watch http://127.0.0.1:30000 --turns 60

It is one session of SGLang's (`/open_session`), so that every frame is sent once. `--resend` sends
the whole conversation with every turn instead.

Each line says what a turn took: tokens of the whole conversation, those computed anew, columns that
all frames hold together, and seconds to the first token.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import io
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import requests
from transformers import AutoTokenizer

from examples.page import invoice

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


def frame(number: int) -> tuple[str, str]:
    """A page as a data URL, and the value of its SUM."""
    page, png = invoice(number), io.BytesIO()
    page.image().save(png, "png")
    url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    return url, page.facts["SUM"]


class Refused(Exception):
    """The server answers with an error; its own sentence."""


class Client:
    """A server of this machine, which a proxy of the environment must not see."""

    def __init__(self, url: str) -> None:
        self._url, self._session = url.rstrip("/"), requests.Session()
        self._session.trust_env = False

    def get(self, path: str) -> Any:
        return self._session.get(self._url + path, timeout=30).json()

    def post(self, path: str, body: dict[str, Any], *, stream: bool = False) -> requests.Response:
        response = self._session.post(self._url + path, json=body, stream=stream)
        if not response.ok:
            raise Refused(response.text)
        return response

    def first_token(self, body: dict[str, Any]) -> tuple[float, dict[str, Any]]:
        """Seconds to the first token, and the whole answer."""
        started = time.monotonic()
        with self.post("/generate", body | {"stream": True}, stream=True) as response:
            seconds, last = 0.0, b""
            for line in response.iter_lines():
                if line.startswith(b"data: {"):
                    seconds = seconds or time.monotonic() - started
                    last = line.removeprefix(b"data: ")
        answer: dict[str, Any] = json.loads(last)
        if "error" in answer:
            raise Refused(answer["error"]["message"])
        return seconds, answer


class Conversation:
    """What is sent of it: each turn alone, or all of it with every turn."""

    def __init__(self, client: Client, tokenizer: Any, *, resend: bool) -> None:
        self._client, self._tokenizer, self._resend = client, tokenizer, resend
        self._messages: list[dict[str, str]] = []
        self._frames: list[str] = []
        self._session: str | None = None
        self._last: str | None = None
        self._ended_by = ""
        if not resend:
            opened = client.post("/open_session", {"capacity_of_str_len": 10_000_000})
            self._session = opened.json()

    def turn(self, picture: str) -> dict[str, Any]:
        """The request about a further frame."""
        before = self._written()
        self._messages.append({"role": "user", "content": PICTURE + "what is the value of SUM?"})
        self._frames.append(picture)
        text = self._written()
        if self._resend:
            return {"text": text, "image_data": self._frames}
        # The session has all that was said, the token that ended the answer included.
        params = {"id": self._session, "rid": self._last}
        return {
            "text": text.removeprefix(before),
            "image_data": [picture],
            "session_params": params,
        }

    def said(self, answer: dict[str, Any]) -> None:
        """Note the answer to the last turn."""
        self._last = answer["meta_info"]["id"]
        token = answer["meta_info"]["finish_reason"].get("matched")
        self._ended_by = self._tokenizer.decode([token]) if isinstance(token, int) else ""
        self._messages.append({"role": "assistant", "content": answer["text"]})

    def close(self) -> None:
        if self._session is not None:
            self._client.post("/close_session", {"session_id": self._session})

    def _written(self) -> str:
        """The conversation so far as the model's chat template writes it, up to an answer."""
        if not self._messages:
            return ""
        answered = self._messages[-1]["role"] == "assistant"
        text: str = self._tokenizer.apply_chat_template(
            self._messages, tokenize=False, add_generation_prompt=not answered
        )
        if answered:
            said = self._messages[-1]["content"]
            end = text.rindex(said) + len(said)
            ended = self._ended_by if text.startswith(self._ended_by, end) else ""
            return text[:end] + ended
        return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.watch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("url", help="of the server")
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=12, help="of an answer")
    parser.add_argument("--resend", action="store_true", help="all of it with every turn")
    arguments = parser.parse_args(argv)
    if arguments.turns < 1:
        parser.error(f"--turns must be at least 1, got {arguments.turns}")
    client = Client(arguments.url)
    try:
        model = client.get("/model_info")["model_path"]
    except requests.RequestException as error:
        print(f"no SGLang server answers at {arguments.url}: {error}", file=sys.stderr)
        return 1
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        conversation = Conversation(client, tokenizer, resend=arguments.resend)
        with contextlib.closing(conversation):
            watch(client, conversation, arguments.turns, arguments.tokens)
    except (requests.RequestException, Refused) as error:
        print(f"the conversation ended: {error}", file=sys.stderr)
        return 1
    return 0


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """What one turn took; tokens of the whole conversation, and of those that were computed.

    columns: slots in which all frames are held; None on a server without compression.
    seconds: to the first token.
    """

    number: int
    tokens: int
    anew: int
    columns: int | None
    seconds: float
    said: str
    right: bool


def turns(
    client: Client, conversation: Conversation, count: int, sampling: dict[str, Any]
) -> Iterator[Turn]:
    """Ask about a new frame in every turn."""
    for number in range(1, count + 1):
        picture, value = frame(number)
        body = conversation.turn(picture) | {"sampling_params": sampling}
        seconds, answer = client.first_token(body)
        meta, said = answer["meta_info"], answer["text"].strip()
        n, report = meta["prompt_tokens"], meta.get("aircache") or {}
        anew = n - meta["cached_tokens"]
        yield Turn(number, n, anew, report.get("columns"), seconds, said, said == value)
        conversation.said(answer)


def watch(client: Client, conversation: Conversation, count: int, tokens: int) -> None:
    """Print a line of each turn."""
    right = 0
    sampling = {"max_new_tokens": tokens, "temperature": 0.0}
    print(f"{'turn':>4} {'tokens':>7} {'anew':>5} {'columns':>7} {'seconds':>7}  answer")
    for turn in turns(client, conversation, count, sampling):
        right += turn.right
        columns = "-" if turn.columns is None else turn.columns
        print(
            f"{turn.number:>4} {turn.tokens:>7} {turn.anew:>5} {columns:>7} {turn.seconds:>7.2f}  "
            f"{turn.said}",
            flush=True,
        )
    print(f"{right} of {count} answers are what stands on the newest frame")


if __name__ == "__main__":
    raise SystemExit(main())
