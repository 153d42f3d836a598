# SPDX-License-Identifier: Apache-2.0
"""`aircache top` against real servers, in a pseudo-terminal and without one."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aircache_patches.cli import main
from aircache_sglang.platform import has_accelerator
from aircache_sglang.testing import Server
from tests.integration.storm import PICTURE, Prompt

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(has_accelerator(), reason="SGLang would use the accelerator"),
]
ENTER, LEAVE = "\x1b[?1049h", "\x1b[?1049l"  # the alternate screen


def test_a_line_is_what_the_server_counts(
    aircache_server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    aircache_server.post("/generate", Prompt(f"{PICTURE} what", (1,), None).body(4))
    totals = aircache_server.metrics()
    assert main(["top", "--url", aircache_server.url, "--once"]) == 0
    said = capsys.readouterr()
    assert said.err == "" and said.out.count("\n") == 1
    found = dict(part.split("=", 1) for part in said.out.split()[1:])
    assert found["url"] == aircache_server.url
    assert int(found["slots_freed"]) == totals["sglang:aircache_slots_freed_total"] > 0
    assert int(found["compressed"]) == totals["sglang:aircache_requests_compressed_total"]
    assert (
        int(found["pool_slots"])
        == aircache_server.get("/v1/loads")["loads"][0]["max_total_num_tokens"]
    )
    assert found["running"] == found["columns_held"] == "0"
    assert 0 < float(found["pass_ms"]) < 60_000


def test_a_terminal_refreshes_and_is_left_as_it_was(aircache_server: Server) -> None:
    leader, follower = pty.openpty()
    argv = [sys.executable, "-m", "aircache_patches.cli", "top", "--interval", "0.2"]
    urls = [
        "--url",
        aircache_server.url,
        "--url",
        aircache_server.url.replace("127.0.0.1", "LocalHost"),
    ]
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen(
        [*argv, *urls],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=env,
        # Tests that run in the background of a shell have it ignored, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(follower)
    seen = ""
    deadline = time.monotonic() + 120
    try:
        while seen.count("aircache top, ") < 3:
            assert time.monotonic() < deadline and process.poll() is None, seen
            if select.select([leader], [], [], 1.0)[0]:
                seen += os.read(leader, 65536).decode(errors="replace")
        process.send_signal(signal.SIGINT)
        while time.monotonic() < deadline:
            if not select.select([leader], [], [], 1.0)[0]:
                continue
            try:
                read = os.read(leader, 65536)
            except OSError:  # Linux: the other end is closed
                break
            if not read:
                break
            seen += read.decode(errors="replace")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait(60)
        os.close(leader)
    assert seen.startswith(ENTER) and LEAVE in seen and "Traceback" not in seen
    after = seen.rpartition(LEAVE)[2]
    assert "aircache" not in after
    assert "together" in seen and "columns held" in seen and "░░░" in seen


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["top", "--once", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("aircache top: ")
    return said.err.removeprefix("aircache top: ").rstrip()


def test_servers_that_cannot_be_watched(
    stock_server: Server, serial_server: Server, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said = refused(capsys, "--url", stock_server.url)
    assert said == f"{stock_server.url} runs without --kv-policy, so it drops nothing"
    said = refused(capsys, "--url", serial_server.url)
    assert said == f"{serial_server.url} runs without --enable-metrics, so it counts nothing"
    said = refused(capsys, "--url", "http://127.0.0.1:9")
    assert said.startswith("no server answers at http://127.0.0.1:9: ")
    assert "http://" in refused(capsys, "--url", "127.0.0.1:30000")
    said = refused(capsys, "--interval", "0")
    assert said == "--interval must be at least 0.2, got 0"
