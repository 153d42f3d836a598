# SPDX-License-Identifier: Apache-2.0
"""SGLang's own radix cache against ours, four workloads on one small pool, on this machine's CPU.

    python -m benchmarks.bench_sharing            # about 10 minutes on two cores
    python -m benchmarks.bench_sharing --only pin --only chats
    python -m benchmarks.bench_sharing --model qwen3_5   # a hybrid, both trees with its states

One server runs at a time, both in one run. `questions`: several questions on each of several
pictures, in mixed order. `shared`: one long system text, a picture of its own in every request, all
at once. `mixed`: texts and pictures that are asked about again, more than the pool can keep.
`chats`: follow-up turns of more chats than the pool can keep pictures of. `pin`: the tree alone, on
a trace of texts and pictures, for several bounds on pinned text. A row replaces the one of the same
key, and at the end each goal is met or missed. docs/radix-cache.md has the results.
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
from functools import partial
from pathlib import Path
from typing import Any

from aircache_sglang.testing import LoadWatch, Server
from benchmarks.records import RESULTS, Row, identity, provenance, read

POOL = 4096
PICTURE_SIDE = 20  # 400 visual tokens
RETENTION = 0.1
PARTS = ("pin", "questions", "shared", "mixed", "chats")
MODELS = ("qwen2_vl", "qwen3_5")

Turn = tuple[list[int], int]  # the tokens of a prompt and its answer, and the prompt's length

FLAGS = (
    *("--device", "cpu", "--dtype", "float32", "--max-total-tokens", str(POOL)),
    *("--max-running-requests", "64", "--enable-cache-report"),
    *("--load-snapshot-publish-interval", "1"),
)
# What a radix cache with recurrent states needs; three states for each request, as SGLang counts.
HYBRID_FLAGS = (
    *("--mamba-radix-cache-strategy", "no_buffer", "--disable-overlap-schedule"),
    *("--mamba-ssm-dtype", "float32", "--max-mamba-cache-size", "192"),
)
# The answers are too short for the pass to pay.
CACHES = {
    "stock": ("--kv-policy", "none"),
    "ours": ("--kv-policy", "aircache", "--aircache-gate", "off"),
}


class Workload:
    """Sends requests to one server and adds up what it answers.

    count: tokens of a text. reuse: the sharing mode asked for; None for SGLang's own cache.
    """

    def __init__(self, server: Any, reuse: str | None, count: Callable[[str], int]) -> None:
        self.server = server
        self.reuse = reuse
        self.count = count
        self.rows: list[Row] = []
        self.started = 0.0

    def ask(self, prompt: Any, tokens: int, *, turn: int = 0) -> Any:
        sampling: dict[str, Any] = {"ignore_eos": True}
        if self.reuse is not None:
            overrides = {"retention": RETENTION, "reuse": self.reuse}
            sampling["custom_params"] = {"aircache": overrides}
        answer = self.server.generate(
            prompt.text, images=prompt.images, max_new_tokens=tokens, sampling=sampling
        )
        info = answer["meta_info"]
        if self.reuse is not None and prompt.images and "columns" not in info.get("aircache", {}):
            raise RuntimeError(f"a request was not compressed: {info}")
        head, picture = info["prompt_tokens"], 0
        if prompt.images:
            head, picture = self.count(prompt.text.partition("<|image_pad|>")[0]), PICTURE_SIDE**2
        hit = info["cached_tokens"]
        self.rows.append(
            {
                "prompt_tokens": info["prompt_tokens"],
                "hit_tokens": hit,
                "hit_before": min(hit, head),
                "hit_behind": max(0, hit - head - picture),
                "prefilled": info["prompt_tokens"] - hit,
                "generated": info["completion_tokens"],
                "turn": turn,
            }
        )
        return answer

    def total(self, name: str, wanted: Callable[[Row], bool] = lambda row: True) -> int:
        return sum(row[name] for row in self.rows if wanted(row))

    def run(self, work: Callable[[Workload], None]) -> Row:
        """hit_tokens: of prompts, in the cache; prefilled_tokens: the others.

        hit_tokens_before, _behind: of the text before a picture, or of a prompt without one, and of
        the text behind it.
        """
        self.server.flush_cache()
        self.started = time.perf_counter()
        with LoadWatch(self.server, interval=0.05) as load:
            work(self)
        seconds = time.perf_counter() - self.started
        row = {
            "requests": len(self.rows),
            "prompt_tokens": self.total("prompt_tokens"),
            "hit_tokens": self.total("hit_tokens"),
            "hit_tokens_before": self.total("hit_before"),
            "hit_tokens_behind": self.total("hit_behind"),
            "prefilled_tokens": self.total("prefilled"),
            "held_at_once": load.most("num_running_reqs"),
            "output_tokens_per_second": round(self.total("generated") / seconds, 1),
            "seconds": round(seconds, 2),
        }
        if any(one["turn"] for one in self.rows):
            row["prefilled_first_turn"] = self.total("prefilled", lambda one: not one["turn"])
            row["prefilled_follow_up"] = self.total("prefilled", lambda one: one["turn"])
        return row


def questions(load: Workload, pictures: int = 12, each: int = 4) -> None:
    """4 questions on each of 12 pictures, shuffled, 8 at a time: the pool keeps 8 pictures."""
    from aircache_sglang.testing.prompts import picture, user_prompt, words

    prompts = [
        user_prompt(picture(i, PICTURE_SIDE, PICTURE_SIDE), words(8, seed=100 * i + q))
        for i in range(pictures)
        for q in range(each)
    ]
    random.Random(0).shuffle(prompts)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda prompt: load.ask(prompt, 16), prompts))


def shared(load: Workload, requests: int = 48) -> None:
    """48 requests at once: 300 shared words, a picture and a question of one's own, 64 tokens.

    A long text takes the pool until all of them wait, since a client prepares pictures slowly.
    """
    from aircache_sglang.testing.prompts import picture, user_prompt, words

    system = words(300, seed=7)
    prompts = [
        user_prompt(picture(200 + i, PICTURE_SIDE, PICTURE_SIDE), words(6, seed=i), system=system)
        for i in range(requests)
    ]
    # The shared text is in the cache before, and none of the pictures.
    load.server.generate(user_prompt("hello", system=system).text, max_new_tokens=2)
    with ThreadPoolExecutor(requests + 1) as pool:
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


def mixed(load: Workload, requests: int = 160) -> None:
    """160 requests one after another, half on one of 16 texts, half on one of 12 pictures.

    Texts have 60 to 240 words before a question of their own. Both are zipf-like, together they
    are 7000 tokens: which text is still there is up to eviction alone.
    """
    from aircache_sglang.testing.prompts import picture, user_prompt, words

    rng = random.Random(0)
    texts = [words(rng.randint(60, 240), seed=500 + i) for i in range(16)]
    for number in range(requests):
        which, question = int(rng.paretovariate(0.5)) - 1, words(6, seed=1000 + number)
        if rng.random() < 0.5:
            prompt = user_prompt(texts[min(which, 15)] + question)
        else:
            seen = picture(400 + min(which, 11), PICTURE_SIDE, PICTURE_SIDE)
            prompt = user_prompt(seen, question)
        load.ask(prompt, 4)


def wait_for(server: Any, name: str, count: int) -> None:
    """Wait until the scheduler's load says so, at most 2 minutes."""
    deadline = time.monotonic() + 120
    while server.get("/v1/loads")["loads"][0][name] < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{name} has not reached {count}")
        time.sleep(0.05)


