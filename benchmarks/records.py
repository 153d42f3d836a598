# SPDX-License-Identifier: Apache-2.0
"""Result rows: one JSON object a line, each of which says where and how it was measured."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
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


def commit() -> str:
    """What the code is: HEAD, marked where a file other than a result differs from it."""
    changed = git("status", "--porcelain", "--", ".", ":(exclude)*/results/*", ":(exclude)docs")
    return git("rev-parse", "HEAD") + ("-dirty" if changed else "")


def module() -> str:
    """The module that `python -m` runs."""
    spec = sys.modules["__main__"].__spec__
    return "benchmarks" if spec is None else spec.name.removesuffix(".__main__")


def installed(distribution: str) -> str | None:
    """Its version; None where it is not installed, as on a machine for the kernels alone."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def provenance() -> Row:
    """What every row carries beside its measurement."""
    return {
        "version": installed("aircache-sglang"),
        "sglang": installed("sglang"),
        "torch": version("torch"),
        "triton": installed("triton"),
        "device": cpu_name(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "git": commit(),
        "command": shlex.join(["python", "-m", module(), *sys.argv[1:]]),
    }


def path_label(path: Path) -> str:
    """What lies in this repository by its path in it, anything else by its name."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def weights(model: Path) -> str | None:
    """A digest of a local checkpoint's weights; None where they are not at hand."""
    digest = hashlib.sha256()
    files = sorted(model.glob("*.safetensors")) if model.is_dir() else []
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:12] if files else None


def model_label(model: Path) -> str:
    """Another training's weights are another model."""
    return f"{path_label(model)} ({weights(model)})"


# What measurements in one file must share; a commit may differ, and is listed.
SHARED = ("device", "threads", "sglang", "torch", "preset", "model", "flags", "url")


class Results:
    """A file that grows by the row; a row whose key it already has is not measured again.

    Args:
        about: what every row carries beside `provenance()`, which it may overrule.

    Raises:
        ValueError: the file has rows of something else than SHARED says now, or is broken.
    """

    def __init__(self, path: Path, about: Row | None = None) -> None:
        self.path = path
        self._provenance = provenance() | (about or {})
        self.rows = read(path) if path.exists() else []
        for row in self.rows:
            self._check(row)
        if path.exists():
            cut_unfinished_line(path)
        self._known = {identity(row["key"]) for row in self.rows}

    def _check(self, row: Row) -> None:
        for name in SHARED:
            now = self._provenance.get(name)
            # Rows from before a field was kept: only `url` was ever anything but what it is here.
            before = row.get(name, None if name == "url" else now)
            if before != now:
                raise ValueError(
                    f"{self.path} has rows of {name} {before or 'none'}, this run's is "
                    f"{now or 'none'}: --fresh drops them, --file names another file"
                )

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
        self.add(key, run() | {"load": busy})
        print(f"{time.monotonic() - started:5.1f} s  {label}", flush=True)

    def add(self, key: Row, row: Row) -> None:
        """Append a row, on disk when this returns; nothing if `key` is there."""
        if self.has(key):
            return
        row = {
            "key": key,
            **row,
            **self._provenance,
            "time": time.strftime("%FT%TZ", time.gmtime()),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        self._known.add(identity(key))


def identity(key: Row) -> str:
    return json.dumps(key, sort_keys=True)


def stored(path: Path) -> Path:
    """Where the rows of `path` are: there, or packed beside it, as `gzip -9n` leaves them."""
    packed = path.with_name(path.name + ".gz")
    return packed if packed.is_file() and not path.exists() else path


def unpack(path: Path) -> None:
    """Have a file that can be appended to in place of its packed form. Raises ValueError."""
    packed = stored(path)
    if packed == path:
        return
    with packed.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another run may have begun on the same file
        if not path.exists():
            partial = path.with_name(path.name + ".partial")
            partial.write_bytes(_content(packed))
            partial.rename(path)
            packed.unlink()


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be unpacked: {error}") from None


def read(path: Path) -> list[Row]:
    """The objects of a file, `stored`; what follows the last line's end is half a row, and is none.

    Raises ValueError for any other line that is not JSON.
    """
    rows = []
    for number, line in enumerate(_content(stored(path)).split(b"\n")[:-1], start=1):
        try:
            rows.extend([json.loads(line)] if line.strip() else [])
        except ValueError:
            raise ValueError(f"line {number} of {path} is not JSON") from None
    return rows


def cut_unfinished_line(path: Path) -> None:
    """A run that was killed may have left half a row at the end, which the next would continue."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
