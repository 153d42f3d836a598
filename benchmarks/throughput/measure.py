# SPDX-License-Identifier: Apache-2.0
"""One cell: a batch of requests on an empty radix tree, as its client and the scheduler see it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import statistics
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from aircache_sglang.testing import Client, LoadWatch, Server, ServerError, png_data_url
from aircache_sglang.testing.prompts import words
from benchmarks.records import Row
from benchmarks.throughput.plan import GATE_RETENTION, INSTRUCTION_TOKENS, Cell, GateCell, Preset

TOKEN_PIXELS = 28
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
# Tokens of the instruction beside the question: the end of the picture and of the turn, and the
# beginning of the next, whose "assistant" the small vocabulary spells out.
TEMPLATE_TOKENS = 14


def prompt(pictures: int) -> str:
    """A prompt whose instruction has INSTRUCTION_TOKENS tokens in the small vocabulary."""
    question = words(INSTRUCTION_TOKENS - TEMPLATE_TOKENS)
    return f"<|im_start|>user\n{PICTURE * pictures}{question}<|im_end|>\n<|im_start|>assistant\n"


@functools.cache
def picture(seed: int, tokens: int) -> str:
    """A picture of a square number of visual tokens as a URL, quick to send and to decode."""
    side = round(tokens**0.5)
    if side * side != tokens:
        raise ValueError(f"visual tokens of a picture must be a square number, got {tokens}")
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    size = (TOKEN_PIXELS * side, TOKEN_PIXELS * side)
    return png_data_url(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST))


def batch_pictures(preset: Preset, cell: Cell) -> list[list[str]]:
    """For each request its pictures, another one first.

    So no request finds another's prompt in the radix tree, while SGLang has all the pictures'
    embeddings: the vision tower would drown what is to be measured.
    """
    count = cell.visual_tokens // preset.picture_tokens
    return [
        [picture((request + i) % preset.pictures, preset.picture_tokens) for i in range(count)]
        for request in range(cell.batch)
    ]


def warm_up(client: Client, preset: Preset, settings: Collection[float | None]) -> None:
    """Bring all pictures into SGLang's cache of embeddings, and use each setting once.

    Raises ServerError for a model without images, or whose pictures have other tokens.
    """
    for seed in range(preset.pictures):
        url = picture(seed, preset.picture_tokens)
        answer = client.generate(prompt(1), images=[url], max_new_tokens=1)
        found = answer["meta_info"]["prompt_tokens"]
        if not 0 <= found - preset.picture_tokens < 512:
            raise ServerError(
                f"a prompt with a picture of {preset.picture_tokens} visual tokens had {found} "
                "tokens: the model takes no images, or is neither Qwen2-VL nor Qwen2.5-VL"
            )
    # First uses cost more.
    for retention in settings:
        client.post("/generate", batch(preset, Cell(retention, 2, preset.picture_tokens, 0)))


def batch(preset: Preset, cell: Cell) -> dict[str, Any]:
    """The request of a cell."""
    urls = batch_pictures(preset, cell)
    retention, overrides = cell.retention, {}
    if preset.when == "pressure" and retention == 1.0:
        retention, overrides = GATE_RETENTION, {"when": preset.when}
    return {
        "text": [prompt(len(urls[0]))] * cell.batch,
        "image_data": urls,
        "sampling_params": sampling(preset.tokens, retention, **overrides),
    }


def run_cell(client: Client, preset: Preset, cell: Cell) -> Row:
    """Measure one batch.

    prefill_seconds: from the first forward to the last request's first token, as the scheduler
        counts it, the compression pass included; pass_seconds: the pass alone.
    decode_seconds: from the last request's first token to its last, `tokens` - 1 steps.
    token_seconds: the median time between two tokens of a request while all decode.
    token_cpu_seconds: CPU time of the scheduler process a decode step, which other work on the
        machine disturbs less; only of a server of our own.
    batch_cpu_seconds: the same of the whole batch, whenever its client heard of a token.
    kv_peak, kv_decode: the pool's count at its highest, and its median while all decode.
    outputs: of all requests, as a hash; request_outputs: of each.
    Raises ServerError if a request was not compressed as the cell says and the gate allows, if the
    requests did not decode together, and if too little was seen of it.
    """
    client.flush_cache()
    body = batch(preset, cell)
    scheduler = scheduler_of(client)
    spent = pass_seconds(client)
    arrivals: list[list[tuple[float, int]]] = [[] for _ in range(cell.batch)]
    last: list[dict[str, Any]] = [{} for _ in range(cell.batch)]
    cpu: list[float] = []
    before = None if scheduler is None else cpu_seconds(scheduler)
    with LoadWatch(client) as watch:
        for chunk in client.stream("/generate", body):
            index = chunk.get("index", 0)
            count = chunk["meta_info"]["completion_tokens"]
            arrivals[index].append((time.perf_counter(), count))
            last[index] = chunk
            if scheduler is not None and not cpu and all(arrivals):
                cpu.append(cpu_seconds(scheduler))
    if scheduler is not None:
        cpu.append(cpu_seconds(scheduler))
    slowest = max(arrivals, key=lambda times: times[0][0])
    (start, first), (end, count) = slowest[0], slowest[-1]
    until = min(times[-1][0] for times in arrivals)
    gaps = [
        (t1 - t0) / (n1 - n0)
        for times in arrivals
        for (t0, n0), (t1, n1) in itertools.pairwise(times)
        if t0 >= start and t1 <= until and n1 > n0
    ]
    if not gaps:
        raise ServerError(f"{preset.tokens} tokens are too few for a batch to decode together")
    if 2 * (count - first) < preset.tokens:
        # What comes in one lump says nothing of the time between two.
        raise ServerError(
            f"the client saw {count - first} of {preset.tokens} tokens come, too late"
        )
    metas = [chunk["meta_info"] for chunk in last]
    check_compression(cell, metas)
    report = metas[0].get("aircache")
    in_use = [load["num_used_tokens"] for load in watch.loads(start, until)]
    if not in_use:
        raise ServerError("the pool was not read while all decoded: the client came too late")
    prefilled = max(meta["prefill_finished_time"] for meta in metas)
    return {
        "prompt_tokens": metas[0]["prompt_tokens"],
        "tokens": preset.tokens,
        "prefill_seconds": prefilled - min(meta["forward_entry_time"] for meta in metas),
        "pass_seconds": pass_seconds(client) - spent,
        "decode_seconds": (end - start) * (preset.tokens - 1) / (count - first),
        "token_seconds": statistics.median(gaps),
        "token_cpu_seconds": (cpu[1] - cpu[0]) / (count - first) if any(cpu) else None,
        "batch_cpu_seconds": None if before is None else cpu[-1] - before,
        "kv_peak": watch.most("num_used_tokens"),
        "kv_decode": statistics.median(in_use),
        "columns": report["columns"] or None if report else None,
        "reason": metas[0].get("aircache_reason"),
        "outputs": digest([chunk["output_ids"] for chunk in last]),
        "request_outputs": [digest(chunk["output_ids"]) for chunk in last],
    }


def sampling(tokens: int, retention: float | None, **overrides: Any) -> dict[str, Any]:
    """Greedy, to the last token; retention None asks for nothing of ours."""
    params: dict[str, Any] = {"max_new_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
    if retention is not None:
        params["custom_params"] = {"aircache": {"retention": retention} | overrides}
    return params


def run_gate_cell(client: Client, preset: Preset, gate: GateCell) -> Row:
    """Measure one request.

    total_seconds: from its first forward to its last token, as the server counts it.
    Raises ServerError if it was not compressed as the gate says.
    """
    client.flush_cache()
    cell = gate.cell()
    overrides = {} if gate.gate is None else {"gate": gate.gate}
    [urls] = batch_pictures(preset, cell)
    answer = client.generate(
        prompt(len(urls)),
        images=urls,
        sampling=sampling(gate.tokens, gate.retention, **overrides),
    )
    meta = answer["meta_info"]
    check_compression(cell, [meta])
    reason = meta.get("aircache_reason")
    if gate.gate == "off" and reason is not None:
        raise ServerError(f"a request was left alone ({reason}) although its gate is off")
    return {
        "total_seconds": meta["request_finished_ts"] - meta["forward_entry_time"],
        "columns": meta["aircache"]["columns"] if meta.get("aircache") else None,
        "reason": reason,
        "outputs": digest(answer["output_ids"]),
    }


def digest(outputs: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(outputs).encode()).hexdigest()[:16]


def check_compression(cell: Cell, metas: list[dict[str, Any]]) -> None:
    """Raise ServerError for answers that a cell's name would belie."""
    wanted = cell.retention is not None and cell.retention < 1
    for meta in metas:
        report, reason = meta.get("aircache"), meta.get("aircache_reason")
        compressed = report is not None and report["packed_at"] is not None
        if wanted and "aircache" not in meta:
            raise ServerError("the server runs without --kv-policy aircache")
        if compressed != wanted and not (wanted and reason == "no_gain"):
            raise ServerError(
                f"a request at retention {cell.retention} was "
                f"{'compressed' if compressed else f'left alone ({reason})'}"
            )


def scheduler_of(client: Client) -> psutil.Process | None:
    """The process that runs the model; None for a server that is not ours."""
    if not isinstance(client, Server):
        return None
    for pid in client.pids():
        with contextlib.suppress(psutil.NoSuchProcess):  # other children come and go
            process = psutil.Process(pid)
            if any("sglang::scheduler" in part for part in process.cmdline()):
                return process
    raise ServerError("the server has no scheduler process")


def cpu_seconds(process: psutil.Process) -> float:
    """CPU seconds of all threads so far, from the kernel's nanosecond counters; 0 without them."""
    total = 0
    for task in Path(f"/proc/{process.pid}/task").glob("*/schedstat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread has ended
            total += int(task.read_text().split()[0])
    return total / 1e9


def pass_seconds(client: Client) -> float:
    return client.metrics().get("sglang:aircache_seconds_total", 0.0)
