# SPDX-License-Identifier: Apache-2.0
"""New weights in a compressing server: nothing that the old ones have computed is used again.

Each answer is compared with Transformers on the weights that should be in force. They differ in the
vision tower too, so a picture that is still what the old one made of it shows.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from aircache_sglang.testing import Server
from aircache_sglang.testing.checkpoints import make_qwen2_vl
from aircache_sglang.testing.oracle import Oracle, assert_agrees, assert_policy_agrees
from aircache_sglang.testing.prompts import Prompt, ask, picture, user_prompt, words
from tests.integration.conftest import COMPRESSING_FLAGS, STRICT_MEMORY_CHECKS
from tests.integration.storm import loads, wait_idle
from tests.support.chats import cached, next_turn, question
from tests.support.preloaded import PreloadedServer

pytestmark = pytest.mark.server

# Tokens of an answer that is to last until the next call; the next ones if it did not.
LENGTHS = (60, 240, 960)
BEFORE_THE_PICTURE = 16  # tokens, more than any prompt here has
PROMPT = user_prompt(picture(1, 12, 11), "what is above the small white house?")
COMPRESSED = {"reuse": "compressed", "return_selection": True}


class Updated:
    """A server whose weights are one of two checkpoints, and Transformers on each."""

    def __init__(self, server: Server, checkpoints: list[Path], oracles: list[Oracle]) -> None:
        self.server, self.checkpoints, self.oracles = server, checkpoints, oracles
        self.now = 0

    @property
    def oracle(self) -> Oracle:
        """Transformers on the weights in force."""
        return self.oracles[self.now]

    def from_disk(self, **fields: Any) -> str:
        """Change to the other checkpoint; SGLang's message."""
        path = str(self.checkpoints[1 - self.now])
        told = self.server.post("/update_weights_from_disk", {"model_path": path, **fields})
        self.now = 1 - self.now
        return str(told["message"])

    def from_tensors(self, **fields: Any) -> None:
        """Change to the other checkpoint by tensors sent along."""
        weights = load_file(self.checkpoints[1 - self.now] / "model.safetensors")
        payload = base64.b64encode(pickle.dumps(list(weights.items()))).decode()
        body = {"serialized_named_tensors": [payload], **fields}
        assert self.server.post("/begin_weight_update", {})["success"]
        told = self.server.post("/update_weights_from_tensor", body)
        assert told["success"], told
        assert self.server.post("/end_weight_update", {})["success"]
        self.now = 1 - self.now

    def do(self, path: str, **body: Any) -> None:
        """POST to an endpoint that answers with anything but JSON."""
        response = self.server.request("POST", path, body)
        assert response.status_code == 200, response.text

    def check_anew(self, prompt: Prompt = PROMPT) -> None:
        """The picture is computed anew, exact and compressed, and by the weights in force; what is
        computed here is there for the next update to forget."""
        whole = ask(self.server, prompt, {"retention": 1.0}, max_new_tokens=8)
        assert cached(whole) < BEFORE_THE_PICTURE
        assert_agrees(self.oracle, prompt, whole)
        answer = question(self.server, prompt, **COMPRESSED)
        report = answer["meta_info"]["aircache"]
        assert not report["reused"]
        assert_policy_agrees(assert_agrees(self.oracle, prompt, answer), report)
        second = next_turn(prompt, answer, 1)
        assert question(self.server, second, **COMPRESSED)["meta_info"]["aircache"]["reused"]


@pytest.fixture(scope="module")
def updated(
    checkpoint: Path, oracle: Oracle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Updated]:
    other = make_qwen2_vl(tmp_path_factory.mktemp("other") / "qwen2-vl", seed=1)
    # SGLang publishes its load for `wait_idle` and `in_flight` after each step.
    flags = [*COMPRESSING_FLAGS, "--load-snapshot-publish-interval", "1"]
    with PreloadedServer(checkpoint, flags, env=STRICT_MEMORY_CHECKS) as server:
        yield Updated(server, [checkpoint, other], [oracle, Oracle(other)])


