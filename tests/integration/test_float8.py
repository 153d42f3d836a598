# SPDX-License-Identifier: Apache-2.0
"""Float8 KV on a real server: packed bytes are read back as what they are.

Float8 moves the logprobs of the tiny checkpoint by up to half a unit with nothing compressed, so
Transformers, in float32, can tell here what a request saw, and no more. That both implementations
read float8 alike is in tests/unit/kernels/test_engine_twins.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from aircache_sglang.platform import has_accelerator
from aircache_sglang.testing import Server
from aircache_sglang.testing.oracle import LOGPROB_TOLERANCE, Oracle
from aircache_sglang.testing.prompts import picture, user_prompt
from tests.integration.conftest import COMPRESSING_FLAGS, STRICT_MEMORY_CHECKS
from tests.support.chats import carried, next_turn, question
from tests.support.preloaded import PreloadedServer

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(has_accelerator(), reason="SGLang would use the accelerator"),
]


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    flags = [*COMPRESSING_FLAGS, "--kv-cache-dtype", "fp8_e4m3"]
    with PreloadedServer(checkpoint, flags, env=STRICT_MEMORY_CHECKS) as server:
        yield server


def test_answers_have_seen_what_was_kept(server: Server, oracle: Oracle) -> None:
    """A compressed request and its follow-up turn agree with the mask, not with the picture."""
    first = user_prompt(picture(1), "what is above the house?")
    whole = question(server, first, retention=1.0)
    assert LOGPROB_TOLERANCE < carried(oracle, first, first, whole, None) < 1.0
    overrides = {"retention": 0.1, "reuse": "compressed", "return_selection": True}
    prompt, answer = first, question(server, first, **overrides)
    selection = answer["meta_info"]["aircache"]["selection"]
    for turn in range(2):
        assert answer["meta_info"]["aircache"]["reused"] == bool(turn)
        error = carried(oracle, first, prompt, answer, selection)
        assert error < 1.0 and 3 * error < carried(oracle, first, prompt, answer, None)
        prompt = next_turn(prompt, answer, turn)
        answer = question(server, prompt, **overrides)
