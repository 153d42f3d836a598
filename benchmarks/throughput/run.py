# SPDX-License-Identifier: Apache-2.0
"""Start the servers, or take running ones, and measure the cells of a preset."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import requests
import torch

from aircache_sglang.testing import Client, Server, ServerError
from aircache_sglang.testing.checkpoints import make_qwen2_vl, make_qwen3_5
from benchmarks.records import Results, Row, cpu_name
from benchmarks.throughput.bound import copy_bandwidth, kv_bytes, read_config, weight_bytes
from benchmarks.throughput.measure import run_cell, run_gate_cell, warm_up
from benchmarks.throughput.plan import (
    Cell,
    GateCell,
    Limits,
    Preset,
    does_not_fit,
    plan,
    plan_gate,
)

FAMILIES = {"qwen2-vl": make_qwen2_vl, "qwen3.5": make_qwen3_5}
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
            make = FAMILIES[self._preset.family]
            self._checkpoint = make(self._folder / self._preset.family, **self._preset.model)
        flags = [*self._preset.flags, "--kv-policy", policy]
        log = self._folder / f"{policy}.log"
        server = Server(self._checkpoint, flags, env=self._preset.env, log=log, timeout=1800)
        return self._stack.enter_context(server)

    def check_alive(self) -> None:
        """Raise ServerError with the end of its log for a server of our own that has ended."""
        for policy, server in self._running.items():
            if isinstance(server, Server) and not server.is_running():
                raise ServerError(f"the server of {policy} has ended\n{server.log_tail()}")


class Remote(Servers):
    """Servers that already run; clients by policy."""

    def __init__(self, preset: Preset, clients: Mapping[str, Client]) -> None:
        super().__init__(preset, Path())
        self._clients = clients

    def _start(self, policy: str) -> Client:
        return self._clients[policy]


def connect(urls: Mapping[str, str]) -> dict[str, Client]:
    """Clients of running servers, by policy; ServerError if one cannot be measured."""
    clients = {policy: Client(url, timeout=1800) for policy, url in urls.items()}
    for policy, client in clients.items():
        try:
            info = client.info()
            info["model_path"]
        except (requests.RequestException, ValueError, KeyError, TypeError, ServerError):
            raise ServerError(f"no SGLang server answers at {client.url}") from None
        runs = info.get("kv_policy", "none")
        if runs != policy:
            raise ServerError(f"the server at {client.url} has --kv-policy {runs}, not {policy}")
        if client.request("GET", "/metrics").status_code != 200:
            raise ServerError(f"the server at {client.url} needs --enable-metrics")
    return clients


def about(preset: Preset, clients: Mapping[str, Client]) -> Row:
    """What rows say of the servers: all that measurements in one file must share."""
    found = preset.about() | {"url": ", ".join(client.url for client in clients.values()) or None}
    infos = [client.info() for client in clients.values()]
    if infos:
        found["model"] = " beside ".join(dict.fromkeys(info["model_path"] for info in infos))
        found["device"] = f"{infos[0].get('device')} of the server, asked from {cpu_name()}"
        found |= {"sglang": infos[0].get("version"), "flags": None}
    elif torch.cuda.is_available():
        found["device"] = f"{torch.cuda.get_device_name()}, {cpu_name()}"
    elif preset.needs_gpu:
        raise ValueError(f"preset {preset.name} needs an NVIDIA GPU, or --url")
    return found


@contextlib.contextmanager
def servers(preset: Preset, clients: Mapping[str, Client]) -> Iterator[Servers]:
    """Those of `clients`, or ones of our own."""
    if clients:
        with Remote(preset, clients) as found:
            yield found
        return
    with tempfile.TemporaryDirectory(prefix="aircache-throughput-") as folder:
        with Servers(preset, Path(folder)) as found:
            try:
                yield found
            except (requests.RequestException, psutil.Error):
                found.check_alive()
                raise


class Attempts:
    """Measurements that are tried three times: one odd cell does not end a run of many.

    A server that has ended does, and so does whatever is not the server's own error.
    """

    def __init__(self, results: Results, running: Servers) -> None:
        self._results, self._running = results, running
        self._failed: list[str] = []

    def measure(self, key: Row, run: Callable[[], Row]) -> bool:
        """Whether the row is there now."""
        for what in ("once more", "once more", "left out"):
            try:
                self._results.measure(key, run)
                return True
            except ServerError as error:
                self._running.check_alive()
                said = str(error).partition("\n")[0]
                print(f"{what}: {said}", flush=True)
        self._failed.append(said)
        return False

    def check(self) -> None:
        """Raise ServerError if something failed each time."""
        if self._failed:
            raise ServerError(
                f"{len(self._failed)} measurements failed each time; the first: {self._failed[0]}"
            )


def sweep(results: Results, preset: Preset, clients: Mapping[str, Client]) -> None:
    """Measure what `results` does not have yet; a cell that does not fit is named and left out."""
    stock = not clients or "none" in clients
    cells: list[Cell | GateCell] = list(plan(preset, stock=stock))
    if stock:
        cells += plan_gate(preset)
    if not clients:
        results.measure({"benchmark": "bandwidth"}, copy_bandwidth)
    with servers(preset, clients) as running:
        attempts = Attempts(results, running)
        for place, planned in enumerate(cells, start=1):
            if results.has(planned.key()):
                continue
            cell = planned.cell() if isinstance(planned, GateCell) else planned
            client = running.of(cell)
            reason = does_not_fit(preset, cell, Limits.of(client.info()))
            if reason is not None:
                # The reason is in the key: another server may have another one.
                key = {**dataclasses.asdict(cell), "benchmark": "left out", "reason": reason}
                del key["round"]
                if not results.has(key):
                    print(f"left out: {reason}", flush=True)
                results.add(key, {})
                continue
            print(f"[{place}/{len(cells)}] ", end="")
            attempts.measure(planned.key(), functools.partial(measured, client, preset, planned))
        attempts.check()


def measured(client: Client, preset: Preset, cell: Cell | GateCell) -> Row:
    """The row of a cell, with what the report needs to know of the server."""
    if isinstance(cell, GateCell):
        return run_gate_cell(client, preset, cell) | shapes_of(client.info())
    return run_cell(client, preset, cell) | shapes_of(client.info())


def shapes_of(info: dict) -> dict[str, int | str | None]:
    """What the bound needs to know of a server, from its arguments and its checkpoint if local."""
    config = read_config(info["model_path"])
    if config is None or "linear_attention" in config.get("layer_types", ()):
        # Of recurrent layers the states are read, and weights of another shape.
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
