# SPDX-License-Identifier: Apache-2.0
"""Which part of a decode step runs in this project's Python, on a real server on this CPU.

    python -m benchmarks.step_share                    # about 3 minutes; needs py-spy on the PATH

py-spy samples the scheduler while one request of `cpu-small` decodes. A sample is ours if the
innermost Python frame outside torch is. At retention 1, which compresses nothing, that is what the
hooks, the bookkeeping and the backend's switch add to stock's step; the pool's `set_kv_buffer` and
the radix tree, which do SGLang's work in SGLang's place, are counted by themselves.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from aircache_sglang.testing import Server
from aircache_sglang.testing.checkpoints import make_qwen2_vl
from benchmarks.records import RESULTS, Results, Row
from benchmarks.throughput.measure import batch_pictures, prompt, sampling, scheduler_of, warm_up
from benchmarks.throughput.plan import PRESETS, Cell

PRESET = PRESETS["cpu-small"]
VISUAL = 1024
HERTZ = 500
PACKAGES = ("aircache_patches", "aircache_sglang", "aircache_kernels")
# What does SGLang's own work in SGLang's place.
IN_PLACE = ("engine/kv_pool.py", "runtime/kv_planes.py", "engine/radix_cache.py", "engine/tree.py")
IDLE = ("recv_requests", "maybe_sleep_on_idle")


def owner(stack: str) -> str:
    """Whose a sample is: `idle`, `stock`, `in place`, or the file of ours.

    stack: frames from the outermost, `name (file:line)`, joined by `;`.
    """
    frames = [frame.rpartition(" (") for frame in stack.split(";")]
    if any(name in IDLE for name, _, _ in frames):
        return "idle"
    for _, _, place in reversed(frames):
        file = place.rpartition(":")[0]
        if "/torch/" in file or file.startswith("<"):
            continue
        for package in PACKAGES:
            _, found, inner = file.rpartition(f"/{package}/")
            if found:
                return "in place" if inner in IN_PLACE else f"{package}/{inner}"
        return "stock"
    return "stock"


def shares(samples: Iterable[str]) -> Row:
    """Shares of the samples that are not idle, from py-spy's lines `stack count`."""
    counts: Counter[str] = Counter()
    for line in samples:
        stack, _, count = line.rpartition(" ")
        if "event_loop" in stack:
            counts[owner(stack)] += int(count)
    del counts["idle"]
    total = counts.total()
    files = {name: n / total for name, n in counts.most_common() if "/" in name}
    return {
        "samples": total,
        "ours": sum(files.values()),
        "in_place": counts["in place"] / total,
        "files": files,
    }


def measure(server: Server, retention: float, seconds: int) -> Row:
    """Sample one request after another while it decodes."""
    cell, done = Cell(retention, 1, VISUAL, 0), threading.Event()
    [urls] = batch_pictures(PRESET, cell)
    steps = [0]

    def ask() -> None:
        while not done.is_set():
            answer = server.generate(
                prompt(len(urls)), images=urls, sampling=sampling(2000, retention, gate="off")
            )
            steps[0] += len(answer["output_ids"]) - 1

    asking = threading.Thread(target=ask)
    scheduler = scheduler_of(server)
    assert scheduler is not None
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "samples"
        asking.start()
        try:
            subprocess.run(
                [
                    *("py-spy", "record", "--pid", str(scheduler.pid), "--rate", str(HERTZ)),
                    *("--duration", str(seconds), "--format", "raw", "--full-filenames"),
                    *("--nonblocking", "--output", str(out)),
                ],
                check=True,
                capture_output=True,
            )
        finally:
            done.set()
            asking.join()
        return shares(out.read_text().splitlines()) | {"steps": steps[0], "hertz": HERTZ}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_share", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--seconds", type=int, default=60, help="of sampling, for each retention")
    parser.add_argument("--file", type=Path, default=RESULTS / "step-share.jsonl")
    arguments = parser.parse_args(argv)
    if shutil.which("py-spy") is None:
        parser.error("py-spy is not on the PATH")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    arguments.file.unlink(missing_ok=True)
    results = Results(arguments.file, PRESET.about())
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_qwen2_vl(Path(folder) / "qwen2-vl", **PRESET.model)
        flags = [*PRESET.flags, "--kv-policy", "aircache"]
        with Server(checkpoint, flags, env=PRESET.env) as server:
            warm_up(server, PRESET, [1.0, 0.1])
            for retention in (1.0, 0.1):
                key = {"benchmark": "step share", "retention": retention, "visual_tokens": VISUAL}
                results.measure(key, lambda r=retention: measure(server, r, arguments.seconds))
    for row in results.rows:
        files = ", ".join(f"{name} {100 * share:.2f} %" for name, share in row["files"].items())
        print(
            f"retention {row['key']['retention']:g}: {100 * row['ours']:.2f} % of {row['samples']} "
            f"samples are ours, {100 * row['in_place']:.2f} % in SGLang's place; {files}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
