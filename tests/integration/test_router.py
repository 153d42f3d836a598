# SPDX-License-Identifier: Apache-2.0
"""SGLang's router before two servers: what it lets through, and pictures that keep to a server.

Before a pair of servers: test_disaggregation.py.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import sglang

from aircache_patches.cli import main as aircache
from aircache_sglang.frontend import KEY_HEADER, AirCacheEndpoint, routing_key
from aircache_sglang.platform import has_accelerator
from aircache_sglang.testing import Server, png_data_url
from aircache_sglang.testing.pair import Unavailable
from aircache_sglang.testing.prompts import ask, picture, user_prompt, words
from aircache_sglang.testing.router import Router
from examples import openai_client

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(has_accelerator(), reason="SGLang would use the accelerator"),
]
PICTURE = picture(71, 12, 11)
PROMPT = user_prompt(PICTURE, "what is above the small white house?")


@pytest.fixture(scope="module")
def router(aircache_server: Server, serial_server: Server) -> Iterator[Router]:
    flags = ("--policy", "manual", "--assignment-mode", "min_group")
    try:
        router = Router([aircache_server.url, serial_server.url], flags)
    except Unavailable as reason:
        pytest.skip(str(reason))
    with router:
        yield router


def test_the_report_comes_back_and_overrides_do_not_go_through(
    router: Router, aircache_server: Server
) -> None:
    """`/generate`. The router writes a request anew, of the sampling parameters that it knows."""
    asked = {"retention": 0.25, "return_selection": True}
    alone, routed = ask(aircache_server, PROMPT, {}), ask(router, PROMPT, asked)
    assert routed["output_ids"] == alone["output_ids"]
    assert routed["meta_info"]["aircache"] == alone["meta_info"]["aircache"]
    assert routed["meta_info"]["aircache_reason"] is None
    small = ask(router, user_prompt(picture(72, 4, 4), "what is this?"))["meta_info"]
    assert small["aircache"] is None and small["aircache_reason"] == "few_visual_tokens"


def test_a_stream(router: Router) -> None:
    body = {
        "text": PROMPT.text,
        "image_data": [png_data_url(PICTURE)],
        "sampling_params": {"max_new_tokens": 8, "temperature": 0.0, "ignore_eos": True},
    }
    chunks = list(router.stream("/generate", body))
    assert len(chunks) > 1
    assert chunks[-1]["meta_info"]["aircache"]["columns"] == 13


def test_a_chat(router: Router, aircache_server: Server) -> None:
    """The same answer, and no report: `return_meta_info` is dropped, too."""
    fields = {"custom_params": {"aircache": {"retention": 0.25}}, "return_meta_info": True}
    routed = router.chat("what is this?", images=[PICTURE], **fields)["choices"][0]
    alone = aircache_server.chat("what is this?", images=[PICTURE])["choices"][0]
    assert routed["message"]["content"] == alone["message"]["content"]
    assert "meta_info" not in routed


def test_a_picture_keeps_to_its_server(router: Router) -> None:
    """Six pictures, three questions each, another picture every time."""
    pictures = [png_data_url(picture(80 + i, 10, 10)) for i in range(6)]
    keys = [routing_key(base64.b64decode(url.partition(",")[2])) for url in pictures]
    for question in range(3):
        for url, key in zip(pictures, keys, strict=True):
            cached = ask_by_key(router, url, key, question)["cached_tokens"]
            assert cached > 100 if question else cached < 100


def ask_by_key(router: Router, url: str, key: str, question: int = 0) -> Any:
    """A question about one picture to the server that the key belongs to; its meta_info."""
    body = {
        "text": user_prompt(PICTURE).text + words(6, seed=question),
        "image_data": [url],
        "sampling_params": {"max_new_tokens": 2, "temperature": 0.0},
    }
    response = requests.post(
        f"{router.url}/generate", json=body, headers={KEY_HEADER: key}, timeout=600
    )
    return response.json()["meta_info"]


def test_counters_add_up_and_each_server_shows_its_tree(
    router: Router,
    aircache_server: Server,
    serial_server: Server,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What both trees have counted is what the answers say was cached."""
    servers = (aircache_server, serial_server)
    before = [hit_tokens(server) for server in servers]
    asked: list[Any] = []
    counted = [0, 0]
    # A router without load gives a new key to either server by chance.
    for i in range(64):
        url = png_data_url(picture(90 + i, 10, 10))
        key = routing_key(url.encode())
        asked += [ask_by_key(router, url, key, question) for question in range(2)]
        counted = [hit_tokens(server) - n for server, n in zip(servers, before, strict=True)]
        if min(counted) > 100:
            break
    assert min(counted) > 100 and all(meta["aircache"] for meta in asked)
    assert sum(counted) == sum(meta["cached_tokens"] for meta in asked)
    capsys.readouterr()
    urls = [part for server in servers for part in ("--url", server.url)]
    assert aircache(["cache", *urls]) == 0
    trees = capsys.readouterr().out.split("\n\n")
    for server, tree in zip(servers, trees, strict=True):
        assert tree.startswith(f"{server.url}, data-parallel rank 0\npool ")
        assert "visual" in tree


def hit_tokens(server: Server) -> int:
    return int(server.info()["internal_states"][0]["aircache"]["totals"]["hit_tokens_exact"])


def test_clients_have_the_key(
    router: Router, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The front end's endpoint and the example send a picture to the server that knows it."""
    file = tmp_path / "picture.png"
    PICTURE.save(file)

    @sglang.function
    def describe(s: Any, question: str) -> None:
        s += sglang.user(sglang.image(str(file)) + question)
        s += sglang.assistant(sglang.gen("answer", max_tokens=4))

    backend = AirCacheEndpoint(router.url, chat_template_name="qwen2-vl")
    hits = []
    for question in ("what is this?", "who is this?", "where is this?"):
        state = describe.run(question=question, backend=backend)
        hits.append(state.get_meta_info("answer")["cached_tokens"])  # waits for its end
    assert min(hits[1:]) > 132
    assert openai_client.main([router.url, str(file), "what is this?", "--tokens", "4"]) == 0
    # Whose chats come back without a report.
    assert "No report" in capsys.readouterr().out
