# SPDX-License-Identifier: Apache-2.0
"""`aircache explain` without a server: what it refuses, what it reads, what the page says."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from aircache_patches.cli import main
from aircache_sglang.explain.client import Answer, Token, first_difference, read_answer
from aircache_sglang.explain.geometry import Panel, grid
from aircache_sglang.explain.page import Comparison, Run, crossed, html_of, still_of


def token(text: str, logprob: float = -0.5, **others: float) -> Token:
    return Token(text, logprob, others)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["explain", "--ask", "what?", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    return said.err.removeprefix("aircache explain: ").rstrip()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (56, 28), "red").save(tmp_path / "page.png")
    return tmp_path / "page.png"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--image or --video is needed, since text alone is never dropped"),
        (["--image", "no.png"], "no.png: No such file or directory"),
        (["--retention", "1"], "--retention must be numbers between 0 and 1, got '1'"),
        (["--retention", "a,b"], "--retention must be numbers between 0 and 1, got 'a,b'"),
        (["--image", "{image}", "--max-tokens", "1"], "--max-tokens must be at least 2, got 1"),
        (["--image", "{image}", "--url", "host"], "--url must begin with http://"),
        (["--image", "{image}", "--url", "http://127.0.0.1:9"], "no server answers at http"),
        (["--image", "{text}"], "is not a picture"),
    ],
)
def test_bad_input_is_a_sentence(
    arguments: list[str], said: str, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = image.with_name("text.png")
    text.write_text("no picture")
    found = refusal(capsys, *(part.format(image=image, text=text) for part in arguments))
    assert said in found


@pytest.fixture
def text_server() -> Iterator[str]:
    """A server that has a policy and says that its model reads no pictures."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = {
                "/server_info": {"kv_policy": "aircache"},
                "/model_info": {"model_path": "a/model", "has_image_understanding": False},
            }[self.path]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_model_without_pictures(
    text_server: str, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, "--url", text_server, "--image", str(image))
    assert said == f"a/model at {text_server} reads no pictures, so nothing is dropped"


def test_an_answer_is_read() -> None:
    step = {"token": "a", "logprob": -0.1, "top_logprobs": [{"token": "b", "logprob": -2.0}]}
    choice = {
        "message": {"content": "a"},
        "logprobs": {"content": [step]},
        "meta_info": {"aircache": None, "aircache_reason": "policy_none"},
    }
    found = read_answer({"choices": [choice]})
    assert found == Answer("a", (token("a", -0.1, b=-2.0),), None, "policy_none")


def test_the_first_difference() -> None:
    one, two = token("1"), token("2")
    assert first_difference([one, two], [one, two]) is None
    assert first_difference([one, two], [one, one]) == 1
    assert first_difference([one, two], [one]) == 1
    left, right = [one, token("x", -0.1, x=-0.1, y=-2.5)], [one, token("y", -0.2, y=-0.2)]
    assert crossed(left, right, "snapkv") == (
        "full cache gave 'y' -2.5000 and snapkv gave 'x' less than its five likeliest"
    )
    assert crossed([one], [one], "snapkv") is None and crossed([one, two], [one], "s") is None


def comparison(unplaced: str | None = None) -> Comparison:
    report = {"visual_tokens": 2, "columns": 1, "slots_freed": 1, "layer_budgets": [1]}
    answer = Answer("no", (token("no"),), report | {"selection": [[[1]]]}, None)
    panels = () if unplaced else (Panel(0, "", tuple(grid(1, 2))),)
    return Comparison(
        question="</script><b>what?",
        model="a/model",
        url="http://host",
        full=Answer("yes", (token("yes"),), None, "policy_none"),
        runs=(Run("snapkv", 0.5, answer),),
        pictures=(("</script>.png", Image.new("RGB", (56, 28), "red")),),
        panels=panels,
        unplaced=unplaced,
        strip=False,
    )


def test_nothing_of_a_request_ends_the_script_or_asks_the_network() -> None:
    page = html_of(comparison())
    assert page.count("</script>") == 2 and "<b>what" not in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page and "differs from token 1" in page and "not given" in page


def test_the_sentence_stands_where_the_picture_would() -> None:
    assert "<strong>no place.</strong>" in html_of(comparison("no place"))


def test_a_still_darkens_what_is_kept() -> None:
    shown = still_of(comparison(), width=560).convert("RGB")
    dropped, kept = shown.getpixel((150, 150)), shown.getpixel((450, 150))
    assert min(dropped[1:]) > 200 and max(kept[1:]) < 60
