# SPDX-License-Identifier: Apache-2.0
"""A real SGLang server as a context manager, started as a user starts it; a client of any."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import psutil
import requests
from PIL import Image

_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class ServerError(RuntimeError):
    """The server ended or did not become ready; the message holds the end of its log."""


class Client:
    """A running SGLang server, reached over HTTP.

    Args:
        url: of the server, without a path.
        model: its name in OpenAI requests.
        timeout: seconds for each request.
    """

    def __init__(self, url: str, *, model: str = "default", timeout: float = 600.0) -> None:
        self.url = url.rstrip("/")
        self.model = model
        self.timeout = timeout
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy of the environment must not see 127.0.0.1
        # SGLang's LLaVA processor forks workers that inherit the open connections: one that uvicorn
        # closes after 5 idle seconds stays open for the client, who would wait on it for ever.
        self._session.headers["Connection"] = "close"

    def request(self, method: str, path: str, json: Any = None) -> requests.Response:
        """Send a request and return the response, whatever its status."""
        return self._session.request(method, self.url + path, json=json, timeout=self.timeout)

    def post(self, path: str, json: Any) -> Any:
        """POST and return the decoded JSON answer; ServerError with the body unless 200."""
        return self._checked(self.request("POST", path, json))

    def get(self, path: str) -> Any:
        """GET and return the decoded JSON answer; ServerError with the body unless 200."""
        return self._checked(self.request("GET", path))

    def _checked(self, response: requests.Response) -> Any:
        if response.status_code != 200:
            raise ServerError(f"HTTP {response.status_code}: {response.text}")
        return response.json()

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """POST with ``"stream": true``; the chunks as they arrive, on a connection of its own.

        Raises ServerError unless the status is 200, and for a chunk that reports an error.
        """
        with requests.Session() as session:
            session.trust_env = False
            with session.post(
                self.url + path, json={**body, "stream": True}, stream=True, timeout=self.timeout
            ) as response:
                if response.status_code != 200:
                    raise ServerError(f"HTTP {response.status_code}: {response.text}")
                for line in response.iter_lines():
                    if not line.startswith(b"data: ") or line == b"data: [DONE]":
                        continue
                    chunk = json.loads(line.removeprefix(b"data: "))
                    if "error" in chunk:
                        raise ServerError(str(chunk["error"]))
                    yield chunk

    def generate(
        self,
        text: str | None = None,
        *,
        images: Sequence[Image.Image | str] = (),
        max_new_tokens: int = 16,
        temperature: float = 0.0,
        sampling: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> Any:
        """POST /generate. ``images`` are PIL pictures, paths, or URLs (``data:`` included).

        ``sampling`` is merged into ``sampling_params``; ``fields`` into the body (``input_ids``,
        ``return_logprob``, ``rid``, ...). Returns SGLang's answer: ``text``, ``output_ids``,
        ``meta_info``.
        """
        body: dict[str, Any] = {
            "sampling_params": {
                "max_new_tokens": max_new_tokens,
                "temperature": temperature,
                **(sampling or {}),
            },
            **fields,
        }
        if text is not None:
            body["text"] = text
        if images:
            body["image_data"] = [_url(image) for image in images]
        return self.post("/generate", body)

    def chat(
        self,
        text: str,
        *,
        images: Iterable[Image.Image | str] = (),
        max_tokens: int = 16,
        temperature: float = 0.0,
        messages: Sequence[Mapping[str, Any]] | None = None,
        **fields: Any,
    ) -> Any:
        """POST /v1/chat/completions with one user turn: the pictures, then the text.

        ``messages`` (earlier turns, a system prompt) come before it; ``fields`` go into the body
        (``logprobs``, ``custom_params``, ``return_meta_info``, ...). Returns the OpenAI answer.
        """
        content = [
            *({"type": "image_url", "image_url": {"url": _url(image)}} for image in images),
            {"type": "text", "text": text},
        ]
        return self.post(
            "/v1/chat/completions",
            {
                "model": self.model,
                "messages": [*(messages or ()), {"role": "user", "content": content}],
                "max_tokens": max_tokens,
                "temperature": temperature,
                **fields,
            },
        )

    def info(self) -> dict[str, Any]:
        """GET /server_info: the resolved arguments and ``internal_states``."""
        return dict(self.get("/server_info"))

    def flush_cache(self) -> None:
        """POST /flush_cache: empty the radix tree; ServerError while requests run."""
        response = self.request("POST", "/flush_cache")
        if response.status_code != 200:
            raise ServerError(f"HTTP {response.status_code}: {response.text}")

    def metrics(self) -> dict[str, float]:
        """GET /metrics (needs --enable-metrics): each sample's value, summed over its labels."""
        totals: dict[str, float] = {}
        for name, _, value in self.metric_samples():
            totals[name] = totals.get(name, 0.0) + value
        return totals

    def metric_samples(self) -> list[tuple[str, dict[str, str], float]]:
        """GET /metrics: (name, labels, value) of each sample."""
        response = self.request("GET", "/metrics")
        if response.status_code != 200:
            raise ServerError(f"HTTP {response.status_code}: {response.text}")
        samples = []
        for line in response.text.splitlines():
            match = _SAMPLE.match(line)
            if match:
                labels = dict(_LABEL.findall(match[2] or ""))
                samples.append((match[1], labels, float(match[3])))
        return samples


