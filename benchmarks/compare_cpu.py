# SPDX-License-Identifier: Apache-2.0
"""Stock SGLang against `--kv-policy aircache`, real servers on this machine's CPU.

The model has random weights, 1.1 million parameters, and 6 KiB of KV a token, so that KV outweighs
the model from a thousand tokens on, as it does for a real model on long documents. One server runs
at a time; rounds alternate between the two. Per-request retention covers all settings of one.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import requests
from PIL import Image

from benchmarks.records import Results, Row
from tests.factories import make_qwen2_vl
from tests.support import Server, ServerError, png_data_url

MODEL = {
    "layers": 6,
    "heads": 2,
    "kv_heads": 2,
    "head_dim": 64,
    "intermediate_size": 128,
    "vision_depth": 1,
}
PICTURE_TOKENS = 1024  # a picture of 896 x 896 pixels
SIDE = 32
PICTURES = 8
TOKENS = 49  # 48 decode steps a request
POOL = 102_400
FLAGS = (
    *("--device", "cpu", "--max-total-tokens", str(POOL), "--context-length", "16384"),
    *("--chunked-prefill-size", "4096", "--max-running-requests", "16"),
    *("--enable-metrics", "--load-snapshot-publish-interval", "1", "--sleep-on-idle"),
)
PROMPT = "<|im_start|>user\n{pictures}what is in the pictures?<|im_end|>\n<|im_start|>assistant\n"
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
ONLY_STOCK = "none"


@functools.cache
def picture(seed: int) -> str:
    """A picture of 1024 visual tokens as a URL, quick to send and to decode."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    size = (28 * SIDE, 28 * SIDE)
    return png_data_url(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST))


def pictures(request: int, count: int, pool: int) -> list[str]:
    """`count` pictures of a pool, for each of its requests another one first.

    So no request finds another's prompt in the radix tree, while SGLang has all the pictures'
    embeddings: the vision tower's dense attention would drown what is to be measured.
    """
    return [picture((request + i) % pool) for i in range(count)]


