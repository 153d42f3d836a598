# SPDX-License-Identifier: Apache-2.0
"""The real Prometheus, from Debian's package, and what examples/monitoring asks it."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import requests
import yaml

from aircache_sglang.testing.server import free_port

MONITORING = Path(__file__).parents[2] / "examples" / "monitoring"
DASHBOARD, RULES = MONITORING / "dashboard.json", MONITORING / "aircache.rules.yml"
CONFIGURATION = MONITORING / "prometheus.yml"


def find(name: str) -> str:
    """Path of `prometheus` or `promtool`: installed, or unpacked from Debian's package beside
    .ci/env's base; the test is skipped where there is no such package."""
    path = shutil.which(name)
    if path is not None:
        return path
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    envs = Path(os.environ.get("AIRCACHE_ENV_DIR") or Path(cache) / "aircache-sglang")
    folder = envs / "prometheus"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / ".complete").exists():
            _unpack(folder)
            (folder / ".complete").touch()
    return str(folder / "usr" / "bin" / name)


def _unpack(folder: Path) -> None:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        pytest.skip("needs Prometheus, and there is no apt-get to bring it")
    download = ["apt-get", "download", "prometheus"]
    done = subprocess.run(download, cwd=folder, capture_output=True, text=True, timeout=300)
    if done.returncode and os.geteuid() == 0:
        subprocess.run(["apt-get", "update"], capture_output=True, timeout=300, check=False)
        done = subprocess.run(download, cwd=folder, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"Prometheus could not be brought: {done.stderr.strip()[-200:]}")
    for package in folder.glob("prometheus_*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True, timeout=300)
        package.unlink()


class Prometheus:
    """A Prometheus that scrapes servers by the configuration of examples/monitoring, but oftener.

    folder: an empty one for its data. targets: `host:port`.
    """

    def __init__(self, folder: Path, targets: Sequence[str]) -> None:
        self._folder = folder
        self._targets = targets
        self._session = requests.Session()
        self._session.trust_env = False
        self.url = f"http://127.0.0.1:{free_port()}"

    def __enter__(self) -> Prometheus:
        config = yaml.safe_load(CONFIGURATION.read_text())
        config["global"] = {"scrape_interval": "2s", "evaluation_interval": "2s"}
        config["rule_files"] = [str(RULES)]
        config["scrape_configs"][0]["static_configs"] = [{"targets": list(self._targets)}]
        file = self._folder / "prometheus.yml"
        file.write_text(yaml.safe_dump(config))
        argv = [find("prometheus"), f"--config.file={file}"]
        argv += [f"--storage.tsdb.path={self._folder / 'data'}"]
        argv += [f"--web.listen-address={self.url.removeprefix('http://')}"]
        self._log = (self._folder / "prometheus.log").open("wb")
        self._process = subprocess.Popen(argv, stdout=self._log, stderr=self._log)
        deadline = time.monotonic() + 120
        while not self._is_ready():
            log = self._folder / "prometheus.log"
            assert self._process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.wait(60)
        self._log.close()
        self._session.close()

    def _is_ready(self) -> bool:
        try:
            return self._session.get(f"{self.url}/-/ready", timeout=10).status_code == 200
        except requests.RequestException:
            return False

    def get(self, path: str, **parameters: str) -> Any:
        """`data` of an answer of its HTTP API."""
        answer = self._session.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=60)
        assert answer.status_code == 200, f"{parameters}: {answer.text}"
        return answer.json()["data"]

    def numbers(self, expression: str) -> list[float]:
        """What an expression is worth now, series by series; NaN left out."""
        found = self.get("query", query=expression)
        assert found["resultType"] == "vector"
        values = [float(sample["value"][1]) for sample in found["result"]]
        return [value for value in values if value == value]


def panels(dashboard: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(title, expression) of everything that the dashboard draws, for all servers and models."""
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"].replace("$__rate_interval", "1m")
            yield panel["title"], re.sub(r"\$(instance|model_name)\b", ".*", expression)
