# SPDX-License-Identifier: Apache-2.0
"""The examples, run as their users run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aircache_sglang.platform import has_accelerator
from examples.page import invoice
from tests.support import Server

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(has_accelerator(), reason="for a machine without an accelerator"),
]
ROOT = Path(__file__).parents[2]


def run(module: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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


def test_openai_client(aircache_server: Server, tmp_path: Path) -> None:
    picture = tmp_path / "invoice.png"
    invoice(rows=24).image().save(picture)
    arguments = (aircache_server.url, str(picture), "what must be paid?", "--tokens", "8")
    printed = run("examples.openai_client", *arguments)
    assert "The server kept 19 of 384 visual tokens' slots" in printed
    printed = run("examples.openai_client", *arguments, "--retention", "1")
    assert "The server kept all of the visual KV." in printed