class Process(Protocol):
    """What a server needs of `subprocess.Popen`."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self, timeout: float) -> int: ...


class Server(Client):
    """``python -m sglang.launch_server`` on a free port of 127.0.0.1.

    Entering starts the server and waits until it answers; leaving ends it and every process it
    started, found by process id. Its output goes to ``log_path``, kept after the end.

        with Server(checkpoint, ["--max-total-tokens", "4096"]) as server:
            answer = server.chat("what is this?", images=[picture], max_tokens=8)

    Args:
        model: checkpoint folder, passed as ``--model-path``.
        flags: further flags, as on a command line.
        env: variables to set on top of this process's; a value of None removes one. HF_HUB_OFFLINE
            is 1 unless set here.
        argv: start this instead of ``python -m sglang.launch_server``; the model, host and port
            flags are added to it.
        log: file for stdout and stderr; a new temporary file by default.
        timeout: seconds to wait until ready, and for each request.
    """

    def __init__(
        self,
        model: str | Path,
        flags: Sequence[str] = (),
        *,
        env: Mapping[str, str | None] | None = None,
        argv: Sequence[str] | None = None,
        log: str | Path | None = None,
        timeout: float = 600.0,
    ) -> None:
        self.port = free_port()
        super().__init__(f"http://127.0.0.1:{self.port}", model=str(model), timeout=timeout)
        self.argv = [
            *(argv if argv is not None else (sys.executable, "-m", "sglang.launch_server")),
            *("--model-path", self.model, "--host", "127.0.0.1", "--port", str(self.port)),
            *flags,
        ]
        self.env = os.environ | {"HF_HUB_OFFLINE": "1"}
        for name, value in (env or {}).items():
            if value is None:
                self.env.pop(name, None)
            else:
                self.env[name] = value
        if log is None:
            handle, log = tempfile.mkstemp(prefix="aircache-server-", suffix=".log")
            os.close(handle)
        self.log_path = Path(log)
        self.process: Process | None = None
        self.ready_seconds: float | None = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.terminate()

    def start(self) -> None:
        """Start the process and wait until ``/health`` answers 200; else end it and raise."""
        if self.process is not None:
            raise RuntimeError(f"the server on port {self.port} was already started")
        started = time.monotonic()
        self.process = self._launch()
        try:
            self._wait_until_ready(started)
        except BaseException:
            self.terminate()
            raise
        self.ready_seconds = time.monotonic() - started

    def _launch(self) -> Process:
        """Start the process in a session of its own, its output into the log."""
        with self.log_path.open("wb") as log:
            return subprocess.Popen(
                self.argv,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait_until_ready(self, started: float) -> None:
        assert self.process is not None
        while True:
            code = self.process.poll()
            if code is not None:
                raise ServerError(f"the server exited with code {code}\n{self.log_tail()}")
            try:
                # Ready after its own warm-up request, before which /health is not 200.
                if self._session.get(self.url + "/health", timeout=10).status_code == 200:
                    return
            except requests.RequestException:
                pass
            if time.monotonic() - started > self.timeout:
                raise ServerError(
                    f"the server was not ready after {self.timeout:.0f} s\n{self.log_tail()}"
                )
            time.sleep(0.2)

    def is_running(self) -> bool:
        """Whether the launched process is alive."""
        return self.process is not None and self.process.poll() is None

    def pids(self) -> list[int]:
        """Process ids of the server and its descendants, the server first."""
        return [process.pid for process in self._tree()]

    def _tree(self) -> list[psutil.Process]:
        if self.process is None:
            return []
        try:
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return self._orphans()

    def _orphans(self) -> list[psutil.Process]:
        """Members of the server's own session that outlived the launched process."""
        assert self.process is not None
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.process.pid:
                    found.append(process)
            except (ProcessLookupError, PermissionError):
                continue
        return found

    def terminate(self, grace: float = 2.0) -> None:
        """End the server and everything it started; SIGTERM, then SIGKILL after ``grace`` seconds.

        Safe to call more than once, and after the server has ended.
        """
        if self.process is None:
            return
        tree = {process.pid: process for process in (*self._tree(), *self._orphans())}
        trackers: list[psutil.Process] = []
        others: list[psutil.Process] = []
        for process in tree.values():
            (trackers if is_resource_tracker(process) else others).append(process)
        for process in others:
            unless_gone(process.terminate)
        _, alive = psutil.wait_procs(others, timeout=grace)
        for process in alive:
            unless_gone(process.kill)
        # Trackers unlink the dead processes' semaphores, then end by themselves.
        _, alive = psutil.wait_procs([*alive, *trackers], timeout=10)
        for process in {*alive, *self._orphans()}:
            unless_gone(process.kill)
        self.process.wait(10)
        self._session.close()

    def log(self) -> str:
        """Everything the server has printed so far."""
        return self.log_path.read_text(errors="replace")

    def log_tail(self, lines: int = 40) -> str:
        """The last lines of the log."""
        return "\n".join(self.log().splitlines()[-lines:])


def png_data_url(image: Image.Image) -> str:
    """A picture as a lossless ``data:image/png;base64,`` URL."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _url(image: Image.Image | str) -> str:
    return image if isinstance(image, str) else png_data_url(image)


def is_resource_tracker(process: psutil.Process) -> bool:
    """Whether it is multiprocessing's, which ends by itself after those it serves."""
    try:
        return any("resource_tracker" in part for part in process.cmdline())
    except psutil.Error:
        return False


def unless_gone(send: Any) -> None:
    """Call a method of a process that may have ended meanwhile."""
    try:
        send()
    except psutil.NoSuchProcess:
        pass


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