def in_flight(updated: Updated, threads: ThreadPoolExecutor) -> list[tuple[Prompt, Future[Any]]]:
    """Long answers that run: one packed, one with a replica, one that may be packed later, text."""
    overrides: list[dict[str, Any]] = [{}, {"reuse": "compressed"}, {"when": "pressure"}, {}]
    prompts = [
        user_prompt(picture(40 + i, 10, 9), "how many?" + words(9, seed=i)) for i in (1, 2, 3)
    ]
    prompts.append(user_prompt("tell me of the sea" + words(5)))
    for length in LENGTHS:
        asked = []
        for prompt, own in zip(prompts, overrides, strict=True):
            wanted = {"return_selection": True, **own}
            one = threads.submit(ask, updated.server, prompt, wanted, max_new_tokens=length)
            asked.append((prompt, one))
        while not any(one.done() for _, one in asked):
            if loads(updated.server)["num_running_reqs"] == len(asked):
                return asked
        for _, one in asked:
            one.result()
    raise AssertionError("no answer was long enough for this machine")


def is_whole(answer: Any) -> bool:
    """Whether an answer has all of its tokens."""
    meta = answer["meta_info"]
    return meta["finish_reason"]["type"] == "length" and meta["completion_tokens"] in LENGTHS


def test_from_disk_and_from_tensors(updated: Updated) -> None:
    updated.check_anew()
    for change in (updated.from_disk, updated.from_tensors):
        change()
        updated.check_anew()


def test_released_and_resumed(updated: Updated) -> None:
    """On a CPU the memory stays (SGLang's saver needs a GPU): all else is as there."""
    updated.do("/release_memory_occupation")
    updated.do("/resume_memory_occupation")
    updated.check_anew()
    # As a trainer does it: the weights come back before the KV pool.
    updated.do("/release_memory_occupation", tags=["kv_cache", "weights"])
    updated.do("/resume_memory_occupation", tags=["weights"])
    updated.from_tensors()
    updated.do("/resume_memory_occupation", tags=["kv_cache"])
    updated.check_anew()


def test_a_kept_tree_keeps_no_embedding(updated: Updated) -> None:
    """As in stock SGLang the tree's KV of the old weights stays, if the caller says so."""
    updated.from_disk(flush_cache=False)
    again = ask(updated.server, PROMPT, max_new_tokens=1)
    assert cached(again) > 132
    # Where nothing is cached the picture is what the new vision tower makes of it.
    elsewhere = ask(updated.server, PROMPT, {"retention": 1.0}, extra_key="elsewhere")
    assert cached(elsewhere) == 0
    assert_agrees(updated.oracle, PROMPT, elsewhere)
    updated.server.flush_cache()
    updated.check_anew()


def test_requests_in_flight_are_retracted_for_an_update(updated: Updated) -> None:
    """They are prefilled and packed again by the new weights, and all slots are given back."""
    with ThreadPoolExecutor(4) as threads:
        asked = in_flight(updated, threads)
        updated.do("/pause_generation", mode="retract")
        updated.from_disk()
        updated.do("/continue_generation")
        for prompt, one in asked:
            answer = one.result()
            assert answer["meta_info"]["num_retractions"] == 1 and is_whole(answer)
            assert_agrees(updated.oracle, prompt, answer)
    wait_idle(updated.server)
    updated.server.flush_cache()
    updated.check_anew()


def test_requests_in_flight_go_on_in_place(updated: Updated) -> None:
    """SGLang keeps their KV, as it is asked to; a flush is refused until they are gone."""
    with ThreadPoolExecutor(4) as threads:
        asked = in_flight(updated, threads)
        updated.do("/pause_generation", mode="in_place")
        path = str(updated.checkpoints[1 - updated.now])
        refused = updated.server.request("POST", "/update_weights_from_disk", {"model_path": path})
        assert refused.status_code == 400 and "not flushed" in refused.text
        updated.from_disk(flush_cache=False)
        updated.do("/continue_generation")
        for _, one in asked:
            answer = one.result()
            assert not answer["meta_info"]["num_retractions"] and is_whole(answer)
    wait_idle(updated.server)
    updated.server.flush_cache()
    updated.check_anew()


def test_requests_in_flight_are_aborted_for_an_update(updated: Updated) -> None:
    with ThreadPoolExecutor(4) as threads:
        asked = in_flight(updated, threads)
        body = {"model_path": str(updated.checkpoints[1 - updated.now]), "abort_all_requests": True}
        told = updated.server.request("POST", "/update_weights_from_disk", body)
        for _, one in asked:
            assert one.result()["meta_info"]["finish_reason"]["type"] == "abort"
    updated.now = 1 - updated.now
    if told.status_code != 200:
        # SGLang refuses to flush while the last step of who was aborted runs (sglang #12099).
        assert "not flushed" in told.text
        wait_idle(updated.server)
        updated.server.flush_cache()
    updated.check_anew()