def chats(load: Workload, count: int = 12, turns: int = 12) -> None:
    """12 turns of 12 chats, a picture each, every chat's turn before the next.

    5000 tokens after the first turn, 7500 after the last.
    """
    from aircache_sglang.testing.prompts import Prompt, picture, user_prompt, words

    prompts = [
        user_prompt(picture(300 + i, PICTURE_SIDE, PICTURE_SIDE), words(8, seed=i))
        for i in range(count)
    ]
    with ThreadPoolExecutor(4) as pool:
        for turn in range(turns):
            answers = pool.map(partial(load.ask, tokens=12, turn=turn), prompts)
            prompts = [
                Prompt(prompt.text + answer["text"] + words(6, seed=turn), prompt.images)
                for prompt, answer in zip(prompts, answers, strict=True)
            ]


WORKLOADS: dict[str, Callable[[Workload], None]] = {
    "questions": questions,
    "shared": shared,
    "mixed": mixed,
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

    from aircache_sglang.engine.metrics import Metrics
    from aircache_sglang.engine.tree import SpanTree

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


def measure(parts: Sequence[str], model: str, write: Callable[[Row, Row], None]) -> None:
    """model: a name of MODELS; a hybrid's rows have it in their key."""
    hybrid = model == "qwen3_5"
    if "pin" in parts and not hybrid:
        for share in (None, 0.0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 1.0):
            write({"part": "pin", "share": share}, replay(pin_trace(), share, POOL))
    chosen = [part for part in parts if part in WORKLOADS]
    if not chosen:
        return
    from transformers import AutoTokenizer

    from aircache_sglang.testing.checkpoints import make_qwen2_vl, make_qwen3_5

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        checkpoint = make_qwen3_5(path, patch=14) if hybrid else make_qwen2_vl(path)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        for cache, flags in CACHES.items():
            with Server(checkpoint, [*FLAGS, *flags, *(HYBRID_FLAGS if hybrid else ())]) as server:
                for part in chosen:
                    for reuse in (None,) if cache == "stock" else reuses(part, hybrid):
                        load = Workload(server, reuse, lambda text: len(tokenizer.encode(text)))
                        row = load.run(WORKLOADS[part])
                        key = {"part": part, "cache": cache, "reuse": reuse}
                        write(key | ({"model": model} if hybrid else {}), row)


def reuses(part: str, hybrid: bool) -> tuple[str, ...]:
    """The sharing modes of ours that a workload is measured in."""
    return ("exact", "compressed") if part == "chats" and not hybrid else ("exact",)


def goals(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """Each goal that the rows say something about, with its figures, and whether it is met.

    Text behind a picture is no part of the first: the last 512 tokens of a compressed request's
    prompt are computed anew by design, since scoring needs their queries.
    """
    found = {
        (row["key"].get("cache"), row["key"].get("reuse"), row["key"]["part"]): row for row in rows
    }
    judged = []
    for (cache, reuse, part), ours in found.items():
        stock = found.get(("stock", None, part))
        if cache != "ours" or stock is None:
            continue
        wanted = [("no fewer text hits before the picture", "hit_tokens_before", ">=", 1.0)]
        if part == "shared":
            wanted.append(("3 times as many requests at once", "held_at_once", ">=", 3.0))
        if (part, reuse) == ("chats", "compressed"):
            wanted.append(("less than 10 % prefilled", "prefilled_tokens", "<", 0.1))
        for what, name, sign, factor in wanted:
            bound = factor * stock[name]
            met = ours[name] >= bound if sign == ">=" else ours[name] < bound
            judged.append((f"{part}, {reuse}: {what}: {ours[name]}, stock {stock[name]}", met))
    return judged


def replace(path: Path, row: Row) -> None:
    """Put a row in place of the one with its key, or at the end."""
    rows = read(path) if path.exists() else []
    keys = [identity(old["key"]) for old in rows]
    if identity(row["key"]) in keys:
        rows[keys.index(identity(row["key"]))] = row
    else:
        rows.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_sharing", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="may be repeated")
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--file", type=Path, default=RESULTS / "sharing.jsonl")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    command = shlex.join(["python", "-m", "benchmarks.bench_sharing", *(argv or sys.argv[1:])])
    common = provenance() | {"command": command, "pool": POOL, "retention": RETENTION}

    def write(key: Row, row: Row) -> None:
        whole = {"key": key, **row, **common, "time": time.strftime("%FT%TZ", time.gmtime())}
        replace(arguments.file, whole)
        print(key, row, flush=True)

    parts = arguments.only or PARTS
    measure(parts, arguments.model, write)
    rows = [
        row
        for row in read(arguments.file)
        if row["key"]["part"] in parts and row["key"].get("model", MODELS[0]) == arguments.model
    ]
    for what, met in goals(rows):
        print("met   " if met else "missed", what)
    return 0


if __name__ == "__main__":
    sys.exit(main())
