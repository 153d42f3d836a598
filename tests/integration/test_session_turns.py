# SPDX-License-Identifier: Apache-2.0
"""Turns of SGLang's own sessions (`/open_session`) with pictures, exact and compressed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from PIL import Image

from aircache_sglang.testing import Server
from aircache_sglang.testing.oracle import Oracle
from aircache_sglang.testing.prompts import PICTURE, picture
from aircache_sglang.testing.server import png_data_url
from tests.integration.storm import loads, wait_idle
from tests.support.bad_requests import post, sentence_of

pytestmark = pytest.mark.server

NEW_TOKENS = 5
FIRST = f"<|im_start|>user\n{PICTURE}what is this?<|im_end|>\n<|im_start|>assistant\n"
NEXT = f"<|im_end|>\n<|im_start|>user\n{PICTURE}and here?<|im_end|>\n<|im_start|>assistant\n"
TEXT = "<|im_end|>\n<|im_start|>user\nsay more<|im_end|>\n<|im_start|>assistant\n"
IMAGES = [picture(1, 8, 9), picture(2, 9, 9), picture(3, 10, 8)]


class Session:
    """One session of a server; `turn` answers, `refused` returns the sentence."""

    def __init__(self, server: Server, overrides: dict[str, Any] | None) -> None:
        self.server, self.overrides = server, overrides
        self.id = server.post("/open_session", {"capacity_of_str_len": 100_000})
        self.last: str | None = None

    def ask(self, text: str, image: int | None = None, **params: Any) -> tuple[int, Any]:
        custom = {} if self.overrides is None else {"aircache": self.overrides}
        body = {
            "text": text,
            "sampling_params": {
                "max_new_tokens": NEW_TOKENS,
                "temperature": 0.0,
                "ignore_eos": True,
                "custom_params": custom,
            },
            "return_logprob": True,
            "top_logprobs_num": 5,
            "session_params": {"id": self.id, **({"rid": self.last} | params)},
        }
        if image is not None:
            body["image_data"] = [png_data_url(IMAGES[image])]
        return post(self.server, body)

    def turn(self, text: str, image: int | None = None, **params: Any) -> Any:
        status, answer = self.ask(text, image, **params)
        assert status == 200, answer
        self.last = answer["meta_info"]["id"]
        return answer

    def refused(self, text: str, image: int | None = None, **params: Any) -> str:
        status, answer = self.ask(text, image, **params)
        assert status == 400, answer
        return sentence_of(answer)


@contextmanager
def session(server: Server, overrides: dict[str, Any] | None = None) -> Iterator[Session]:
    opened = Session(server, overrides)
    yield opened
    server.request("POST", "/close_session", {"session_id": opened.id})
    wait_idle(server)


TURNS = ((FIRST, 0), (NEXT, 1), (TEXT, None), (NEXT, 2))
OVERRIDES: dict[str, dict[str, Any]] = {
    "uncompressed": {"policy": "none"},
    "exact": {"retention": 0.3, "return_selection": True},
    "compressed": {"retention": 0.3, "return_selection": True, "reuse": "compressed"},
}


class Whole:
    """The same turns as requests of their own, each with all that was said before."""

    def __init__(self, server: Server, oracle: Oracle, overrides: dict[str, Any]) -> None:
        self.server, self.overrides = server, overrides
        self.tokenizer = oracle.processor.tokenizer
        self.ids: list[int] = []
        self.images: list[Image.Image] = []

    def turn(self, text: str, image: int | None = None) -> Any:
        self.ids += self.tokenizer(text)["input_ids"]
        if image is not None:
            self.images.append(IMAGES[image])
        answer = self.server.generate(
            input_ids=self.ids,
            images=self.images,
            max_new_tokens=NEW_TOKENS,
            return_logprob=True,
            sampling={"ignore_eos": True, "custom_params": {"aircache": self.overrides}},
        )
        self.ids += answer["output_ids"]
        return answer


def assert_same(answer: Any, expected: Any) -> None:
    """Tokens, length of the prompt, what was kept, and logprobs."""
    assert answer["output_ids"] == expected["output_ids"]
    one, other = answer["meta_info"], expected["meta_info"]
    assert one["prompt_tokens"] == other["prompt_tokens"]
    for field in ("selection", "layer_budgets", "columns", "visual_tokens", "reused"):
        assert (one["aircache"] or {}).get(field) == (other["aircache"] or {}).get(field), field
    steps = zip(one["output_token_logprobs"], other["output_token_logprobs"], strict=True)
    assert max(abs(a[0] - b[0]) for a, b in steps) < 1e-5


@pytest.mark.parametrize("name", OVERRIDES)
def test_turns_with_pictures(aircache_server: Server, oracle: Oracle, name: str) -> None:
    """Each answer is that of one request with the whole conversation."""
    server, overrides = aircache_server, OVERRIDES[name]
    server.flush_cache()
    whole = Whole(server, oracle, overrides)
    expected = [whole.turn(*turn) for turn in TURNS]
    wait_idle(server)
    server.flush_cache()
    with session(server, overrides) as chat:
        for turn, answer in zip(TURNS, expected, strict=True):
            assert_same(chat.turn(*turn), answer)
    compressed = [answer["meta_info"]["aircache"] is not None for answer in expected]
    assert compressed == [name != "uncompressed"] * len(TURNS)


def test_a_branch_and_a_turn_that_is_replaced(aircache_server: Server, oracle: Oracle) -> None:
    whole = Whole(aircache_server, oracle, {"policy": "none"})
    whole.turn(FIRST, 0)
    expected = whole.turn(NEXT, 2)
    with session(aircache_server, {"policy": "none"}) as chat:
        first = chat.turn(FIRST, 0)["meta_info"]["id"]
        chat.turn(NEXT, 1)
        assert_same(chat.turn(NEXT, 2, rid=first), expected)
        # SGLang stumbles over its own dictionary here.
        chat.turn(FIRST, 0, rid=None, replace=True)
        assert_same(chat.turn(NEXT, 2), expected)


def test_turns_that_cut_the_history(aircache_server: Server, oracle: Oracle) -> None:
    """At an offset: pictures that are cut off are gone, and nothing is left of half a picture."""
    tokenizer = oracle.processor.tokenizer
    head = len(tokenizer(FIRST.partition(PICTURE)[0])["input_ids"])
    for offset, text, image in ((head, TEXT, None), (head, NEXT, 1), (head + 80, NEXT, 1)):
        whole = Whole(aircache_server, oracle, {"policy": "none"})
        whole.turn(FIRST, 0)
        # The picture is one placeholder there, and 72 tokens and two brackets in the session.
        kept = offset if offset == head else offset - 71
        whole.ids = whole.ids[:kept]
        whole.images = [] if offset == head else whole.images
        expected = whole.turn(text, image)
        with session(aircache_server, {"policy": "none"}) as chat:
            chat.turn(FIRST, 0)
            assert_same(chat.turn(text, image, offset=offset), expected)
            chat.last = None
            chat.turn(FIRST, 0)
            said = chat.refused(text, image, offset=head + 20)
            assert "cuts through a picture" in said and "\n" not in said


def test_turns_that_go_nowhere(aircache_server: Server) -> None:
    """A picture beside an unknown turn or session; the session goes on."""
    with session(aircache_server) as chat:
        first = chat.turn(FIRST, 0)
        assert "Invalid request session id" in chat.refused(NEXT, 1, rid="nobody")
        assert "does not exist" in chat.refused(NEXT, 1, id="nobody")
        assert "the prompt speaks of 2 pictures" in chat.refused(NEXT + PICTURE, 1)
        again = chat.turn(NEXT, 1, rid=first["meta_info"]["id"])
        assert again["meta_info"]["prompt_tokens"] > first["meta_info"]["prompt_tokens"] + 81
    aircache_server.flush_cache()
    assert loads(aircache_server)["num_used_tokens"] == 0
