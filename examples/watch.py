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
import io
import json
import sys
import time
from collections.abc import Sequence
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


class Conversation:
    """What is sent of it: each turn alone, or all of it with every turn."""

    def __init__(self, url: str, tokenizer: Any, *, resend: bool) -> None:
        self._url, self._tokenizer, self._resend = url, tokenizer, resend
        self._messages: list[dict[str, str]] = []
        self._frames: list[str] = []
        self._session: str | None = None
        self._last: str | None = None
        self._ended_by = ""
        if not resend:
            opened = requests.post(
                f"{url}/open_session", json={"capacity_of_str_len": 10_000_000}, timeout=30
            )
            opened.raise_for_status()
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
            requests.post(
                f"{self._url}/close_session", json={"session_id": self._session}, timeout=30
            )

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


def first_token(url: str, body: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Seconds to the first token, and the whole answer."""
    started = time.monotonic()
    session = requests.Session()
    # A proxy of the environment must not see a server of this machine.
    session.trust_env = False
    with session.post(f"{url}/generate", json=body | {"stream": True}, stream=True) as response:
        response.raise_for_status()
        seconds, last = 0.0, b""
        for line in response.iter_lines():
            if line.startswith(b"data: {"):
                seconds = seconds or time.monotonic() - started
                last = line.removeprefix(b"data: ")
    answer: dict[str, Any] = json.loads(last)
    return seconds, answer


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
    url = arguments.url.rstrip("/")
    try:
        model = requests.get(f"{url}/model_info", timeout=30).json()["model_path"]
    except requests.RequestException as error:
        print(f"no SGLang server answers at {url}: {error}", file=sys.stderr)
        return 1
    conversation = Conversation(url, AutoTokenizer.from_pretrained(model), resend=arguments.resend)
    right = 0
    print(f"{'turn':>4} {'tokens':>7} {'anew':>5} {'columns':>7} {'seconds':>7}  answer")
    for turn in range(1, arguments.turns + 1):
        picture, value = frame(turn)
        body = conversation.turn(picture) | {
            "sampling_params": {"max_new_tokens": arguments.tokens, "temperature": 0.0}
        }
        try:
            seconds, answer = first_token(url, body)
        except requests.RequestException as error:
            print(f"turn {turn}: {error}", file=sys.stderr)
            return 1
        meta = answer["meta_info"]
        report = meta.get("aircache") or {}
        said = answer["text"].strip()
        right += said == value
        anew = meta["prompt_tokens"] - meta["cached_tokens"]
        columns = report.get("columns", "-")
        print(
            f"{turn:>4} {meta['prompt_tokens']:>7} {anew:>5} {columns:>7} {seconds:>7.2f}  {said}"
        )
        conversation.said(answer)
    conversation.close()
    print(f"{right} of {arguments.turns} answers are what stands on the newest frame")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
