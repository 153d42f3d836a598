# SPDX-License-Identifier: Apache-2.0
"""Start the servers, or take running ones, and measure the cells of a preset."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import requests

from benchmarks.records import Results
from benchmarks.throughput.bound import copy_bandwidth, kv_bytes, read_config, weight_bytes
from benchmarks.throughput.measure import run_cell, warm_up
from benchmarks.throughput.plan import Cell, Preset, does_not_fit, plan
from tests.factories import make_qwen2_vl
from tests.support import Client, Server, ServerError

ITEM_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Servers:
    """The clients of both policies; servers of our own start when they are first asked for."""

    def __init__(self, preset: Preset, folder: Path) -> None:
        self._preset = preset
        self._folder = folder
        self._checkpoint: Path | None = None
        self._running: dict[str, Client] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def of(self, cell: Cell) -> Client:
        """The server of a cell, warm; ends the other one unless they run side by side."""
        if cell.policy not in self._running:
            if not self._preset.side_by_side:
                self._stack.close()
                self._running.clear()
            print(f"starting the server: --kv-policy {cell.policy}", flush=True)
            client = self._start(cell.policy)
            settings = [None] if cell.retention is None else list(self._preset.retentions)
            warm_up(client, self._preset, settings)
            self._running[cell.policy] = client
        return self._running[cell.policy]

    def _start(self, policy: str) -> Client:
        if self._checkpoint is None:
            self._checkpoint = make_qwen2_vl(self._folder / "qwen2-vl", **self._preset.model)
        flags = [*self._preset.flags, "--kv-policy", policy]
        log = self._folder / f"{policy}.log"
        server = Server(self._checkpoint, flags, env=self._preset.env, log=log, timeout=1800)
        return self._stack.enter_context(server)


class Remote(Servers):
    """Servers that already run; `urls` by policy."""

    def __init__(self, preset: Preset, urls: dict[str, str]) -> None:
        super().__init__(preset, Path())
        self._urls = urls

    def _start(self, policy: str) -> Client:
        client = Client(self._urls[policy], timeout=1800)
        try:
            client.get("/v1/models")
        except (requests.RequestException, ValueError, ServerError):
            raise ServerError(f"no SGLang server answers at {client.url}") from None
        if client.request("GET", "/metrics").status_code != 200:
            raise ServerError(f"the server at {client.url} needs --enable-metrics")
        return client


@contextlib.contextmanager
def servers(preset: Preset, urls: dict[str, str]) -> Iterator[Servers]:
    """Those of `urls`, or ones of our own."""
    if urls:
        with Remote(preset, urls) as found:
            yield found
        return
    with tempfile.TemporaryDirectory(prefix="aircache-throughput-") as folder:
        with Servers(preset, Path(folder)) as found:
            yield found


def sweep(results: Results, preset: Preset, urls: dict[str, str]) -> None:
    """Measure what `results` does not have yet; a cell that does not fit is named and left out."""
    cells = plan(preset, stock=not urls or "none" in urls)
    missing = [cell for cell in cells if not results.has(cell.key())]
    if not urls:
        results.measure({"benchmark": "bandwidth"}, copy_bandwidth)
    said: set[str] = set()
    with servers(preset, urls) as running:
        for place, cell in enumerate(cells, start=1):
            if cell not in missing:
                continue
            client = running.of(cell)
            info = client.info()
            reason = does_not_fit(
                preset, cell, info["max_total_num_tokens"], info["context_length"] or 2**31
            )
            if reason is not None:
                if reason not in said:
                    print(f"left out: {reason}", flush=True)
                said.add(reason)
                continue
            shapes = shapes_of(info)
            print(f"[{place}/{len(cells)}] ", end="")
            results.measure(
                cell.key(), lambda c=client, cell=cell, s=shapes: run_cell(c, preset, cell) | s
            )


def shapes_of(info: dict) -> dict[str, int | str | None]:
    """What the bound needs to know of a server, from its arguments and its checkpoint if local."""
    config = read_config(info["model_path"])
    if config is None:
        return {"dtype": info["dtype"], "kv_bytes": None, "weight_bytes": None}
    stored = config.get("torch_dtype") or config.get("dtype") or "float32"
    # SGLang's auto serves float32 weights in half precision.
    served = "float16" if stored == "float32" else stored
    dtype = served if info["dtype"] == "auto" else info["dtype"]
    size = ITEM_SIZES[dtype]
    return {
        "dtype": dtype,
        "kv_bytes": kv_bytes(config, size),
        "weight_bytes": weight_bytes(config, size),
    }
