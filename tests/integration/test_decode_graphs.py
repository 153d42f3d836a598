# SPDX-License-Identifier: Apache-2.0
"""SGLang's decode graph runner captures and replays our graphs on the real server, without a GPU.

The graphs are recorded operation by operation, and the kernels interpreted
(tests/support/recorded_graphs.py); the rest, from HTTP to `DecodeCudaGraphRunner`, is SGLang's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from aircache_sglang.platform import has_accelerator
from aircache_sglang.testing import Server
from aircache_sglang.testing.checkpoints import make_qwen2_vl
from aircache_sglang.testing.oracle import Oracle, assert_agrees
from aircache_sglang.testing.prompts import ask, picture, user_prompt
from tests.integration.conftest import COMPRESSING_FLAGS, STRICT_MEMORY_CHECKS
from tests.support.compiler import needs_compiler

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(has_accelerator(), reason="SGLang would use the accelerator"),
]

ROOT = Path(__file__).parents[2]
PLATFORM = "recorded_graphs"
SIZES = (1, 2, 4)  # as the platform captures them
NEW_TOKENS = 4
TRIES = 5  # a busy machine may prepare requests that were sent at once too late for one step


def as_platform(folder: Path) -> dict[str, str]:
    """Make tests/support/recording_platform.py a platform plugin; a server's environment."""
    info = folder / f"{PLATFORM}-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PLATFORM}\nVersion: 0\n")
    entry = f"{PLATFORM} = tests.support.recording_platform:activate"
    (info / "entry_points.txt").write_text(f"[sglang.srt.platforms]\n{entry}\n")
    paths = [str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


class Replay(NamedTuple):
    size: int
    variant: str
    rows: int
    packed: int


def replays(log: str) -> list[Replay]:
    found = re.findall(r"replayed (\d+) (\w+) for (\d+) rows, (\d+) packed", log)
    return [Replay(int(a), b, int(c), int(d)) for a, b, c, d in found]


class Graphs:
    """A server whose decode steps are replayed, and the requests that it is asked together."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def ask(self, *asked: tuple[list[Any], dict[str, Any]]) -> tuple[list[Any], list[Replay]]:
        """The answers, and the replays that they took."""
        before = len(replays(self.server.log()))
        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(
                pool.map(lambda a: ask(self.server, a[0], a[1], max_new_tokens=NEW_TOKENS), asked)
            )
        return answers, replays(self.server.log())[before:]

    def ask_until(
        self, shown: Callable[[list[Replay]], bool], *asked: tuple[list[Any], dict[str, Any]]
    ) -> Iterator[tuple[list[Any], list[Replay]]]:
        """Each try's answers and replays; the last is the one whose replays are as wished."""
        for _ in range(TRIES):
            answers, done = self.ask(*asked)
            yield answers, done
            if shown(done):
                return
        pytest.fail(f"{len(asked)} requests sent at once did not share a step in {TRIES} tries")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half the layers of `checkpoint`: a step takes seconds in the interpreter."""
    return make_qwen2_vl(tmp_path_factory.mktemp("small") / "qwen2-vl", layers=2)


@pytest.fixture(scope="module")
def small_oracle(small: Path) -> Oracle:
    return Oracle(small)


def served(checkpoint: Path, folder: Path, *flags: str) -> Iterator[Graphs]:
    base = [*COMPRESSING_FLAGS, "--attention-backend", "triton", "--skip-server-warmup"]
    env = {**STRICT_MEMORY_CHECKS, **as_platform(folder), "TRITON_INTERPRET": "1"}
    with Server(checkpoint, [*base, *flags], env=env) as server:
        yield Graphs(server)


@pytest.fixture(scope="module")
def graphs(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graphs]:
    yield from served(small, tmp_path_factory.mktemp("platform"))


@pytest.fixture(scope="module")
def graphs_of_drafts(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graphs]:
    speculation = ("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", "3")
    yield from served(small, tmp_path_factory.mktemp("speculating"), *speculation)


ONE = user_prompt(picture(1, 8, 9), "what is above the house?")
TWO = user_prompt(picture(2, 8, 8), "and", picture(3, 6, 5), "how many birds?")
TEXT = user_prompt("how are you?")
KEEP = {"return_selection": True}


def test_both_variants_of_every_size(graphs: Graphs) -> None:
    """Large sizes first, as SGLang captures them, ours before the stock graph of a size."""
    captured = re.findall(r"captured (\d+) (\w+): (.*)", graphs.server.log())
    sizes = [(int(size), variant) for size, variant, _ in captured]
    assert sizes == [(n, label) for n in reversed(SIZES) for label in ("aircache", "plain")]
    for _, variant, kernels in captured:
        ours = {"_decode_stage1_kernel", "_decode_stage2_kernel"} & set(kernels.split())
        assert len(ours) == (2 if variant == "aircache" else 0), (variant, kernels)
        assert kernels, variant


def all_at_once(n: int, done: list[Replay]) -> bool:
    return max(replay.rows for replay in done) == n


def test_replays(graphs: Graphs, small_oracle: Oracle) -> None:
    """Batches of both kinds in turn, on rows and tables that change: every answer is exact."""
    packed, half, plain = {"retention": 0.1}, {"retention": 0.5}, {"retention": 1.0}
    seen: list[Replay] = []
    for asked in (
        [(ONE, packed)],
        [(TEXT, {})],
        [(TWO, half), (ONE, plain), (TEXT, {})],
        [(TWO, plain), (ONE, plain)],
        [(ONE, half), (TWO, packed)],
        [(ONE, plain)],
    ):
        kept = [(prompt, settings | KEEP) for prompt, settings in asked]
        for answers, done in graphs.ask_until(partial(all_at_once, len(asked)), *kept):
            for (prompt, settings), answer in zip(asked, answers, strict=True):
                report = answer["meta_info"]["aircache"]
                assert (report is None) == (settings in (plain, {}))
                assert_agrees(small_oracle, prompt, answer)
            # Each step replays something: a token of each answer comes from its prefill.
            assert sum(replay.rows for replay in done) >= (NEW_TOKENS - 1) * len(asked)
            seen += done
    for replay in seen:
        assert replay.size == min(size for size in SIZES if size >= replay.rows), replay
        assert (replay.variant == "aircache") == (replay.packed > 0), replay
    kinds = {(r.size, r.variant) for r in seen} | {(r.rows, r.variant) for r in seen}
    assert {(1, "aircache"), (1, "plain"), (2, "aircache"), (2, "plain"), (3, "aircache")} <= kinds


def test_more_than_the_largest_size(graphs: Graphs, small_oracle: Oracle) -> None:
    """Five requests decode eagerly; as they end, the rest is replayed again."""
    settings = [{"retention": r} | KEEP for r in (0.1, 0.5, 1.0, 0.1, 0.5)]
    asked = list(zip([ONE, TWO, ONE, TWO, ONE], settings, strict=True))

    def some_eagerly(done: list[Replay]) -> bool:
        return sum(replay.rows for replay in done) < (NEW_TOKENS - 1) * len(asked)

    for answers, done in graphs.ask_until(some_eagerly, *asked):
        for (prompt, _), answer in zip(asked, answers, strict=True):
            assert_agrees(small_oracle, prompt, answer)
        assert all(replay.rows <= max(SIZES) for replay in done)


@needs_compiler
def test_replays_of_drafts(graphs_of_drafts: Graphs, small_oracle: Oracle) -> None:
    """Verify steps of both kinds: every answer is exact, and packed ones are of our graphs."""
    captured = re.findall(r"captured (\d+) (\w+): (.*)", graphs_of_drafts.server.log())
    sizes = [(int(size), variant) for size, variant, _ in captured]
    assert sizes == [(n, label) for n in reversed(SIZES) for label in ("aircache", "plain")]
    for _, variant, kernels in captured:
        assert ("_extend_fwd_kernel" in kernels.split()) == (variant == "aircache"), kernels
    packed, plain = {"retention": 0.3} | KEEP, {"retention": 1.0}
    seen: list[Replay] = []
    for asked in ([(ONE, packed)], [(TWO, packed), (ONE, plain), (TEXT, {})], [(ONE, plain)]):
        answers, done = graphs_of_drafts.ask(*asked)
        for (prompt, _), answer in zip(asked, answers, strict=True):
            assert_agrees(small_oracle, prompt, answer)
        seen += done
    for replay in seen:
        assert replay.size == min(size for size in SIZES if size >= replay.rows), replay
        assert (replay.variant == "aircache") == (replay.packed > 0), replay
    assert {"aircache", "plain"} == {replay.variant for replay in seen}
