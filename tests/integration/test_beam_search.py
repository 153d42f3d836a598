# SPDX-License-Identifier: Apache-2.0
"""Beams decode in rows of their own, beside compressed requests and after them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from aircache_sglang.platform import has_accelerator
from aircache_sglang.testing import Server
from aircache_sglang.testing.oracle import Oracle, assert_agrees
from aircache_sglang.testing.prompts import Prompt, ask, picture, user_prompt, words
from tests.integration.storm import loads

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(has_accelerator(), reason="SGLang would use the accelerator"),
]

TEXT = user_prompt("tell a story of" + words(30, seed=5))
GARDEN = user_prompt(picture(31, 12, 10), "what is above the small white house?")


def beams(server: Server, prompt: Prompt) -> tuple[str, list[int]]:
    """Text and tokens of the best of three beams."""
    sampling = {"beam_width": 3, "max_new_tokens": 24, "ignore_eos": True}
    found = server.generate(prompt.text, images=prompt.images, sampling=sampling)
    return found["text"], found["output_ids"]


def test_beams_beside_compressed_requests(aircache_server: Server, oracle: Oracle) -> None:
    alone = beams(aircache_server, TEXT)
    # What these leave in the table must not be read for the beams' rows.
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: ask(aircache_server, GARDEN, {}, max_new_tokens=4), range(8)))
    with ThreadPoolExecutor(1) as thread:
        company = thread.submit(
            ask, aircache_server, GARDEN, {"return_selection": True}, max_new_tokens=300
        )
        while not loads(aircache_server)["num_running_reqs"]:
            assert not company.done()
        assert beams(aircache_server, TEXT) == alone
        assert not company.done(), "the beams had no company to their end"
        answer = company.result()
    assert answer["meta_info"]["aircache"]["columns"] == 12
    assert_agrees(oracle, GARDEN, answer)


def test_a_picture_with_beams_is_left_alone(stock_server: Server, aircache_server: Server) -> None:
    assert beams(aircache_server, GARDEN) == beams(stock_server, GARDEN)