def stream(server: Server, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The chunks of a streamed batch, each with its request's `index`, as they arrive."""
    with requests.Session() as session:
        session.trust_env = False
        with session.post(
            server.url + "/generate", json=body, stream=True, timeout=server.timeout
        ) as response:
            for line in response.iter_lines():
                if not line.startswith(b"data: ") or line == b"data: [DONE]":
                    continue
                chunk = json.loads(line[len(b"data: ") :])
                if "error" in chunk:
                    raise ServerError(str(chunk["error"]))
                yield chunk


def run_cell(server: Server, batch: int, n_pictures: int, retention: float | None) -> Row:
    """One batch of `batch` requests of `n_pictures` pictures each, on an empty radix tree.

    prefill_seconds: from the first forward to the last request's first token, as the scheduler
    counts it. prefill_cpu_seconds: CPU time of the scheduler process until then.
    token_seconds: the median time between two tokens of a request while all decode.
    token_cpu_seconds: CPU time of the scheduler process a decode step, which other work on the
    machine disturbs less.
    kv_in_use: the pool's count in the middle of the decode.
    """
    server.flush_cache()
    urls = [pictures(i, n_pictures, PICTURES) for i in range(batch)]
    sampling: dict[str, Any] = {
        "max_new_tokens": TOKENS,
        "temperature": 0.0,
        "ignore_eos": True,
    }
    if retention is not None:
        sampling["custom_params"] = {"aircache": {"retention": retention}}
    body = {
        "text": [PROMPT.format(pictures=PICTURE * n_pictures)] * batch,
        "image_data": urls,
        "sampling_params": sampling,
        "stream": True,
    }
    scheduler = scheduler_of(server)
    cpu = [cpu_seconds(scheduler)]
    spent = pass_seconds(server)
    arrivals: list[list[tuple[float, int]]] = [[] for _ in range(batch)]
    last: list[dict[str, Any]] = [{} for _ in range(batch)]
    kv_in_use = 0
    for chunk in stream(server, body):
        now = time.perf_counter()
        index = chunk.get("index", 0)
        arrivals[index].append((now, chunk["meta_info"]["completion_tokens"]))
        last[index] = chunk
        if len(cpu) == 1 and all(arrivals):
            cpu.append(cpu_seconds(scheduler))
        if not kv_in_use and all(a and a[-1][1] >= TOKENS // 2 for a in arrivals):
            kv_in_use = server.get("/v1/loads")["loads"][0]["num_used_tokens"]
    cpu.append(cpu_seconds(scheduler))
    steps = TOKENS - max(count for times in arrivals for _, count in times[:1])
    start = max(times[0][0] for times in arrivals)
    gaps = [
        (t1 - t0) / (n1 - n0)
        for times in arrivals
        for (t0, n0), (t1, n1) in itertools.pairwise(times)
        if t0 >= start and n1 > n0
    ]
    metas = [chunk["meta_info"] for chunk in last]
    reports = [meta.get("aircache") for meta in metas]
    compressed = retention is not None and retention < 1
    if any((report is not None) != compressed for report in reports):
        raise ServerError(f"not every request was compressed at retention {retention}: {reports}")
    outputs = json.dumps([chunk["output_ids"] for chunk in last]).encode()
    return {
        "prompt_tokens": metas[0]["prompt_tokens"],
        "prefill_seconds": max(meta["prefill_finished_time"] for meta in metas)
        - min(meta["forward_entry_time"] for meta in metas),
        "prefill_cpu_seconds": cpu[1] - cpu[0],
        "pass_seconds": pass_seconds(server) - spent,
        "token_seconds": statistics.median(gaps),
        "token_cpu_seconds": (cpu[2] - cpu[1]) / steps,
        "kv_in_use": kv_in_use,
        "columns": reports[0]["columns"] if reports[0] else None,
        "outputs": hashlib.sha256(outputs).hexdigest()[:16],
    }


def scheduler_of(server: Server) -> psutil.Process:
    """The process that runs the model."""
    for pid in server.pids():
        process = psutil.Process(pid)
        if any("sglang::scheduler" in part for part in process.cmdline()):
            return process
    raise ServerError("the server has no scheduler process")


def cpu_seconds(process: psutil.Process) -> float:
    """CPU seconds of all threads so far, from the kernel's nanosecond counters."""
    tasks = Path(f"/proc/{process.pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def pass_seconds(server: Server) -> float:
    return server.metrics().get("sglang:aircache_seconds_total", 0.0)


def serve(
    results: Results,
    batches: list[int],
    visual: list[int],
    retentions: list[float],
    rounds: int,
) -> None:
    """All cells of both servers, `rounds` times."""

    def key(policy: str, retention: float | None, batch: int, n: int, round_: int) -> Row:
        return {
            "benchmark": "serving",
            "policy": policy,
            "retention": retention,
            "batch": batch,
            "visual_tokens": n,
            "round": round_,
        }

    with tempfile.TemporaryDirectory(prefix="aircache-bench-") as folder:
        checkpoint = make_qwen2_vl(Path(folder) / "model", **MODEL)
        for round_ in range(rounds):
            for policy in (ONLY_STOCK, "aircache"):
                settings = [None] if policy == ONLY_STOCK else retentions
                cells = [
                    (key(policy, retention, batch, n, round_), retention, batch, n)
                    for n in visual
                    for batch in batches
                    for retention in settings
                ]
                if all(results.has(cell[0]) for cell in cells):
                    continue
                print(f"starting the server: --kv-policy {policy}, round {round_ + 1}", flush=True)
                log = Path(folder) / f"{policy}.log"
                with Server(
                    checkpoint, [*FLAGS, "--kv-policy", policy], log=log, timeout=600
                ) as server:
                    for i in range(PICTURES):  # one by one into SGLang's cache of embeddings
                        server.generate(
                            PROMPT.format(pictures=PICTURE), images=[picture(i)], max_new_tokens=1
                        )
                    for retention in settings:  # first uses cost more
                        run_cell(server, 2, 1, retention)
                    for cell, retention, batch, n in cells:
                        results.measure(
                            cell,
                            lambda b=batch, n=n, r=retention, s=server: run_cell(
                                s, b, n // PICTURE_TOKENS, r
                            ),
                        )
