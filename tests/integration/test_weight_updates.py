# SPDX-License-Identifier: Apache-2.0
"""New weights in a compressing server: nothing that the old ones have computed is used again.

Each answer is compared with Transformers on the weights that should be in force. They differ in the
vision tower too, so a picture that is still what the old one made of it shows.
"""

from __future__ import annotations

import base64
import pickle
import time
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

LONG = 400
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
        """The picture is computed anew, exact and compressed, and by the weights in force."""
        whole = ask(self.server, prompt, {"retention": 1.0}, max_new_tokens=8)
        assert cached(whole) == 0
        assert_agrees(self.oracle, prompt, whole)
        self.check(prompt)

    def check(self, prompt: Prompt = PROMPT) -> None:
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
    asked = []
    for prompt, own in zip(prompts, overrides, strict=True):
        wanted = {"return_selection": True, **own}
        one = threads.submit(ask, updated.server, prompt, wanted, max_new_tokens=LONG)
        asked.append((prompt, one))
    deadline = time.monotonic() + 60
    while loads(updated.server)["num_running_reqs"] < len(asked):
        assert time.monotonic() < deadline and not any(one.done() for _, one in asked)
        time.sleep(0.02)
    # Past the prefill of the last one.
    time.sleep(0.3)
    assert not any(one.done() for _, one in asked), "LONG is too short for this machine"
    return asked


def test_from_disk_and_from_tensors(updated: Updated) -> None:
    for change in (updated.from_disk, updated.from_tensors, updated.from_disk):
        updated.check_anew()
        change()
        updated.check_anew()


def test_the_tree_is_kept_where_the_caller_says_so_and_embeddings_are_not(updated: Updated) -> None:
    """As in stock SGLang exact KV of the old weights is then used; no picture is read by it."""
    updated.check_anew(user_prompt(picture(2, 9, 9), "what is this?"))
    updated.from_disk(flush_cache=False)
    # The same picture behind another text: its KV is computed anew, its embedding must be too.
    updated.check(user_prompt("look here:", picture(2, 9, 9), "what is this?"))
    again = ask(updated.server, user_prompt(picture(2, 9, 9), "what is this?"), max_new_tokens=1)
    assert cached(again) > 81
    updated.server.flush_cache()
    updated.check_anew(user_prompt(picture(2, 9, 9), "what is this?"))


def test_released_and_resumed(updated: Updated) -> None:
    """On a CPU the memory stays (SGLang's saver needs a GPU): all else is as there."""
    updated.check_anew(user_prompt(picture(3, 9, 9), "what is this?"))
    updated.do("/release_memory_occupation")
    updated.do("/resume_memory_occupation")
    updated.check_anew(user_prompt(picture(3, 9, 9), "what is this?"))
    # As a trainer does it: the weights come back before the KV pool.
    updated.do("/release_memory_occupation", tags=["kv_cache", "weights"])
    updated.do("/resume_memory_occupation", tags=["weights"])
    updated.from_tensors()
    updated.do("/resume_memory_occupation", tags=["kv_cache"])
    updated.check_anew(user_prompt(picture(3, 9, 9), "what is this?"))


def test_requests_in_flight_are_retracted_for_an_update(updated: Updated) -> None:
    """They are prefilled and packed again by the new weights, and all slots are given back."""
    with ThreadPoolExecutor(4) as threads:
        asked = in_flight(updated, threads)
        updated.do("/pause_generation", mode="retract")
        updated.from_disk()
        updated.do("/continue_generation")
        for prompt, one in asked:
            answer = one.result()
            assert answer["meta_info"]["num_retractions"] == 1
            assert answer["meta_info"]["completion_tokens"] == LONG
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
            meta = one.result()["meta_info"]
            assert meta["completion_tokens"] == LONG and not meta["num_retractions"]
    wait_idle(updated.server)
    updated.server.flush_cache()
    updated.check_anew()


def test_requests_in_flight_are_aborted_for_an_update(updated: Updated) -> None:
    with ThreadPoolExecutor(4) as threads:
        asked = in_flight(updated, threads)
        updated.from_disk(abort_all_requests=True)
        for _, one in asked:
            assert one.result()["meta_info"]["finish_reason"]["type"] == "abort"
    updated.check_anew()
