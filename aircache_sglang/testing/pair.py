# SPDX-License-Identifier: Apache-2.0
"""A prefill and a decode server as one client sees them, and the packages that they need."""

from __future__ import annotations

import ctypes.util
import fcntl
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import requests

from aircache_sglang.testing.server import Client, Server, free_port

ROOT = Path(__file__).parents[2]
ENV = {
    "MC_FORCE_TCP": "1",
    "MOONCAKE_PROTOCOL": "tcp",
    "SGLANG_HOST_IP": "127.0.0.1",
    "HOST_IP": "127.0.0.1",
}


class Unavailable(RuntimeError):
    """What a pair of servers needs is not here, and cannot be brought."""


def packages() -> Path:
    """The folder of the extra `pd`, installed at the first call, beside .ci/env's base."""
    _have_libibverbs()
    with (ROOT / "pyproject.toml").open("rb") as file:
        wanted = tomllib.load(file)["project"]["optional-dependencies"]["pd"]
    key = json.dumps([sys.version_info[:2], wanted]).encode()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    envs = Path(os.environ.get("AIRCACHE_ENV_DIR") or Path(cache) / "aircache-sglang")
    envs.mkdir(parents=True, exist_ok=True)
    folder = envs / f"pd-{hashlib.sha256(key).hexdigest()[:12]}"
    with (envs / "pd.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / ".complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
            _run([*pip, "--quiet", "--no-deps", "--target", str(folder), *wanted])
            (folder / ".complete").touch()
    return folder


def _have_libibverbs() -> None:
    """Mooncake's engine is linked against it, also where it speaks TCP."""
    if ctypes.util.find_library("ibverbs") is None:
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            raise Unavailable("libibverbs is missing (Debian: apt-get install libibverbs1)")
        _run(["apt-get", "install", "-y", "--no-install-recommends", "libibverbs1"])


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines() or ["nothing"]
        raise Unavailable(f"{command[0]} could not install what a pair needs: {said[-1]}")


class Pair(Client):
    """Two servers; what is asked of `/generate` goes to both, and the decode server's answer back.

    Args:
        model: checkpoint folder. flags: of both servers.
        prefill, decode: further flags of one of them.
        server: the class that starts them.
        env: as of `Server`.
    """

    def __init__(
        self,
        model: str | Path,
        flags: Sequence[str] = (),
        *,
        prefill: Sequence[str] = (),
        decode: Sequence[str] = (),
        env: Mapping[str, str | None] | None = None,
        server: type[Server] = Server,
    ) -> None:
        self.bootstrap_port = free_port()
        env = {**ENV, "PYTHONPATH": f"{packages()}", **(env or {})}
        common = [
            *flags,
            *("--disaggregation-transfer-backend", "mooncake_tcp"),
            *("--disaggregation-bootstrap-port", str(self.bootstrap_port)),
        ]
        self.prefill = server(
            model, [*common, "--disaggregation-mode", "prefill", *prefill], env=env
        )
        self.decode = server(model, [*common, "--disaggregation-mode", "decode", *decode], env=env)
        super().__init__(self.decode.url, model=str(model))

    def __enter__(self) -> Pair:
        try:
            self.prefill.start()
            self.decode.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.decode.terminate()
        self.prefill.terminate()

    def at(self) -> dict[str, Any]:
        """What a router adds to a request: where the servers meet."""
        return {
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": self.bootstrap_port,
            "bootstrap_room": random.getrandbits(62),
        }

    def request(self, method: str, path: str, json: Any = None) -> requests.Response:
        """As a router does: to both servers at once where a prompt is in it."""
        if path != "/generate":
            return self.decode.request(method, path, json)
        body = {**json, **self.at()}
        thread = threading.Thread(target=self._prefill, args=(body,))
        thread.start()
        answer = self.decode.request("POST", "/generate", body)
        thread.join()
        return answer

    def _prefill(self, body: Any) -> None:
        try:
            self.prefill.request("POST", "/generate", body)
        except requests.RequestException:
            pass  # it has been stopped: the decode server says what becomes of the request

    def sent_bytes(self) -> float:
        """KV that the prefill server has sent so far, as SGLang counts it in its transfers."""
        return self.prefill.metrics()["sglang:kv_transfer_total_mb_sum"] * 2**20
