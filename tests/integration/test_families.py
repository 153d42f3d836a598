# SPDX-License-Identifier: Apache-2.0
"""The core's laws for every model family: stock at retention 1, Transformers' answer below it.

What a family counts as visual is checked through the oracle: budgets, selection and every logprob
depend on which tokens are visual and on where the instruction begins.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from aircache_sglang.platform import has_accelerator
from aircache_sglang.testing import Server, ServerError
from aircache_sglang.testing.oracle import Oracle, assert_agrees, assert_policy_agrees
from aircache_sglang.testing.prompts import (
    Prompt,
    ask,
    max_logprob_difference,
    picture,
    user_prompt,
    words,
)
from tests.integration.conftest import COMMON_FLAGS, STRICT_MEMORY_CHECKS
from tests.integration.storm import loads, wait_idle
from tests.support.bad_requests import assert_all_end_well
from tests.support.families import FAMILIES, Family, Part, make_video
from tests.support.preloaded import PreloadedServer

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(has_accelerator(), reason="SGLang would use the accelerator"),
    pytest.mark.timeout(600),
]

STAND_INS = Path(__file__).parents[1] / "stand_ins"
# A chunk may end inside a picture and inside an instruction; the fallback families ignore it.
CHUNKS = ("--chunked-prefill-size", "96")
# Of logprobs between two servers that do the same; they may have found other prefixes cached.
TOLERANCES = {"float32": 1e-5, "float16": 1e-2}
QUESTION = "what is above the small white house?"


def conversations(family: Family, folder: Path) -> dict[str, Prompt]:
    """Prompts of every shape that the family knows."""
    seen: list[Part] = [picture(1, 12, 10), picture(2, 10, 12), picture(3, 9, 14)]
    shapes = {
        "picture first": family.prompt([seen[0], QUESTION]),
        "picture last": family.prompt(["here is the garden" + words(9), seen[1]]),
        "adjacent pictures": family.prompt([seen[0], seen[1], "how many birds do you see?"]),
        "text between": family.prompt(
            [*("first" + words(12), seen[0], "then" + words(15), seen[2]), "what has changed?"],
            system="you look at pictures and say what is in them.",
        ),
        "several turns": family.prompt(
            [seen[0], QUESTION],
            ["a tree, and more" + words(6)],
            ["and here?", seen[1], "say what you see."],
        ),
    }
    if family.video is not None:
        videos = [make_video(folder / f"{i}.png", i) for i in range(2)]
        shapes["video"] = family.prompt([videos[0], "what do they play?"])
        shapes["picture, video, text"] = family.prompt(
            ["look at this", seen[2], "and then at", videos[1], words(5)], system="be short."
        )
    return shapes


@dataclasses.dataclass(frozen=True)
class Served:
    """One family: its prompts, what stock SGLang answered, and a compressing server."""

    family: Family
    checkpoint: Path
    prompts: dict[str, Prompt]
    stock: dict[str, Any]
    server: Server

    def ask(self, name: str, **overrides: Any) -> Any:
        return ask_family(self.server, self.family, self.prompts[name], overrides)


def ask_family(
    server: Server, family: Family, prompt: Prompt, overrides: dict[str, Any] | None = None
) -> Any:
    fields = family.several if len(prompt.images) > 1 else {}
    return ask(server, prompt, overrides, **fields)


@pytest.fixture(scope="module", params=FAMILIES)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    family = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("family")
    checkpoint = family.make(folder / "model")
    prompts = conversations(family, folder)
    # SGLang's own checks do stock no harm, and the two fork from one template.
    env = STRICT_MEMORY_CHECKS | {"PYTHONPATH": str(STAND_INS)}
    flags = [*COMMON_FLAGS, *CHUNKS, "--dtype", family.dtype, "--kv-policy"]
    stock = PreloadedServer(checkpoint, [*flags, "none"], env=env)
    compressing = [*flags, "aircache", "--aircache-gate", "off", "--enable-metrics"]
    server = PreloadedServer(checkpoint, compressing, env=env)
    with contextlib.ExitStack() as stack:
        stack.callback(server.terminate)
        stack.callback(stock.terminate)
        # Much of a start is waiting.
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(Server.start, (stock, server)))
        expected = {name: ask_family(stock, family, prompt) for name, prompt in prompts.items()}
        stock.terminate()
        yield Served(family, checkpoint, prompts, expected, server)


def test_retention_1_is_stock(served: Served) -> None:
    for name, expected in served.stock.items():
        difference = max_logprob_difference([expected], [served.ask(name, retention=1)])
        assert difference < TOLERANCES[served.family.dtype], f"{name}: {difference:.1e}"


def test_compressed(served: Served) -> None:
    """Transformers agrees; where it has no class, SGLang's own count of tokens does."""
    make_reader = served.family.reader
    reader = None if make_reader is None else make_reader(served.checkpoint)
    for name, prompt in served.prompts.items():
        for retention in (0.3, 0.05):
            answer = served.ask(name, retention=retention, return_selection=True)
            report = answer["meta_info"]["aircache"]
            assert report is not None, name
            if reader is not None:
                trace = assert_agrees(reader, prompt, answer)
                assert_policy_agrees(trace, report)
            else:
                check_layout(served, prompt, answer["meta_info"])
            n_visual = report["visual_tokens"]
            m = max(1, round(retention * n_visual))
            assert report["columns"] == m and report["slots_freed"] == n_visual - m
            assert sum(report["layer_budgets"]) == len(report["layer_budgets"]) * m


