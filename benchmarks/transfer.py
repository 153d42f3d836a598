# SPDX-License-Identifier: Apache-2.0
"""A prefill and a decode server over a link of a given rate: stock SGLang and packed requests.

    python -m benchmarks.transfer                     # as root, with the extra `pd`; ten minutes

The pair of one mode after that of the other, in a network namespace whose loopback device is
throttled by a token bucket (`tc ... tbf`). *Handover* is SGLang's own time from the end of a
prefill until all of its KV has arrived (stage `prefill_transfer_kv_cache`); bytes are its count,
too. The model is the tests' tiny one, so links are scaled: each carries as many slots a second as
one of 10, 25 or 100 Gbit/s carries of Qwen2-VL-7B in 16 bits, a slot of which is 56 KiB. A prompt
is measured once it is in the prefill server's tree, so that one chunk computes the rest and all of
it is sent behind its prefill. Where a long prefill is cut into chunks, stock SGLang sends most of
it meanwhile, and what is left of the difference are the bytes.

*Held* are requests that one decode server runs at once from a pool of POOL slots.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from aircache_sglang.testing import LoadWatch, ServerError
from benchmarks.records import RESULTS, Results, Row, read
from benchmarks.report import Cells, table, write

if TYPE_CHECKING:
    from aircache_sglang.testing.pair import Pair
    from aircache_sglang.testing.prompts import Prompt

MODES = {
    "stock": ("--kv-policy", "none"),
    "retention 0.1": ("--kv-policy", "aircache", "--aircache-gate", "off"),
}
LINKS = (10, 25, 100)  # Gbit/s
VISUAL = (1024, 4096, 8192, 16384)
ROUNDS = 3
PICTURE = 32  # tokens a side
SLOT, OF_7B = 4 * 2 * 2 * 16 * 4, 56 * 1024  # bytes
POOL, HELD_VISUAL, HELD_ANSWER, ASKED = 20_480, 1024, 512, 40
PAUSE = 0.15  # seconds between two of them
FLAGS = (
    *("--device", "cpu", "--dtype", "float32", "--enable-metrics", "--sleep-on-idle"),
    # What a longer chunk of 16k tokens attends to does not fit in 24 GB.
    *("--chunked-prefill-size", "4096", "--context-length", "32768"),
    *("--mem-fraction-static", "0.3"),
)
PREFILL = ("--max-total-tokens", "65536")
# A server that prepares pictures answers no heartbeat.
PATIENT = {"SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE": "30"}
DECODE = ("--max-total-tokens", str(POOL), "--num-reserved-decode-tokens", "16")


def prompt(visual: int, seed: int = 0) -> Prompt:
    from aircache_sglang.testing.prompts import picture, user_prompt, words

    pictures = [picture(seed + i, PICTURE, PICTURE) for i in range(visual // PICTURE**2)]
    return user_prompt(f"page {visual}:", *pictures, "what is it?" + words(20, seed))


def ask(pair: Pair, of: Prompt, tokens: int) -> Any:
    from aircache_sglang.testing.prompts import ask

    answer = ask(pair, of, None, max_new_tokens=tokens, return_logprob=False, top_logprobs_num=0)
    return answer["meta_info"]


def throttle(gigabits: int | None) -> None:
    """Let the loopback device carry as many slots as that link; None takes the bucket away."""
    subprocess.run(["tc", "qdisc", "del", "dev", "lo", "root"], capture_output=True)
    if gigabits is not None:
        rate = f"{gigabits * 1000 * SLOT / OF_7B:.1f}mbit"
        bucket = ["rate", rate, "burst", "256kb", "latency", "2s"]
        subprocess.run(["tc", "qdisc", "add", "dev", "lo", "root", "tbf", *bucket], check=True)


def counters(pair: Pair) -> tuple[float, float, float]:
    """Bytes sent, seconds of handover, and how many of these were counted."""
    stage, found = "sglang:per_stage_req_latency_seconds", {"sum": 0.0, "count": 0.0}
    sent = 0.0
    for name, labels, value in pair.prefill.metric_samples():
        if name == "sglang:kv_transfer_total_mb_sum":
            sent += value * 2**20
        elif labels.get("stage") == "prefill_transfer_kv_cache":
            for part in found:
                found[part] += value if name == f"{stage}_{part}" else 0
    return sent, found["sum"], found["count"]


def handover(pair: Pair, of: Prompt) -> Row:
    """The median of ROUNDS requests, one after the other."""
    seconds, sent = [], []
    for _ in range(ROUNDS):
        before = counters(pair)
        meta = ask(pair, of, 2)
        deadline = time.monotonic() + 60
        while (after := counters(pair))[2] == before[2]:
            if time.monotonic() > deadline:
                raise TimeoutError("no transfer was counted")
            time.sleep(0.05)
        sent.append(round(after[0] - before[0]))
        seconds.append(after[1] - before[1])
    return {
        "prompt_tokens": meta["prompt_tokens"],
        "cached_tokens": meta["cached_tokens"],
        "columns": (meta.get("aircache") or {}).get("columns"),
        "bytes": statistics.median(sent),
        "slots": statistics.median(sent) / SLOT,
        "handover_seconds": statistics.median(seconds),
        "handovers": [round(one, 4) for one in seconds],
    }


def held(pair: Pair) -> Row:
    """Requests that the decode server runs at once; all ask about one picture."""
    of = prompt(HELD_VISUAL)
    length = ask(pair, of, 2)["prompt_tokens"]
    with LoadWatch(pair.decode, interval=0.05) as load, ThreadPoolExecutor(ASKED) as pool:
        started = time.perf_counter()
        # One after the other: Mooncake's TCP refuses what many scattered transfers queue at once.
        asked = []
        for _ in range(ASKED):
            asked.append(pool.submit(ask, pair, of, HELD_ANSWER))
            time.sleep(PAUSE)
        for answer in asked:
            answer.result()
        seconds = time.perf_counter() - started
    return {
        "prompt_tokens": length,
        "requests": ASKED,
        "held": load.most("num_running_reqs"),
        "tokens_per_second": round(ASKED * HELD_ANSWER / seconds, 1),
    }


def measure(results: Results, modes: Sequence[str], sizes: Sequence[int]) -> None:
    from aircache_sglang.testing.checkpoints import make_qwen2_vl
    from aircache_sglang.testing.network import own_network
    from aircache_sglang.testing.pair import Pair

    with TemporaryDirectory() as folder, own_network():
        model = make_qwen2_vl(Path(folder) / "model")
        for mode in modes:
            keys = [
                {"benchmark": "transfer", "mode": mode, "gbit": link, "visual_tokens": visual}
                for visual in sizes
                for link in LINKS
            ]
            last = {"benchmark": "held", "mode": mode, "visual_tokens": HELD_VISUAL, "pool": POOL}
            if all(map(results.has, [*keys, last])):
                continue
            servers = Pair(
                model, [*FLAGS, *MODES[mode]], prefill=PREFILL, decode=DECODE, env=PATIENT
            )
            with servers as pair:
                for visual in sizes:
                    if all(map(results.has, keys_of(keys, visual))):
                        continue
                    ask(pair, prompt(visual), 2)  # from now on it is in the tree
                    for key in keys_of(keys, visual):
                        throttle(key["gbit"])
                        results.measure(key, partial(handover, pair, prompt(visual)))
                    throttle(None)
                try:
                    results.measure(last, partial(held, pair))
                except ServerError as error:
                    said = str(error).partition("\n")[0]
                    print(f"left out: {last}: {said}", flush=True)


def keys_of(keys: Sequence[Row], visual: int) -> list[Row]:
    return [key for key in keys if key["visual_tokens"] == visual]


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """Handover and bytes beside stock's, and what a decode server holds."""
    cells = Cells(rows, "transfer")
    if cells.rows:
        yield "## From the end of a prefill until its KV has arrived\n"
        yield (
            f"Medians of {ROUNDS}; in brackets their share of stock's. Links are scaled to the "
            "model's slots, see the benchmark.\n"
        )
        lines = []
        for visual in cells.values("visual_tokens"):
            for mode in cells.values("mode"):
                found = {
                    row["key"]["gbit"]: row for row in cells.find(visual_tokens=visual, mode=mode)
                }
                stock = {
                    row["key"]["gbit"]: row
                    for row in cells.find(visual_tokens=visual, mode="stock")
                }
                first = next(iter(found.values()))
                line = [
                    f"{visual}, {mode}",
                    f"{first['slots']:.0f}",
                    f"{first['bytes'] / 2**20:.2f}",
                ]
                for link in LINKS:
                    seconds = found[link]["handover_seconds"]
                    share = seconds / stock[link]["handover_seconds"]
                    line.append(f"{1000 * seconds:.0f} ({share:.2f})")
                lines.append(line)
        head = ["visual tokens, mode", "slots", "MiB", *(f"{link} Gbit/s, ms" for link in LINKS)]
        yield table(head, lines)
    cells = Cells(rows, "held")
    if cells.rows:
        yield "## What a decode server holds\n"
        yield (
            f"{ASKED} requests at once, {HELD_VISUAL} visual tokens and an answer of "
            f"{HELD_ANSWER} tokens each, a pool of {POOL} slots.\n"
        )
        names = ("held", "tokens_per_second")
        lines = [[row["key"]["mode"], *(str(row[name]) for name in names)] for row in cells.rows]
        yield table(["mode", "held at once", "tokens a second"], lines)


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Handover against visual tokens, a panel a link."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = Cells(rows, "transfer")
    figure, axes = pyplot.subplots(1, len(LINKS), figsize=(10, 3.4), sharey=True)
    for axis, link in zip(axes, LINKS, strict=True):
        for mode, colour in zip(MODES, ("0.55", "C0"), strict=True):
            found = sorted(
                cells.find(mode=mode, gbit=link), key=lambda row: row["key"]["visual_tokens"]
            )
            axis.plot(
                [row["key"]["visual_tokens"] for row in found],
                [1000 * row["handover_seconds"] for row in found],
                **{"color": colour, "marker": "o", "label": mode},
            )
        axis.set_title(f"as {link} Gbit/s")
        axis.set_xlabel("visual tokens")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("prefill's end to KV's arrival, ms")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.transfer", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("action", nargs="?", choices=("run", "report"), default="run")
    parser.add_argument("--file", type=Path, default=RESULTS / "transfer.jsonl")
    parser.add_argument("--mode", action="append", choices=MODES, help="may be repeated")
    parser.add_argument(
        "--visual", type=int, action="append", choices=VISUAL, help="may be repeated; default: all"
    )
    parser.add_argument("--fresh", action="store_true", help="drop the rows that are there")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if arguments.action == "run":
        if arguments.fresh:
            arguments.file.unlink(missing_ok=True)
        about = {"preset": "transfer", "model": "the tests' tiny Qwen2-VL"}
        results = Results(arguments.file, about | {"flags": " ".join(FLAGS), "url": None})
        measure(results, arguments.mode or list(MODES), arguments.visual or VISUAL)
    rows = read(arguments.file)
    write(arguments.file, rows, tables(rows))
    plot(arguments.file, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
