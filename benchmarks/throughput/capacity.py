# SPDX-License-Identifier: Apache-2.0
"""How many requests a fixed pool holds, and the highest rate at which it serves them in time.

The client is SGLang's own `sglang.benchmark.serving` with its image data set: open-loop Poisson
arrivals, every picture a new one. Ours is what watches the scheduler meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aircache_sglang.testing import Client, LoadWatch, ServerError
from benchmarks.records import Results, Row, identity
from benchmarks.report import Cells, goal, setting, table
from benchmarks.throughput.plan import COMMON, INSTRUCTION_TOKENS, Cell, Preset
from benchmarks.throughput.run import Attempts, servers

SETTINGS = (None, 0.5, 0.1)
BURST = math.inf
HELD = 5.0  # the goal: times the requests that stock SGLang holds
PRESSURE = 0.95  # the goal: share of what `prefill` holds at the same retention
PIXELS_PER_TOKEN = 28


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """What the clients ask for, and what counts as in time.

    pictures x picture_tokens visual tokens a request; prompts: requests that come at once; paced:
    those of a trial at a rate, enough for a queue that only grows to break the limit on ttft.
    rate: the first one tried, in requests a second. Limits on the 99th percentile, in seconds:
    ttft of the time to the first token, tpot of the time per output token.
    """

    pictures: int = 32
    picture_tokens: int = 256
    tokens: int = 128
    prompts: int = 20
    paced: int = 40
    rate: float = 0.25
    ttft: float = 20.0
    tpot: float = 1.0

    def requests(self, rate: float) -> int:
        """How many a trial at this rate sends."""
        return self.prompts if rate == BURST else self.paced

    def in_time(self, row: Row) -> bool:
        """Whether a trial kept both limits."""
        return bool(row["p99_ttft_seconds"] <= self.ttft and row["p99_tpot_seconds"] <= self.tpot)

    @property
    def visual_tokens(self) -> int:
        return self.pictures * self.picture_tokens


# A request is a few hundred kilobytes of KV here: what counts is that they are tokens of a pool,
# and a small model prefills 8192 of them in seconds on a CPU. Pictures and chunks are small: there
# a chunk costs the vision tower the square of all its patches.
PRESET = Preset(
    "capacity",
    {"layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "vision_depth": 1},
    (
        *("--device", "cpu", "--dtype", "float32", "--max-total-tokens", "28672"),
        *("--context-length", "16384", "--chunked-prefill-size", "512"),
        *("--max-running-requests", "64", *COMMON),
    ),
    batches=(1,),
    visual=(1024,),
    tokens=8,
    rounds=1,
    side_by_side=False,
    retentions=(0.5, 0.1),
)


def of_request(retention: float, when: str) -> Row:
    """A request's override; packing at the end of the prefill is the default."""
    return {"retention": retention} | ({} if when == "prefill" else {"when": when})


def arguments(
    client: Client, load: Load, model: str, retention: float | None, prompts: int, when: str
) -> list[str]:
    """Of SGLang's client, but for rate, seed and output."""
    side = PIXELS_PER_TOKEN * math.isqrt(load.picture_tokens)
    overrides = {} if retention is None else {"aircache": of_request(retention, when)}
    return [
        *("--backend", "sglang-oai-chat", "--base-url", client.url, "--model", model),
        *("--dataset-name", "image", "--image-count", str(load.pictures)),
        *("--image-resolution", f"{side}x{side}", "--num-prompts", str(prompts)),
        *("--random-input-len", str(INSTRUCTION_TOKENS), "--random-range-ratio", "1"),
        *("--random-output-len", str(load.tokens), "--warmup-requests", "0", "--disable-tqdm"),
        "--output-details",
        *("--extra-request-body", json.dumps({"custom_params": overrides})),
    ]


