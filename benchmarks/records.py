# SPDX-License-Identifier: Apache-2.0
"""Result rows: one JSON object a line, each of which says where and how it was measured."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]


def cpu_name() -> str:
    """The processor's name and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def module() -> str:
    """The module that `python -m` runs."""
    spec = sys.modules["__main__"].__spec__
    return "benchmarks" if spec is None else spec.name.removesuffix(".__main__")


def provenance() -> Row:
    """What every row carries beside its measurement."""
    return {
        "version": version("aircache-sglang"),
        "sglang": version("sglang"),
        "torch": version("torch"),
        "device": cpu_name(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "git": git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else ""),
        "command": shlex.join(["python", "-m", module(), *sys.argv[1:]]),
    }


class Results:
    """A file that grows by the row; a row whose key it already has is not measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = read(path) if path.exists() else []
        self._known = {identity(row["key"]) for row in self.rows}
        self._provenance = provenance()

    def has(self, key: Row) -> bool:
        return identity(key) in self._known

    def measure(self, key: Row, run: Callable[[], Row]) -> None:
        """Append `run()` under `key` unless it is there; shows what it does."""
        label = ", ".join(f"{name} {value}" for name, value in key.items())
        if self.has(key):
            print(f"have  {label}", flush=True)
            return
        started = time.monotonic()
        busy = os.getloadavg()[0]
        row = {"key": key, **run()}
        row |= {**self._provenance, "time": time.strftime("%FT%TZ", time.gmtime()), "load": busy}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        self._known.add(identity(key))
        print(f"{time.monotonic() - started:5.1f} s  {label}", flush=True)


def identity(key: Row) -> str:
    return json.dumps(key, sort_keys=True)


def read(path: Path) -> list[Row]:
    """The rows of a file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