def check_layout(served: Served, prompt: Prompt, meta_info: dict[str, Any]) -> None:
    """All that is not text is visual, and all text after the last picture is instruction."""
    tokenizer = AutoTokenizer.from_pretrained(served.checkpoint)
    image, report = served.family.image, meta_info["aircache"]
    n_text = len(tokenizer(prompt.text)["input_ids"]) - len(prompt.images)
    assert report["visual_tokens"] == meta_info["prompt_tokens"] - n_text
    tail = prompt.text.rpartition(image)[2]
    assert report["instruction_tokens"] == len(tokenizer(tail)["input_ids"])


def test_no_request_ends_the_server(served: Served, tmp_path: Path) -> None:
    """What stock SGLang does not survive; Qwen2-VL's and more are in test_bad_requests.py."""
    video = None if served.family.video is None else make_video(tmp_path / "video.png", 3)
    assert_all_end_well(served.server, served.family, video)


def test_no_slot_is_lost(served: Served) -> None:
    """After everything above; the strict checks of the server would have ended it otherwise."""
    server = served.server
    wait_idle(server)
    server.flush_cache()
    assert loads(server)["num_used_tokens"] == 0
    assert server.metrics()["sglang:aircache_columns_held"] == 0


@pytest.fixture(scope="module")
def replicas(checkpoint: Path) -> Iterator[Server]:
    """Two data-parallel Qwen2-VL of a short context, to which prompts are cut."""
    flags = [
        *(*COMMON_FLAGS, "--kv-policy", "aircache", "--aircache-gate", "off"),
        *("--enable-metrics", "--dp-size", "2"),
        *("--context-length", "400", "--allow-auto-truncate"),
    ]
    with Server(checkpoint, flags, env=STRICT_MEMORY_CHECKS) as server:
        yield server


def test_data_parallel_replicas(replicas: Server, oracle: Oracle) -> None:
    prompts = [user_prompt(picture(seed, 9, 9), QUESTION) for seed in range(6)]
    overrides = {"retention": 0.1, "return_selection": True}
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda prompt: ask(replicas, prompt, overrides), prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["meta_info"]["aircache"]["visual_tokens"] == 81
        assert_agrees(oracle, prompt, answer)
    assert {rank for rank, _ in counts(replicas, "requests_compressed_total")} == {"0", "1"}


def test_a_prompt_cut_through_a_picture_is_refused(replicas: Server, oracle: Oracle) -> None:
    """By SGLang itself, whose limit for prompts with pictures is below the length it cuts to."""
    prompt = user_prompt("look:", picture(1, 14, 14), "and", picture(2, 16, 16), QUESTION)
    before = counts(replicas, "requests_compressed_total")
    with pytest.raises(ServerError, match=r"HTTP 400.*Multimodal prompt is too long"):
        ask(replicas, prompt, {"retention": 0.1})
    assert counts(replicas, "requests_compressed_total") == before
    prompt = user_prompt(picture(7, 9, 9), QUESTION)
    assert_agrees(oracle, prompt, ask(replicas, prompt, {"return_selection": True}))


def counts(server: Server, name: str, label: str = "dp_rank") -> list[tuple[str, float]]:
    """Values of one of our counters by a label."""
    return [
        (labels[label], value)
        for sample, labels, value in server.metric_samples()
        if sample == f"sglang:aircache_{name}" and value
    ]


def test_two_tensor_parallel_ranks_of_qwen3_vl(tmp_path: Path) -> None:
    family = FAMILIES["qwen3-vl"]
    checkpoint = family.make(tmp_path / "model")
    prompts = conversations(dataclasses.replace(family, video=None), tmp_path)
    flags = [*COMMON_FLAGS, *CHUNKS, "--kv-policy", "aircache", "--aircache-gate", "off"]
    flags += ["--tp-size", "2"]
    assert family.reader is not None
    reader = family.reader(checkpoint)
    with Server(checkpoint, flags, env=STRICT_MEMORY_CHECKS) as server:
        for prompt in prompts.values():
            answer = ask(server, prompt, {"retention": 0.1, "return_selection": True})
            trace = assert_agrees(reader, prompt, answer)
            assert_policy_agrees(trace, answer["meta_info"]["aircache"])