def trial(
    client: Client,
    load: Load,
    model: str,
    retention: float | None,
    rate: float,
    seed: int,
    when: str = "prefill",
) -> Row:
    """One run of the client.

    held, queued: the most requests that ran and that waited at once, by the scheduler's count;
    retracted: requests that lost their slots to others; compressed: requests that were, by the
    server's own count.
    Raises ServerError if the client fails or a request does, and if a request at a retention was
    not compressed or one without was. Under pressure requests are compressed as the pool needs it.
    """
    client.flush_cache()
    before, prompts = counters(client), load.requests(rate)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.jsonl"
        command = [sys.executable, "-m", "sglang.benchmark.serving"]
        command += arguments(client, load, model, retention, prompts, when)
        command += ["--request-rate", str(rate), "--seed", str(seed), "--output-file", str(out)]
        with LoadWatch(client) as watch:
            done = subprocess.run(
                command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
            )
        if done.returncode or not out.exists():
            said = (done.stdout + done.stderr).strip().splitlines() or ["it said nothing"]
            log = "\n".join(said[-20:])
            raise ServerError(f"sglang.benchmark.serving ended with {done.returncode}\n{log}")
        found: dict[str, Any] = json.loads(out.read_text().splitlines()[-1])
    if found["completed"] != prompts:
        said = "; ".join({error.strip().splitlines()[-1] for error in found["errors"] if error})
        raise ServerError(f"{found['completed']} of {prompts} requests were answered: {said}")
    after = counters(client)
    compressed = after["compressed"] - before["compressed"]
    # A request that was retracted is compressed again.
    least = prompts if when == "prefill" else 0
    if compressed < least if retention is not None else compressed > 0:
        raise ServerError(
            f"{compressed} of {prompts} requests at retention {retention} were compressed"
        )
    return {
        "prompts": prompts,
        "tokens": load.tokens,
        "pool": client.info()["max_total_num_tokens"],
        "held": watch.most("num_running_reqs"),
        "queued": watch.most("num_waiting_reqs"),
        "retracted": after["retracted"] - before["retracted"],
        "compressed": compressed,
        "p99_ttft_seconds": found["p99_ttft_ms"] / 1000,
        "p99_tpot_seconds": found["p99_tpot_ms"] / 1000,
        "requests_per_second": found["request_throughput"],
        "output_tokens_per_second": found["output_throughput"],
    }


def counters(client: Client) -> dict[str, int]:
    """Requests retracted and compressed since the server's start."""
    metrics = client.metrics()
    return {
        "retracted": int(metrics.get("sglang:num_retracted_requests_total", 0)),
        "compressed": int(metrics.get("sglang:aircache_requests_compressed_total", 0)),
    }


def seed_of(key: Row) -> int:
    """Of a trial's pictures: no two trials share one, whichever run measures them."""
    return zlib.crc32(identity(key).encode())


def highest_rate(in_time: Callable[[float], bool], first: float) -> float | None:
    """The highest rate that is served in time, within a quarter; None if not even `first` / 8 is.

    Doubles or halves from `first`, then divides the last interval in two, in proportion, twice.
    """
    low, high = 0.0, math.inf
    rate = first
    while math.isinf(high) or not low:
        if in_time(rate):
            low, rate = rate, 2 * rate
        else:
            high, rate = rate, rate / 2
        if rate < first / 8:
            return None
        if rate > 64 * first:
            return low
    for _ in range(2):
        rate = math.sqrt(low * high)
        if in_time(rate):
            low = rate
        else:
            high = rate
    return low


class Unknown(Exception):
    """A trial of the search for the highest rate failed."""


def measure(
    results: Results, preset: Preset, load: Load, clients: Mapping[str, Client], when: str
) -> None:
    """For stock SGLang and each retention a burst, then the search for the rate, some 5 trials.

    All bursts come first: they say how many requests are held, and take the least time. With
    `when` pressure the retentions are measured a second time, packed when the pool needs it.
    """
    with servers(preset, clients) as running:
        cells = {r: Cell(r, 1, preset.picture_tokens, 0) for r in SETTINGS}
        kept = [r for r, cell in cells.items() if not clients or cell.policy in clients]
        asked = [(r, "prefill") for r in kept]
        asked += [(r, when) for r in kept if r is not None and when != "prefill"]
        attempts, trials = Attempts(results, running), itertools.count(1)

        def run(retention: float | None, packed: str, rate: float) -> Row | None:
            key = {
                "benchmark": "capacity",
                "retention": retention,
                "visual_tokens": load.visual_tokens,
                "rate": "burst" if rate == BURST else round(rate, 4),
                **({} if packed == "prefill" else {"when": packed}),
            }

            def measured() -> Row:
                client = running.of(cells[retention])
                model = str(client.info()["model_path"])
                return trial(client, load, model, retention, rate, seed_of(key), packed)

            # A burst and about four rates for each.
            print(f"[{next(trials)} of about {5 * len(asked)}] ", end="", flush=True)
            if not attempts.measure(key, measured):
                return None
            return next(row for row in results.rows if row["key"] == key)

        def in_time(retention: float | None, packed: str, rate: float) -> bool:
            row = run(retention, packed, rate)
            if row is None:
                raise Unknown
            return load.in_time(row)

        for retention, packed in asked:
            run(retention, packed, BURST)
        for retention, packed in asked:
            # Without the answer to one rate it is not known which to try next.
            with contextlib.suppress(Unknown):
                highest_rate(functools.partial(in_time, retention, packed), load.rate)
        attempts.check()


