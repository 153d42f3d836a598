# SPDX-License-Identifier: Apache-2.0
"""A family's server, its prompts of every shape, and what must hold for every answer."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from aircache_sglang.testing import Server
from aircache_sglang.testing.oracle import Oracle, assert_agrees, assert_policy_agrees
from aircache_sglang.testing.prompts import Prompt, ask, picture, words
from tests.integration.conftest import COMMON_FLAGS, STRICT_MEMORY_CHECKS
from tests.integration.storm import loads, wait_idle
from tests.support.families.family import Family, Part, make_sound, make_video
from tests.support.preloaded import PreloadedServer

STAND_INS = Path(__file__).parents[2] / "stand_ins"
# A chunk may end inside a picture and inside an instruction; the fallback families ignore it.
CHUNKS = ("--chunked-prefill-size", "96")
QUESTION = "what is above the small white house?"


def conversations(family: Family, folder: Path) -> dict[str, Prompt]:
    """Prompts of every shape that the family knows."""
    seen: list[Part] = [picture(1, 12, 10), picture(2, 10, 12), picture(3, 9, 14)]
    shapes = {
        "picture first": family.prompt([seen[0], QUESTION]),
        "picture last": family.prompt(["here is the garden" + words(9), seen[1]]),
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
    if family.adjacent:
        shapes["adjacent pictures"] = family.prompt(
            [seen[0], seen[1], "how many birds do you see?"]
        )
    if family.video is not None:
        # At 28 pixels a token and two frames a step, more tokens than are left alone.
        videos = [make_video(folder / f"{i}.png", i, side=140) for i in range(2)]
        shapes["video"] = family.prompt([videos[0], "what do they play?"])
        shapes["picture, video, text"] = family.prompt(
            ["look at this", seen[2], "and then at", videos[1], words(5)], system="be short."
        )
    if family.sound is not None:
        sounds = [make_sound(folder / f"{i}.wav", i) for i in range(2)]
        shapes["picture, sound, text"] = family.prompt(
            ["look at this", seen[0], "and listen", sounds[0], QUESTION], system="be short."
        )
        shapes["sound between pictures"] = family.prompt(
            [seen[1], "says", sounds[1], "but not", seen[2], "who is it?"]
        )
    return shapes


def make_server(family: Family, checkpoint: Path, policy: str) -> Server:
    """A server of one family that has not been started; the policy is "none" or "aircache"."""
    # SGLang's own checks do stock no harm, and all fork from one template.
    path = str(STAND_INS)
    if family.is_mended and policy == "none":
        path += f":{STAND_INS / 'mended_sglang'}"
    env = STRICT_MEMORY_CHECKS | family.env | {"PYTHONPATH": path}
    flags = [*COMMON_FLAGS, *CHUNKS, *family.flags, "--dtype", family.dtype, "--kv-policy", policy]
    if policy != "none":
        flags += ["--aircache-gate", "off", "--enable-metrics"]
    return PreloadedServer(checkpoint, flags, env=env)


@dataclasses.dataclass(frozen=True)
class Served:
    """One family, its prompts, a server that compresses, and Transformers' reader if there is one.

    stock: a server without compression, where the test compares with one.
    """

    family: Family
    checkpoint: Path
    prompts: dict[str, Prompt]
    server: Server
    stock: Server | None = None
    reader: Oracle | None = None

    def ask(self, prompt: Prompt, *, stock: bool = False, **overrides: Any) -> Any:
        server = self.stock if stock else self.server
        assert server is not None, "this test has no stock server"
        fields = self.family.several if len(prompt.images) > 1 else {}
        return ask(server, prompt, overrides or None, **fields)

    def check(self, prompt: Prompt, retention: float) -> Any:
        """The answer at a retention, which Transformers gives too; without a class there, SGLang's
        own count of tokens says what was visual."""
        answer = self.ask(prompt, retention=retention, return_selection=True)
        report = answer["meta_info"]["aircache"]
        assert report is not None, answer["meta_info"]["aircache_reason"]
        if self.reader is not None:
            assert_policy_agrees(assert_agrees(self.reader, prompt, answer), report)
        else:
            self._check_layout(prompt, answer["meta_info"])
        n_visual = report["visual_tokens"]
        m = max(1, round(retention * n_visual))
        assert report["columns"] == m and report["slots_freed"] == n_visual - m
        assert sum(report["layer_budgets"]) == len(report["layer_budgets"]) * m
        return answer

    def _check_layout(self, prompt: Prompt, meta_info: dict[str, Any]) -> None:
        """All that is not text is visual, and all text after the last picture is instruction."""
        tokenizer = AutoTokenizer.from_pretrained(self.checkpoint, trust_remote_code=True)
        family, report = self.family, meta_info["aircache"]
        text, n_prompt = prompt.text, meta_info["prompt_tokens"]
        if family.expansion is not None:
            head, *tails = text.split(family.image)
            pairs = enumerate(zip(prompt.images, tails, strict=True))
            text = head + "".join(family.expansion(i, image) + tail for i, (image, tail) in pairs)
        ids = tokenizer(text)["input_ids"]
        visual = [token == tokenizer.convert_tokens_to_ids(family.words.token) for token in ids]
        # Only SGLang knows how many tokens a picture fills where nothing expands it here.
        assert family.expansion is None or n_prompt == len(ids)
        assert report["visual_tokens"] == n_prompt - visual.count(False)
        assert report["instruction_tokens"] == visual[::-1].index(True)

    def assert_no_slot_is_lost(self) -> None:
        """After all tests; the strict checks of the server would have ended it otherwise."""
        wait_idle(self.server)
        self.server.flush_cache()
        assert loads(self.server)["num_used_tokens"] == 0
        assert self.server.metrics()["sglang:aircache_columns_held"] == 0


@contextlib.contextmanager
def serve(family: Family, folder: Path, *, beside_stock: bool = False) -> Iterator[Served]:
    """A family's server, and stock SGLang beside it if a test compares the two."""
    checkpoint = family.make(folder / "model")
    prompts = conversations(family, folder)
    server = make_server(family, checkpoint, "aircache")
    stock = make_server(family, checkpoint, "none") if beside_stock else None
    servers = [each for each in (stock, server) if each is not None]
    with contextlib.ExitStack() as stack:
        for each in servers:
            stack.callback(each.terminate)
        # Much of a start is waiting.
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(Server.start, servers))
        reader = None if family.reader is None else family.reader(checkpoint)
        yield Served(family, checkpoint, prompts, server, stock, reader)
