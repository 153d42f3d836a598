# SPDX-License-Identifier: Apache-2.0
"""Questions about pictures, over two servers behind SGLang's router: what is computed anew.

    python -m benchmarks.routing                      # with the extra `pd`; four minutes

Eight pictures of 320 visual tokens and five questions about each, shuffled, four at a time, over
two servers with `--kv-policy aircache`, whose radix trees are empty at the start of each trial.
*New* are prompt tokens that were not found in a tree; *ideal* is one server that is asked one
question after the other. The tiny model of the tests answers: tokens alone are counted, on which
the machine has no influence but by the order in which answers come.
"""

from __future__ import annotations

import argparse
import base64
import os
import random
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from aircache_sglang.testing import Server, png_data_url
from benchmarks.records import RESULTS, Results, Row, read
from benchmarks.report import table, write

PICTURES, QUESTIONS, AT_ONCE, TRIALS = 8, 5, 4, 3
FLAGS = (
    *("--device", "cpu", "--dtype", "float32", "--max-total-tokens", "16384"),
    *("--kv-policy", "aircache", "--aircache-gate", "off", "--enable-metrics"),
)
IDEAL = "ideal"
# The router's flags; `manual` alone reads the key that all requests have.
POLICIES = {
    "cache_aware": ("--policy", "cache_aware"),
    "cache_aware, balanced": (
        *("--policy", "cache_aware"),
        *("--balance-abs-threshold", "1", "--balance-rel-threshold", "1.1"),
    ),
    "round_robin": ("--policy", "round_robin"),
    "manual, a key a picture": ("--policy", "manual", "--assignment-mode", "min_group"),
}


def jobs(trial: int) -> list[tuple[str, str]]:
    """Texts and pictures (data URLs), in the order of asking."""
    from aircache_sglang.testing.prompts import picture, user_prompt, words

    asked = [
        (user_prompt(image, "look at this:" + words(9, seed=100 * trial + 10 * number + q)), image)
        for number in range(PICTURES)
        for image in [picture(1000 * trial + number, 16, 20)]
        for q in range(QUESTIONS)
    ]
    random.Random(trial).shuffle(asked)
    return [(prompt.text, png_data_url(image)) for prompt, image in asked]


def trial(url: str, servers: Sequence[Server], trial: int, at_once: int = AT_ONCE) -> Row:
    """Ask the server or router at a URL."""
    import requests

    from aircache_sglang.frontend import KEY_HEADER, routing_key

    for server in servers:
        server.flush_cache()
    before = [asked_of(server) for server in servers]

    def ask(job: tuple[str, str]) -> Any:
        text, image = job
        key = routing_key(base64.b64decode(image.partition(",")[2]))
        body = {
            "text": text,
            "image_data": [image],
            "sampling_params": {"max_new_tokens": 4, "temperature": 0.0, "ignore_eos": True},
        }
        session = requests.Session()
        session.trust_env = False
        with (
            session,
            session.post(
                f"{url}/generate", json=body, headers={KEY_HEADER: key}, timeout=600
            ) as response,
        ):
            response.raise_for_status()
            return response.json()["meta_info"]

    with ThreadPoolExecutor(at_once) as pool:
        answers = list(pool.map(ask, jobs(trial)))
    lengths = [answer["prompt_tokens"] for answer in answers]
    new = [answer["prompt_tokens"] - answer["cached_tokens"] for answer in answers]
    assert all(answer["aircache"] for answer in answers), "a request was not compressed"
    return {
        "requests": len(answers),
        "prompt_tokens": sum(lengths),
        "new_tokens": sum(new),
        "whole_prompts": sum(n > 320 for n in new),
        "by_server": [asked_of(s) - n for s, n in zip(servers, before, strict=True)],
    }


def asked_of(server: Server) -> int:
    """Requests that a server has answered so far."""
    return round(server.metrics().get("sglang:num_requests_total", 0))


def measure(results: Results) -> None:
    from aircache_sglang.testing.checkpoints import make_qwen2_vl
    from aircache_sglang.testing.router import Router

    with TemporaryDirectory() as folder, ExitStack() as stack:
        model = make_qwen2_vl(Path(folder) / "model")
        servers = [stack.enter_context(Server(model, FLAGS)) for _ in range(2)]
        for number in range(TRIALS):
            run = partial(trial, servers[0].url, servers, number, at_once=1)
            results.measure(key_of(IDEAL, number), run)
        for policy, flags in POLICIES.items():
            with Router([server.url for server in servers], flags) as router:
                for number in range(TRIALS):
                    run = partial(trial, router.url, servers, number)
                    results.measure(key_of(policy, number), run)


def key_of(policy: str, number: int) -> Row:
    return {"benchmark": "routing", "policy": policy, "trial": number}


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """What each policy of the router computes anew."""
    yield "## Pictures behind a router\n"
    yield (
        f"{PICTURES} pictures of 320 visual tokens, {QUESTIONS} questions about each, over two "
        f"servers: prompt tokens that were computed, in {TRIALS} trials. *Whole* are prompts whose "
        f"picture was not found; {PICTURES} is the least. *Busier* is the server with more to do: "
        f"its share of {PICTURES * QUESTIONS} requests.\n"
    )
    lines = []
    for policy in (IDEAL, *POLICIES):
        found = [row for row in rows if row["key"]["policy"] == policy]
        if found:
            columns = [[row[c] for row in found] for c in ("new_tokens", "whole_prompts")]
            columns.append([max(row["by_server"]) for row in found])
            lines.append([policy, *(" / ".join(map(str, column)) for column in columns)])
    yield table(["policy", "new tokens", "whole", "busier"], lines)
    for policy, flags in POLICIES.items():
        yield f"- {policy}: `{' '.join(flags)}`"
    yield ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.routing", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("action", nargs="?", choices=("run", "report"), default="run")
    parser.add_argument("--file", type=Path, default=RESULTS / "routing.jsonl")
    parser.add_argument("--fresh", action="store_true", help="drop the rows that are there")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if arguments.action == "run":
        if arguments.fresh:
            arguments.file.unlink(missing_ok=True)
        about = {"preset": "routing", "model": "the tests' tiny Qwen2-VL"}
        measure(Results(arguments.file, about | {"flags": " ".join(FLAGS), "url": None}))
    rows = read(arguments.file)
    write(arguments.file, rows, tables(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