def capacity_table(rows: Sequence[Row], load: Load | None = None) -> Iterator[str]:
    """Requests held and the highest rate served in time, by setting."""
    cells = Cells(rows, "capacity")
    if not cells.rows:
        return
    load = load or Load()
    lines: list[list[str]] = []
    held: dict[tuple[float | None, str], int] = {}
    highest: dict[tuple[float | None, str], float] = {}
    for n in cells.values("visual_tokens"):
        for retention, when in dict.fromkeys(map(setting_of, cells.rows)):
            found = [
                row
                for row in cells.find(visual_tokens=n, retention=retention)
                if setting_of(row) == (retention, when)
            ]
            burst = next((row for row in found if row["key"]["rate"] == "burst"), None)
            paced = [row for row in found if row["key"]["rate"] != "burst"]
            best = max(
                filter(load.in_time, paced), key=lambda row: row["key"]["rate"], default=None
            )
            if burst is None:
                continue
            held[retention, when] = burst["held"]
            under = " under pressure" if when == "pressure" else ""
            line = [f"{n}, {setting(retention)}{under}", str(burst["pool"]), str(burst["held"])]
            line += [str(burst["queued"]), f"{burst['output_tokens_per_second']:.0f}"]
            line += [str(sum(row["retracted"] for row in found))]
            if best is None:
                line += ["-"] * 5
            else:
                highest[retention, when] = best["key"]["rate"]
                line += [f"{best['key']['rate']:.3g}", f"{best['requests_per_second']:.2f}"]
                line += [str(best["held"])]
                line += [f"{best['p99_ttft_seconds']:.1f}", f"{best['p99_tpot_seconds']:.2f}"]
            lines.append(line)
    yield "## Capacity of a fixed pool\n"
    yield (
        f"*Held* are the most requests that ran at once when {load.prompts} came at once; *rate* "
        f"is the highest at which 99 % of {load.paced} requests had their first token within "
        f"{load.ttft:g} s and a token every {load.tpot:g} s, *served* how many were answered a "
        "second from the first to the last.\n"
    )
    head = ["visual tokens, retention", "pool", "held", "queued", "tokens/s", "retracted"]
    head += ["rate, 1/s", "served, 1/s", "held at it", "p99 TTFT, s", "p99 TPOT, s"]
    yield table(head, lines)
    if held.get((None, "prefill")) and held.get((0.1, "prefill")):
        ratio = held[0.1, "prefill"] / held[None, "prefill"]
        yield goal(ratio >= HELD, f"retention 0.1 holds {HELD:g} times stock's ({ratio:.1f})")
    for name, of in (("holds", held), ("serves in time, at its highest rate,", highest)):
        shares = {
            retention: value / of[retention, "prefill"]
            for (retention, when), value in of.items()
            if when == "pressure" and of.get((retention, "prefill"))
        }
        if shares:
            said = ", ".join(f"{share:.2f} at {setting(r)}" for r, share in shares.items())
            met = min(shares.values()) >= PRESSURE
            yield goal(met, f"pressure {name} at least {PRESSURE:g} of what prefill does ({said})")


def setting_of(row: Row) -> tuple[float | None, str]:
    """(retention, when it is packed to it) of a row."""
    return row["key"]["retention"], row["key"].get("when", "prefill")
