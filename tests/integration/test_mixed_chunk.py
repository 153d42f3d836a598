# SPDX-License-Identifier: Apache-2.0
"""`--enable-mixed-chunk` on a real server: packed requests decode in the batches of prefills."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aircache_sglang.platform import has_accelerator
from aircache_sglang.testing import Server
from aircache_sglang.testing.oracle import Oracle, assert_agrees
from aircache_sglang.testing.prompts import Prompt, ask, picture, user_prompt, words
from aircache_sglang.testing.server import png_data_url
from tests.integration.conftest import COMPRESSING_FLAGS, STRICT_MEMORY_CHECKS
from tests.integration.test_exactness import SHAPES
from tests.integration.test_memory import Stream
from tests.integration.test_pages import storm
from tests.support.preloaded import PreloadedServer

pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.skipif(has_accelerator(), reason="SGLang would use the accelerator"),
]

SLOTS = 2048
TOKENS = 80
# A prefill of twenty chunks brings a step each; without mixing all of them go first.
STEPS = 15
FLAGS = (
    *(*COMPRESSING_FLAGS, "--enable-metrics", "--max-total-tokens", str(SLOTS)),
    *("--enable-mixed-chunk", "--chunked-prefill-size", "64", "--max-running-requests", "16"),
    *("--load-snapshot-publish-interval", "1"),
)


@pytest.fixture(scope="module", params=["overlap", "serial"])
def mixed(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[Server]:
    flags = [*FLAGS, *(["--disable-overlap-schedule"] if request.param == "serial" else [])]
    with PreloadedServer(checkpoint, flags, env=STRICT_MEMORY_CHECKS) as server:
        yield server


def body(prompt: Prompt, **overrides: Any) -> dict[str, Any]:
    """A request without logprobs: SGLang mixes no batch that has them."""
    return {
        "text": prompt.text,
        "image_data": [png_data_url(image) for image in prompt.images],
        "sampling_params": {
            "max_new_tokens": TOKENS,
            "temperature": 0.0,
            "ignore_eos": True,
            "custom_params": {"aircache": overrides},
        },
    }


def beside_a_prefill(server: Server, prompt: Prompt, seed: int, **overrides: Any) -> Any:
    """The answer to a prompt during which another one is prefilled, and the steps it took then.

    On a slow machine the answer may be there before the other prompt is: tried again.
    """
    for attempt in range(6):
        stream = Stream(server, body(prompt, **overrides))
        stream.start()
        while stream.tokens < 5 and stream.is_alive():
            time.sleep(0.005)
        before = stream.tokens
        long = user_prompt(words(1300, seed=seed + 100 * attempt))
        server.generate(long.text, max_new_tokens=1)
        steps = stream.tokens - before
        stream.join()
        if steps >= STEPS:
            break
    return stream.answer, steps


def assert_same(answer: Any, expected: Any) -> None:
    """The same tokens, up to where two are equally likely."""
    pairs = zip(answer["output_ids"], expected["output_ids"], strict=True)
    for step, (got, want) in enumerate(pairs):
        if got != want:
            first, second = expected["meta_info"]["output_top_logprobs"][step][:2]
            assert first[0] - second[0] < 1e-4, f"another token at step {step}"
            return


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_requests_decode_beside_a_prefill(mixed: Server, oracle: Oracle, shape: str) -> None:
    prompt = SHAPES[shape]
    overrides = {"retention": 0.3}
    alone = ask(mixed, prompt, {**overrides, "return_selection": True}, max_new_tokens=TOKENS)
    assert_agrees(oracle, prompt, alone)
    answer, steps = beside_a_prefill(mixed, prompt, len(shape), **overrides)
    assert answer["meta_info"]["aircache"]["columns"] == alone["meta_info"]["aircache"]["columns"]
    assert steps >= STEPS
    assert_same(answer, alone)


def test_what_is_not_packed_too(mixed: Server, oracle: Oracle) -> None:
    prompt = SHAPES["one picture"]
    alone = ask(mixed, prompt, {"retention": 1.0}, max_new_tokens=TOKENS)
    answer, steps = beside_a_prefill(mixed, prompt, 1, retention=1.0)
    assert answer["meta_info"]["aircache"] is None and steps >= STEPS
    assert_same(answer, alone)


def test_a_follow_up_turn_too(mixed: Server) -> None:
    overrides = {"retention": 0.3, "reuse": "compressed"}
    first = user_prompt(picture(91, 12, 12), "what is in the garden?" + words(5))
    said = ask(mixed, first, overrides, max_new_tokens=6)["text"]
    turn = Prompt(first.text + said + "<|im_end|>\n and then?", first.images)
    alone = ask(mixed, turn, overrides, max_new_tokens=TOKENS)
    answer, steps = beside_a_prefill(mixed, turn, 2, **overrides)
    assert answer["meta_info"]["aircache"]["reused"] and steps >= STEPS
    assert_same(answer, alone)


def test_a_storm_leaves_no_slot_behind(mixed: Server) -> None:
    storm(mixed, 21, SLOTS)
