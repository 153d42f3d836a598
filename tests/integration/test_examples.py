# SPDX-License-Identifier: Apache-2.0
"""The examples, run as their users run them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sglang

from aircache_sglang.frontend import AirCacheEndpoint
from aircache_sglang.platform import has_accelerator
from aircache_sglang.testing import Server
from examples.page import invoice

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(has_accelerator(), reason="for a machine without an accelerator"),
]
ROOT = Path(__file__).parents[2]


def started(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )


def run(module: str, *arguments: str) -> str:
    done = started(module, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fail(module: str, *arguments: str) -> tuple[int, str]:
    """The exit code and what was said."""
    done = started(module, *arguments)
    return done.returncode, done.stderr


def test_engine_batch(checkpoint: Path, tmp_path: Path) -> None:
    pictures = [tmp_path / f"{number}.png" for number in (1, 2)]
    for number, picture in enumerate(pictures):
        invoice(number, rows=24).image().save(picture)
    printed = run(
        *("examples.engine_batch", str(checkpoint), *map(str, pictures)),
        *("--device", "cpu", "--retention", "0.1", "--tokens", "8"),
    )
    for picture in pictures:
        assert f"{picture}: 384 visual tokens in 38 columns, 346 slots freed" in printed


def test_batch_caption(checkpoint: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "pictures", tmp_path / "captions.jsonl"
    folder.mkdir()
    for number in (1, 2, 3):
        invoice(number, rows=24).image().save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("not a picture")
    # A run that was cut off has left one row and half of another.
    done = json.dumps({"picture": "1.png", "caption": "known", "aircache": None})
    out.write_text(f'{done}\n{{"picture": "2.p')
    arguments = (
        *("examples.batch_caption", str(checkpoint), str(folder), "--out", str(out)),
        *("--device", "cpu", "--tokens", "8", "--batch", "1"),
    )
    assert "3 pictures, 1 of them already captioned" in run(*arguments)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["picture"] for row in rows] == ["1.png", "2.png", "3.png"]
    assert rows[0]["caption"] == "known"
    assert [row["aircache"]["columns"] for row in rows[1:]] == [38, 38]
    assert all(row["caption"] for row in rows)
    # Starts no engine.
    assert "3 pictures, 3 of them already captioned" in run(*arguments)


def test_frontend_program(aircache_server: Server, tmp_path: Path) -> None:
    pictures = [tmp_path / f"{number}.png" for number in (1, 2)]
    for number, picture in enumerate(pictures):
        invoice(number, rows=24).image().save(picture)
    printed = run(
        *("examples.frontend_program", aircache_server.url, *map(str, pictures)),
        *("--template", "qwen2-vl", "--tokens", "8"),
    )
    for picture in pictures:
        assert f"{picture}, title (19/384 visual slots kept): " in printed
        assert f"{picture}, figures (192/384 visual slots kept): " in printed


@pytest.mark.parametrize("module", ["examples.frontend_program", "examples.openai_client"])
def test_clients_end_in_one_sentence(module: str, tmp_path: Path) -> None:
    """No picture, no server; starts none."""
    picture = tmp_path / "invoice.png"
    invoice(rows=24).image().save(picture)
    with socket.socket() as probe:  # a port that nobody listens on
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        code, said = fail(module, url, str(picture), str(picture))
    assert code == 1 and said.endswith(f"server answers at {url}.\n")
    assert said.count("\n") == 1
    missing = tmp_path / "none.png"
    code, said = fail(module, url, str(missing), "what must be paid?")
    assert code == 2 and said.endswith(f"error: {missing} is not a file\n")


@pytest.mark.parametrize("module", ["examples.frontend_program", "examples.openai_client"])
def test_clients_of_stock_sglang(module: str, stock_server: Server, tmp_path: Path) -> None:
    picture = tmp_path / "invoice.png"
    invoice(rows=24).image().save(picture)
    if module == "examples.openai_client":
        printed = run(module, stock_server.url, str(picture), "what?", "--tokens", "8")
        assert "No report: the server runs without --kv-policy aircache" in printed
    else:
        more = ("--template", "qwen2-vl", "--tokens", "8")
        printed = run(module, stock_server.url, str(picture), *more)
        assert f"{picture}, title (all visual slots kept): " in printed


def test_overrides_of_a_frontend_program(aircache_server: Server, tmp_path: Path) -> None:
    """As an argument of the program: one value a run of a batch, streamed and not."""
    picture = tmp_path / "invoice.png"
    invoice(rows=24).image().save(picture)

    @sglang.function
    def describe(s: Any, aircache: Any = None) -> None:
        s += sglang.user(sglang.image(str(picture)) + "what must be paid?")
        s += sglang.assistant(sglang.gen("answer", max_tokens=8, temperature=0.0))

    backend = AirCacheEndpoint(aircache_server.url, chat_template_name="qwen2-vl")
    wanted: list[dict[str, Any]] = [{"aircache": {"retention": r}} for r in (0.5, 0.05, 1)]
    states = describe.run_batch([*wanted, {}], backend=backend)
    reports = [state.get_meta_info("answer")["aircache"] for state in states]
    assert [report and report["columns"] for report in reports] == [192, 19, None, 38]
    streamed = describe.run(**wanted[1], backend=backend, stream=True)
    assert "".join(streamed.text_iter("answer")) == states[1]["answer"]
    assert streamed.get_meta_info("answer")["aircache"]["columns"] == 19
    with pytest.warns(UserWarning, match="Error in stream_executor"):
        failed = describe.run(aircache={"retention": 2}, backend=backend)
        failed.sync()
    assert "aircache.retention must be a number" in str(failed.error())


def test_openai_client(aircache_server: Server, tmp_path: Path) -> None:
    picture = tmp_path / "invoice.png"
    invoice(rows=24).image().save(picture)
    arguments = (aircache_server.url, str(picture), "what must be paid?", "--tokens", "8")
    printed = run("examples.openai_client", *arguments)
    assert "The server kept 19 of 384 visual tokens' slots" in printed
    printed = run("examples.openai_client", *arguments, "--retention", "1")
    assert "The server kept all of the visual KV." in printed
