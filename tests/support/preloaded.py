# SPDX-License-Identifier: Apache-2.0
"""Servers that fork from a process which has imported SGLang, a third of a start's work or less.

SGLang's three processes each import the same 7,000 modules, 13 CPU seconds of the 16 that each
needs to start. Here a template imports them once per environment; a server and the processes that
SGLang spawns are forks of it, made before any plugin was loaded. All else happens as on a command
line: `sglang.launch_server` runs as `__main__`, and a child unpickles what SGLang's `spawn` sends.

What a fork cannot show is left to servers started as users start them, `Server`: those that most
tests share, those of several ranks (whose hash seeds differ), the platform's, the interpreter's,
and all that examples and benchmarks start. tests/integration/test_preloaded.py compares the two.
"""

from __future__ import annotations

import atexit
import faulthandler
import fcntl
import functools
import gc
import json
import multiprocessing.util
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import requests

from aircache_sglang.testing import Server, ServerError
from aircache_sglang.testing.server import is_resource_tracker, unless_gone

ROOT = Path(__file__).parents[2]
# What SGLang spawns for one rank: a scheduler and a detokenizer. Further children start as usual.
CHILDREN = 2
STACKS = signal.SIGUSR1


class PreloadedServer(Server):
    """`Server`, forked; one template serves all servers of one environment and test process.

    If it hangs, the error shows where all its threads stand. A start that hangs is made once more,
    with a warning: one in CI did (LLaVA-NeXT, /health unanswered), and its cause is not known.
    """

    def __init__(self, *args: Any, timeout: float = 240.0, **kwargs: Any) -> None:
        super().__init__(*args, timeout=timeout, **kwargs)

    def request(self, method: str, path: str, json: Any = None) -> requests.Response:
        try:
            return super().request(method, path, json)
        except requests.Timeout as error:
            raise ServerError(f"{method} {path}: {error}\n{self._stacks()}") from error

    def _wait_until_ready(self, started: float) -> None:
        try:
            super()._wait_until_ready(started)
        except ServerError as error:
            if not self.is_running():
                raise
            warnings.warn(f"{error}\n{self._stacks()}\nStarted once more.", stacklevel=3)
            self.terminate()
            self.process = self._launch()
            super()._wait_until_ready(time.monotonic())

    def _stacks(self) -> str:
        """The end of the log after each process that forked has written its threads' stacks."""
        for process in self._tree():
            if not is_resource_tracker(process):
                unless_gone(functools.partial(process.send_signal, STACKS))
        time.sleep(1)
        return self.log_tail(400)

    def _launch(self) -> Fork:
        # pytest names the running test in the environment: it is no reason for another template.
        env = {name: value for name, value in self.env.items() if not name.startswith("PYTEST_")}
        return _template(frozenset(env.items())).fork(self.argv[3:], self.log_path)


@functools.cache
def _template(env: frozenset[tuple[str, str]]) -> Template:
    return Template(dict(env))


class Template:
    """A process that has imported SGLang and forks on request; it ends with this one."""

    def __init__(self, env: dict[str, str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.preloaded"],
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._lock = threading.Lock()
        atexit.register(self._process.kill)

    def fork(self, flags: Sequence[str], log: os.PathLike[str]) -> Fork:
        """Start `python -m sglang.launch_server FLAGS...`; its output goes to `log`."""
        return Fork(self, self.ask({"flags": list(flags), "log": os.fspath(log)}))

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            reply = self._process.stdout.readline()
            if not reply:
                self._errors.seek(0)
                raise ServerError(self._errors.read().decode(errors="replace"))
            return json.loads(reply)


class Fork:
    """The part of `subprocess.Popen` that `Server` uses, for a child of the template."""

    def __init__(self, template: Template, pid: int) -> None:
        self._template, self.pid = template, pid

    def poll(self) -> int | None:
        code: int | None = self._template.ask({"poll": self.pid})
        return code

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("sglang.launch_server", timeout)
            time.sleep(0.02)
        return code


def main() -> None:
    """The template: forks for each request of its parent, until that closes the pipe."""
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import_sglang()
    gc.collect()
    gc.freeze()
    codes: dict[int, int] = {}

    def reap(*_: int | FrameType | None) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            codes[pid] = os.waitstatus_to_exitcode(status)

    signal.signal(signal.SIGCHLD, reap)
    for line in iter(requests.readline, ""):
        request = json.loads(line)
        if "poll" in request:
            answer = codes.get(request["poll"])
        else:
            answer = os.fork()
            if not answer:
                break
        print(json.dumps(answer), file=replies, flush=True)
    else:
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    requests.close()
    replies.close()
    serve(**request)


def import_sglang() -> None:
    """What a scheduler has imported before it loads plugins; not the module run as `__main__`."""
    import sglang.srt.entrypoints.http_server
    import sglang.srt.managers.detokenizer_manager
    import sglang.srt.managers.scheduler  # noqa: F401


def serve(flags: list[str], log: str) -> None:
    """In the fork: become the server."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for source, target in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.close(null)
    os.close(output)
    faulthandler.register(STACKS)
    spares: list[socket.socket] = []
    for _ in range(CHILDREN):
        ours, theirs = socket.socketpair()
        if not os.fork():
            for end in (ours, *spares):
                end.close()
            become_child(theirs)
            return
        theirs.close()
        spares.append(ours)
    spawn = multiprocessing.util.spawnv_passfds
    multiprocessing.util.spawnv_passfds = functools.partial(hand_over, spawn, spares)
    sys.argv = ["sglang.launch_server", *flags]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


def hand_over(
    spawn: Callable[..., int], spares: list[socket.socket], path: Any, argv: Any, fds: Any
) -> int:
    """In place of `multiprocessing.util.spawnv_passfds`: a fork that waited becomes the child."""
    arguments = [os.fsdecode(argument) for argument in argv]
    if "--multiprocessing-fork" not in arguments or not spares:
        return spawn(path, argv, fds)
    # What spawn passes: python -c CODE --multiprocessing-fork, and descriptors to keep.
    numbers = sorted(set(map(int, fds)))
    code = arguments[arguments.index("-c") + 1]
    message = json.dumps({"code": code, "fds": numbers, "env": dict(os.environ)})
    with spares.pop() as spare, spare.makefile("rw") as stream:
        socket.send_fds(spare, [b" "], numbers)
        stream.write(message + "\n")
        stream.flush()
        return int(stream.readline())


def become_child(parent: socket.socket) -> None:
    """Wait for `hand_over`, or for the end of the server, and do what `python -c CODE` would."""
    byte, received, _, _ = socket.recv_fds(parent, 1, 64)
    if not byte:
        return
    with parent, parent.makefile("rw") as stream:
        message = json.loads(stream.readline())
        stream.write(f"{os.getpid()}\n")
    # Out of the way of the numbers that the code names.
    held = [fcntl.fcntl(fd, fcntl.F_DUPFD, 1000) for fd in received]
    for fd in received:
        os.close(fd)
    for fd, number in zip(held, message["fds"], strict=True):
        os.dup2(fd, number)
        os.close(fd)
    os.environ.clear()
    os.environ.update(message["env"])
    sys.argv = ["-c", "--multiprocessing-fork"]
    exec(message["code"], {"__name__": "__main__"})


if __name__ == "__main__":
    main()
