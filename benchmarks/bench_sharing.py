# SPDX-License-Identifier: Apache-2.0
"""SGLang's own radix cache against ours, three workloads on one small pool, on this machine's CPU.

    python -m benchmarks.bench_sharing            # about 6 minutes on two cores
    python -m benchmarks.bench_sharing --only pin

One server runs at a time, both in one run. `questions`: several questions on each of several
pictures, in mixed order. `shared`: one long system text, a picture of its own in every request, all
at once. `chats`: follow-up turns of more chats than the pool can keep pictures of. `pin`: the tree
alone, on a trace of texts and pictures, for several bounds on pinned text. docs/radix-cache.md has
the results.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.records import RESULTS, Row, provenance
from tests.support import LoadWatch, Server

POOL = 4096
PICTURE_SIDE = 20  # 400 visual tokens
RETENTION = 0.1
PARTS = ("pin", "questions", "shared", "chats")

Turn = tuple[list[int], int]  # the tokens of a prompt and its answer, and the prompt's length

FLAGS = (
    *("--device", "cpu", "--dtype", "float32", "--max-total-tokens", str(POOL)),
    *("--max-running-requests", "64", "--enable-cache-report"),
    *("--load-snapshot-publish-interval", "1"),
)


class Workload:
    """Sends requests to one server and adds up what it answers."""

    def __init__(self, server: Any, reuse: str | None) -> None:
        self.server = server
        self.reuse = reuse
        self.rows: list[dict[str, Any]] = []
        self.started = 0.0

    def ask(self, prompt: Any, tokens: int) -> Any:
        sampling: dict[str, Any] = {"ignore_eos": True}
        if self.reuse is not None:
            overrides = {"retention": RETENTION, "reuse": self.reuse}
            sampling["custom_params"] = {"aircache": overrides}
        answer = self.server.generate(
            prompt.text, images=prompt.images, max_new_tokens=tokens, sampling=sampling
        )
        self.rows.append(answer["meta_info"])
        return answer

    def run(self, work: Callable[[Workload], None]) -> Row:
        """hit_tokens: of prompts, in the cache; prefilled_tokens: the others."""
        self.server.flush_cache()
        self.started = time.perf_counter()
        with LoadWatch(self.server, interval=0.05) as load:
            work(self)
        seconds = time.perf_counter() - self.started
        hits = sum(row["cached_tokens"] for row in self.rows)
        prompts = sum(row["prompt_tokens"] for row in self.rows)
        # A hit runs through the whole picture or ends before it.
        n_visual = PICTURE_SIDE**2
        visual = sum(n_visual for row in self.rows if row["cached_tokens"] >= n_visual)
        generated = sum(row["completion_tokens"] for row in self.rows)
        return {
            "requests": len(self.rows),
            "prompt_tokens": prompts,
            "hit_tokens": hits,
            "hit_tokens_text": hits - visual,
            "prefilled_tokens": prompts - hits,
            "held_at_once": load.most("num_running_reqs"),
            "output_tokens_per_second": round(generated / seconds, 1),
            "seconds": round(seconds, 2),
        }


def questions(load: Workload) -> None:
    """4 questions on each of 12 pictures, shuffled, 8 at a time: the pool keeps 8 pictures."""
    from tests.support.prompts import picture, user_prompt, words

    prompts = [
        user_prompt(picture(i, PICTURE_SIDE, PICTURE_SIDE), words(8, seed=100 * i + q))
        for i in range(12)
        for q in range(4)
    ]
    random.Random(0).shuffle(prompts)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda prompt: load.ask(prompt, 16), prompts))


def shared(load: Workload) -> None:
    """48 requests at once: 300 shared words, a picture and a question of one's own, 64 tokens.

    A long text takes the pool until all of them wait, since a client prepares pictures slowly.
    """
    from tests.support.prompts import picture, user_prompt, words

    system = words(300, seed=7)
    prompts = [
        user_prompt(picture(200 + i, PICTURE_SIDE, PICTURE_SIDE), words(6, seed=i), system=system)
        for i in range(48)
    ]
    load.ask(prompts[0], 2)
    with ThreadPoolExecutor(49) as pool:
        pool.submit(
            load.server.generate,
            words(1900, seed=1),
            max_new_tokens=1900,
            rid="first",
            sampling={"ignore_eos": True},
        )
        wait_for(load.server, "num_running_reqs", 1)
        answers = [pool.submit(load.ask, prompt, 64) for prompt in prompts]
        wait_for(load.server, "num_waiting_reqs", len(prompts))
        load.started = time.perf_counter()
        load.server.request("POST", "/abort_request", {"rid": "first"})
        for answer in answers:
            answer.result()


def wait_for(server: Any, name: str, count: int) -> None:
    """Wait until the scheduler's load says so, at most 2 minutes."""
    deadline = time.monotonic() + 120
    while server.get("/v1/loads")["loads"][0][name] < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{name} has not reached {count}")
        time.sleep(0.05)


def chats(load: Workload) -> None:
    """5 turns of 14 chats, a picture each, every chat's turn before the next: 6000 tokens."""
    from tests.support.prompts import Prompt, picture, user_prompt, words

    prompts = [
        user_prompt(picture(300 + i, PICTURE_SIDE, PICTURE_SIDE), words(8, seed=i))
        for i in range(14)
    ]
    with ThreadPoolExecutor(4) as pool:
        for turn in range(5):
            answers = pool.map(lambda prompt: load.ask(prompt, 12), prompts)
            prompts = [
                Prompt(prompt.text + answer["text"] + words(6, seed=turn), prompt.images)
                for prompt, answer in zip(prompts, answers, strict=True)
            ]


