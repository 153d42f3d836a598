# SPDX-License-Identifier: Apache-2.0
"""What goes to the endpoint and what is read from its answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality.client import Client, RequestError
from benchmarks.quality.samples import Sample
from benchmarks.quality.settings import Setting

PICTURE = "data:image/png;base64,AAAA"
SAMPLE = Sample("ours", "value", "1", "what?", ("a",), "exact_match", pictures=lambda: [PICTURE])
TOP = [{"token": "a", "logprob": -0.1}, {"token": "b", "logprob": -3.0}]
ANSWER = {
    "choices": [
        {
            "message": {"role": "assistant", "content": "a"},
            "logprobs": {"content": [{"token": "a", "logprob": -0.1, "top_logprobs": TOP}]},
            "meta_info": {"aircache": {"policy": "snapkv", "columns": 3}},
        }
    ]
}


class Endpoint(ThreadingHTTPServer):
    """Answers every question with `answer` and `status`, and keeps the questions."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []
        self.answer: Any = ANSWER
        self.status = 200
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self.reply(200, {"data": [{"id": "some/folder/qwen2-vl"}]})

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        length = int(self.headers["Content-Length"])
        self.server.bodies.append(json.loads(self.rfile.read(length)))
        self.reply(self.server.status, self.server.answer)

    def reply(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Not to stderr."""


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_question_and_its_answer(endpoint: Endpoint) -> None:
    client = Client(endpoint.url + "/")
    assert client.model_name == "qwen2-vl"
    answer = client.ask(SAMPLE, Setting.of("snapkv", 0.05, window="last-16"))
    (body,) = endpoint.bodies
    assert body == {
        "model": "some/folder/qwen2-vl",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": PICTURE}},
                    {"type": "text", "text": "what?"},
                ],
            }
        ],
        "max_tokens": 32,
        "temperature": 0.0,
        "logprobs": True,
        "top_logprobs": 20,
        "custom_params": {
            "aircache": {
                "policy": "snapkv",
                "retention": 0.05,
                "min_visual_tokens": 1,
                "gate": "off",
                "window": "last-16",
            }
        },
        "return_meta_info": True,
    }
    assert answer.text == "a" and answer.report == {"policy": "snapkv", "columns": 3}
    assert answer.tokens == (("a", {"a": -0.1, "b": -3.0}),) and answer.seconds >= 0


def test_a_server_that_is_not_ours_gets_nothing_of_ours(endpoint: Endpoint) -> None:
    endpoint.answer = {"choices": [{"message": {"content": None}}]}
    answer = Client(endpoint.url, logprobs=False).ask(SAMPLE, Setting.of("server"))
    assert {*endpoint.bodies[0]} == {"model", "messages", "max_tokens", "temperature"}
    assert (answer.text, answer.tokens, answer.report) == ("", (), None)


def test_a_video_is_sent_as_it_is(endpoint: Endpoint, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"\0\0")
    sample = Sample("x", "all", "1", "what?", ("a",), "anls", video=tmp_path / "a.mp4")
    Client(endpoint.url).ask(sample, Setting.of("none"))
    video = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAA="}}
    assert endpoint.bodies[0]["messages"][0]["content"][0] == video
    assert endpoint.bodies[0]["custom_params"] == {"aircache": {"retention": 1.0}}


def test_errors(endpoint: Endpoint) -> None:
    client = Client(endpoint.url)
    endpoint.status, endpoint.answer = 400, {"message": "unknown key 'polcy'"}
    with pytest.raises(RequestError, match=r"HTTP 400: .*unknown key 'polcy'"):
        client.ask(SAMPLE, Setting.of("none"))
    with pytest.raises(RequestError, match=r"http://127.0.0.1:1 does not answer"):
        Client("http://127.0.0.1:1")
