# SPDX-License-Identifier: Apache-2.0
"""The server helper: readiness, clear failures, and no process left behind."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from aircache_sglang.testing import Server, ServerError, png_data_url

ROOT = Path(__file__).parents[2]
FAKE = """
import http.server, os, subprocess, sys, time
port = int(sys.argv[sys.argv.index("--port") + 1])
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, os.environ.get("FLAVOUR"), sys.argv[1:], flush=True)
started = time.monotonic()
METRICS = '''# TYPE a:total counter
a:total{model="x",path="/a b"} 2.0
a:total{model="y",path="q\\\\"}"} 3.5
plain 1e3
'''

class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, code, body):
        self.send_response(code)
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        if self.path == "/health":
            self.answer(200 if time.monotonic() - started > 0.5 else 503, b"")
        elif self.path == "/metrics":
            self.answer(200, METRICS.encode())
        else:
            self.answer(404, b"no such page")
    def do_POST(self):
        self.answer(200, self.rfile.read(int(self.headers["Content-Length"])))

http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def fake(code: str, log: Path, timeout: float = 60.0) -> Server:
    argv = (sys.executable, "-c", code)
    return Server("model", ["--x"], argv=argv, env={"FLAVOUR": "mint"}, log=log, timeout=timeout)


def child_of(server: Server) -> psutil.Process:
    return psutil.Process(int(server.log().split()[1]))


def test_imports() -> None:
    """The helper needs no pytest and no SGLang; the project does not need the helper."""
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('pytest', '_pytest', 'sglang')))\n"  # importing fails
        "import aircache_sglang, aircache_sglang.cache_view, aircache_sglang.config\n"
        "import aircache_sglang.policy, aircache_sglang.runtime\n"
        "assert not [name for name in sys.modules if name.startswith('aircache_sglang.testing')]\n"
        "import aircache_sglang.testing.oracle, aircache_sglang.testing.prompts\n"
        "import aircache_sglang.testing.checkpoints.qwen3_vl\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_start_answers_and_end(tmp_path: Path) -> None:
    with fake(FAKE, tmp_path / "log") as server:
        assert server.ready_seconds is not None and server.ready_seconds > 0.5
        assert "mint ['--model-path', 'model', '--host', '127.0.0.1', '--port'" in server.log()
        child = child_of(server)
        assert server.process is not None
        assert server.pids() == [server.process.pid, child.pid]
        sent = server.generate("hi", max_new_tokens=3, sampling={"top_p": 0.5}, return_logprob=True)
        assert sent == {
            "text": "hi",
            "return_logprob": True,
            "sampling_params": {"max_new_tokens": 3, "temperature": 0.0, "top_p": 0.5},
        }
        turn = {"role": "assistant", "content": "yes"}
        sent = server.chat("why?", images=["file:///x.png"], messages=[turn], seed=1)
        assert sent["messages"][0] == turn
        assert [part["type"] for part in sent["messages"][1]["content"]] == ["image_url", "text"]
        assert sent["seed"] == 1
        with pytest.raises(ServerError, match="HTTP 404: no such page"):
            server.info()
        assert server.metrics() == {"a:total": 5.5, "plain": 1000.0}
        assert server.metric_samples()[0] == ("a:total", {"model": "x", "path": "/a b"}, 2.0)
    assert not child.is_running()
    assert not server.is_running()
    server.terminate()


def test_an_early_exit_shows_code_and_log(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"exited with code 7\nbad flag: y"):
        fake("import sys; print('bad flag: y'); sys.exit(7)", tmp_path / "log").start()


def test_not_ready_in_time(tmp_path: Path) -> None:
    server = fake(FAKE.replace("> 0.5", "> 500"), tmp_path / "log", timeout=2.0)
    with pytest.raises(ServerError, match="not ready after 2 s\nchild"):
        server.start()
    assert not psutil.pid_exists(int(server.log().split()[1]))


def test_children_of_a_dead_server_are_ended(tmp_path: Path) -> None:
    with fake(FAKE, tmp_path / "log") as server:
        child = child_of(server)
        assert server.process is not None
        server.process.kill()
        server.process.wait()
        assert child.is_running()
    deadline = time.monotonic() + 5
    while child.is_running() and child.status() != "zombie" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.is_running() or child.status() == "zombie"


def test_png_data_url_is_lossless() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    head, data = png_data_url(Image.fromarray(pixels)).split(",")
    assert head == "data:image/png;base64"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), pixels)
