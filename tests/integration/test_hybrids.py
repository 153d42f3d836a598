# SPDX-License-Identifier: Apache-2.0
"""Qwen3.5: the attending layers are compressed, the recurrent states go with their requests.

In test_families.py its answers are Transformers'; here many run at once on little memory, under
SGLang's own strict checks of both pools.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from aircache_sglang.platform import has_accelerator
from aircache_sglang.testing import Server
from aircache_sglang.testing.checkpoints import make_qwen3_5
from aircache_sglang.testing.oracle import Oracle, assert_agrees, assert_policy_agrees
from aircache_sglang.testing.prompts import Prompt, ask
from tests.integration.conftest import COMPRESSING_FLAGS, STRICT_MEMORY_CHECKS
from tests.integration.storm import (
    TOKEN_SIDE,
    Storm,
    fates,
    flush,
    loads,
    make_jobs,
    make_prompts,
    picture,
    wait_idle,
)
from tests.integration.test_memory import check_outcomes, settled_metrics
from tests.support.families.qwen import HYBRID_ENV, HYBRID_FLAGS, QWEN_IMAGE, HybridReader
from tests.support.preloaded import PreloadedServer

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(has_accelerator(), reason="SGLang would use the accelerator"),
]

POOL, LONGEST = 1200, 40
FLAGS = [
    *(*COMPRESSING_FLAGS, "--enable-metrics", *HYBRID_FLAGS, "--max-total-tokens", str(POOL)),
    *("--context-length", "1024", "--chunked-prefill-size", "128", "--max-running-requests", "8"),
    *("--load-snapshot-publish-interval", "1", "--schedule-conservativeness", "0.05"),
]
# Without a tree SGLang plans answers in full, and never retracts.
ENV = STRICT_MEMORY_CHECKS | HYBRID_ENV
RETRACTING = ENV | {
    "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "8",
    "SGLANG_TEST_RETRACT": "1",
    "SGLANG_TEST_RETRACT_INTERVAL": "17",
}


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_5(tmp_path_factory.mktemp("hybrid") / "model", patch=TOKEN_SIDE // 2)


class LongReader(HybridReader):
    """Over 100 tokens; stock SGLang's are up to 1.8e-4 away, packed ones up to 3.1e-4."""

    tolerance = 1e-3


@pytest.fixture(scope="module")
def reader(hybrid: Path) -> Oracle:
    return LongReader(hybrid)


def prompt_of(*seeds: int) -> Prompt:
    text = "".join(f"picture {seed} {QWEN_IMAGE} " for seed in seeds)
    return Prompt(
        f"<|im_start|>user\n{text}what is it?<|im_end|>\n<|im_start|>assistant\n",
        tuple(picture(seed) for seed in seeds),
    )


@pytest.fixture(scope="module")
def server(hybrid: Path) -> Iterator[Server]:
    with PreloadedServer(hybrid, FLAGS, env=RETRACTING) as server:
        yield server


def assert_nothing_is_left(server: Server) -> None:
    """An idle scheduler ends where a state is lost (invariant_checker.py, _check_mamba_pool)."""
    wait_idle(server)
    flush(server)
    assert loads(server)["num_used_tokens"] == 0


def test_a_storm_loses_no_slot_and_no_state(server: Server) -> None:
    prompts = make_prompts(5, 24)
    jobs = make_jobs(6, 200, prompts, longest=LONGEST)
    outcomes = Storm(server, concurrency=16).run(jobs, waves=2)
    finished = check_outcomes(outcomes, n_layers=2)
    assert fates(finished)["finish"] >= 100
    assert sum(not o.finished for o in outcomes) >= 10, "nothing was broken off"
    retracted = [
        o.answer for o in finished if o.answer and o.answer["meta_info"]["num_retractions"]
    ]
    assert any(answer["meta_info"]["aircache"] for answer in retracted)
    assert_nothing_is_left(server)


@pytest.mark.parametrize("when", ["prefill", "pressure"])
def test_many_at_once_are_as_alone(server: Server, reader: Oracle, when: str) -> None:
    """Chunked, retracted and resumed, packed after the prefill or when slots are short."""
    prompts = [prompt_of(3, seed) for seed in (4, 5, 8, 9, 10, 11)]
    overrides = {"retention": 0.1, "when": when, "return_selection": True}
    with ThreadPoolExecutor(len(prompts)) as threads:
        answers = list(
            threads.map(lambda each: ask(server, each, overrides, max_new_tokens=100), prompts)
        )
    packed = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        trace = assert_agrees(reader, prompt, answer)
        report = answer["meta_info"]["aircache"]
        if report["packed_at"] is None:
            continue
        packed += 1
        assert len(report["selection"]) == 2, "the layers that attend"
        if when == "prefill" and not answer["meta_info"]["num_retractions"]:
            assert_policy_agrees(trace, report)
    assert packed == len(prompts) if when == "prefill" else packed
    assert_nothing_is_left(server)


def test_nothing_is_left(server: Server) -> None:
    """The last test of this server."""
    server.generate("a", max_new_tokens=1)
    assert_nothing_is_left(server)
    metrics = settled_metrics(server, {"sglang:kv_used_tokens": 0, "sglang:mamba_usage": 0})
    assert metrics["sglang:kv_available_tokens"] == POOL
    assert metrics["sglang:aircache_columns_held"] == 0


def test_two_ranks(hybrid: Path, reader: Oracle) -> None:
    with Server(hybrid, [*FLAGS, "--tp-size", "2"], env=ENV) as ranks:
        for retention in (1, 0.3, 0.05):
            prompt = prompt_of(3, 5)
            answer = ask(ranks, prompt, {"retention": retention, "return_selection": True})
            trace = assert_agrees(reader, prompt, answer)
            if retention < 1:
                assert_policy_agrees(trace, answer["meta_info"]["aircache"])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ((), "without a radix cache alone, since ours holds no recurrent states; add --disable-r"),
        (
            (*HYBRID_FLAGS, "--speculative-algorithm", "NGRAM", "--disable-overlap-schedule"),
            "does not work with Qwen3_5ForConditionalGeneration and --speculative-algorithm NGRAM",
        ),
    ],
    ids=["a radix cache", "drafts"],
)
def test_refused(hybrid: Path, flags: tuple[str, ...], sentence: str) -> None:
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(hybrid)]
    command += ["--device", "cpu", "--dtype", "float32", "--kv-policy", "aircache", *flags]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode != 0 and sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_kernels_see_the_planes_of_attending_layers(hybrid: Path, reader: Oracle) -> None:
    """The GPU's path, interpreted: SGLang's Triton attention, our pass and our decode."""
    flags = [*FLAGS, "--attention-backend", "triton", "--skip-server-warmup"]
    with Server(hybrid, flags, env=ENV | {"TRITON_INTERPRET": "1"}) as server:
        prompt = prompt_of(2)
        overrides = {"retention": 0.3, "return_selection": True}
        answer = ask(server, prompt, overrides, max_new_tokens=4)
        assert_policy_agrees(assert_agrees(reader, prompt, answer), answer["meta_info"]["aircache"])
