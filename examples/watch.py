# SPDX-License-Identifier: Apache-2.0
"""A camera-like stream: a frame a turn, a question about it, in one conversation of bounded memory.

    python -m sglang.launch_server --model-path CHECKPOINT --kv-policy aircache \\
        --aircache-reuse compressed --aircache-session-columns 160 --aircache-rungs 0.3,0.1
    python -m examples.watch http://127.0.0.1:30000 --turns 60

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


def asked(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """The conversation as the model's chat template writes it."""
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
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
    arguments = parser.parse_args(argv)
    if arguments.turns < 1:
        parser.error(f"--turns must be at least 1, got {arguments.turns}")
    url = arguments.url.rstrip("/")
    try:
        model = requests.get(f"{url}/model_info", timeout=30).json()["model_path"]
    except requests.RequestException as error:
        print(f"no SGLang server answers at {url}: {error}", file=sys.stderr)
        return 1
    tokenizer = AutoTokenizer.from_pretrained(model)
    messages: list[dict[str, str]] = []
    frames: list[str] = []
    right = 0
    print(f"{'turn':>4} {'tokens':>7} {'anew':>5} {'columns':>7} {'seconds':>7}  answer")
    for turn in range(1, arguments.turns + 1):
        picture, value = frame(turn)
        frames.append(picture)
        content = PICTURE + "what is the value of SUM?"
        messages.append({"role": "user", "content": content})
        body = {
            "text": asked(tokenizer, messages),
            "image_data": frames,
            "sampling_params": {"max_new_tokens": arguments.tokens, "temperature": 0.0},
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
        messages.append({"role": "assistant", "content": answer["text"]})
    print(f"{right} of {arguments.turns} answers are what stands on the newest frame")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