WORKLOADS: dict[str, Callable[[Workload], None]] = {
    "questions": questions,
    "shared": shared,
    "chats": chats,
}


def pin_trace() -> list[Turn]:
    """1500 requests: half continue one of 60 texts, half ask about one of 30 pictures.

    Texts have 40 to 400 tokens and a question of their own, pictures 400; both zipf-like.
    """
    from sglang.srt.managers.schedule_batch import MM_PAD_SHIFT_VALUE

    rng = random.Random(0)
    lengths = [rng.randint(40, 400) for _ in range(60)]
    trace = []
    for number in range(1500):
        if rng.random() < 0.5:
            which = min(int(rng.paretovariate(0.6)) - 1, 59)
            ids = [1000 * which + i for i in range(lengths[which])]
            ids += [100_000 + 50 * number + i for i in range(30)]
        else:
            which = min(int(rng.paretovariate(0.6)) - 1, 29)
            pads = [MM_PAD_SHIFT_VALUE + 10 * which + i % 4 for i in range(400)]
            ids = [7, 8, *pads, *(100_000 + 50 * number + i for i in range(12))]
        trace.append((ids, len(ids)))
    return trace


def replay(trace: Sequence[Turn], share: float | None, size: int) -> Row:
    """Hit tokens of the tree alone, text and pictures apart; requests come one after another.

    share: the bound on pinned text; None stands for SGLang's own tree. size: slots of the pool.
    """
    import torch
    from sglang.srt.managers.schedule_batch import MM_PAD_SHIFT_VALUE
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

    from aircache_sglang.runtime.metrics import Metrics
    from aircache_sglang.runtime.tree import SpanTree

    allocator = TokenToKVPoolAllocator(size, torch.float32, "cpu", None, False)
    params = CacheInitParams(False, None, allocator, 1)  # type: ignore[arg-type]
    tree = RadixCache(params) if share is None else SpanTree(params, share, Metrics(None))
    hits = {"text": 0, "visual": 0}
    for ids, prompt_len in trace:
        key = RadixKey(array("q", ids))
        wanted = RadixKey(key.token_ids, limit=prompt_len - 1)
        found = tree.match_prefix(MatchPrefixParams(key=wanted))
        length = found.device_prefix_len
        for token in ids[:length]:
            hits["visual" if token >= MM_PAD_SHIFT_VALUE else "text"] += 1
        lock = tree.lock(found.last_device_node)
        allocator.evict_to_free_tokens(tree, len(ids) - length)
        slots = allocator.alloc(len(ids) - length)
        assert slots is not None
        path = torch.cat([tree.path_device_indices(found.last_device_node), slots])
        # Nothing is evicted between match and insert: what was no hit is new, but for an answer.
        if isinstance(tree, SpanTree):
            done = tree.publish(key, path, prompt_len=prompt_len)
            known = done.duplicates[-1][1] if done.duplicates else 0
        else:
            known = tree.insert(InsertParams(key=key, value=path)).prefix_len
            # As SGLang does, so that an answer goes without its prompt.
            prompt = InsertParams(
                key=key[:prompt_len], value=path[:prompt_len], inserted_len=prompt_len
            )
            tree.insert(prompt)
        allocator.free(path[length : max(known, length)])
        tree.unlock(lock)
    return {"hit_tokens_text": hits["text"], "hit_tokens_visual": hits["visual"]}


def measure(parts: Sequence[str], write: Callable[[Row, Row], None]) -> None:
    if "pin" in parts:
        for share in (None, 0.0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 1.0):
            write({"part": "pin", "share": share}, replay(pin_trace(), share, POOL))
    chosen = [part for part in parts if part in WORKLOADS]
    if not chosen:
        return
    from tests.factories import make_qwen2_vl

    with tempfile.TemporaryDirectory() as folder:
        model = make_qwen2_vl(Path(folder) / "model")
        for cache, flags in (("stock", ("none",)), ("ours", ("aircache",))):
            with Server(model, [*FLAGS, "--kv-policy", *flags]) as server:
                for part in chosen:
                    for reuse in (None,) if cache == "stock" else reuses(part):
                        load = Workload(server, reuse)
                        row = load.run(WORKLOADS[part])
                        write({"part": part, "cache": cache, "reuse": reuse}, row)


def reuses(part: str) -> tuple[str, ...]:
    """The sharing modes of ours that a workload is measured in."""
    return ("exact", "compressed") if part == "chats" else ("exact",)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_sharing", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="may be repeated")
    parser.add_argument("--file", type=Path, default=RESULTS / "sharing.jsonl")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    command = shlex.join(["python", "-m", "benchmarks.bench_sharing", *(argv or sys.argv[1:])])
    common = provenance() | {"command": command, "pool": POOL, "retention": RETENTION}
    arguments.file.parent.mkdir(parents=True, exist_ok=True)

    def write(key: Row, row: Row) -> None:
        whole = {"key": key, **row, **common, "time": time.strftime("%FT%TZ", time.gmtime())}
        with arguments.file.open("a") as file:
            file.write(json.dumps(whole) + "\n")
        print(key, row, flush=True)

    measure(arguments.only or PARTS, write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
