# SPDX-License-Identifier: Apache-2.0
"""The servers that integration tests share, each started when a test first asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aircache_sglang.testing import Server
from aircache_sglang.testing.checkpoints import make_qwen2_vl

if TYPE_CHECKING:
    from aircache_sglang.testing.oracle import Oracle

# SGLang stops the server when a slot is lost or owned twice, idle and while requests run.
STRICT_MEMORY_CHECKS = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}
# SGLang's default serves float32 weights in float16.
COMMON_FLAGS = ("--device", "cpu", "--dtype", "float32", "--enable-cache-report")
# Tests read in the log how many requests decode together, and their answers are too short to pay
# for a compression pass.
COMPRESSING_FLAGS = (
    *(*COMMON_FLAGS, "--kv-policy", "aircache", "--aircache-gate", "off"),
    *("--decode-log-interval", "4"),
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2-VL in float32: 4 layers, 4 query heads, 2 KV heads."""
    return make_qwen2_vl(tmp_path_factory.mktemp("checkpoint") / "qwen2-vl")


@pytest.fixture(scope="session")
def oracle(checkpoint: Path) -> Oracle:
    """The checkpoint in Transformers."""
    from aircache_sglang.testing.oracle import (
        Oracle,  # seconds, which tests without it need not wait
    )

    return Oracle(checkpoint)


@pytest.fixture(scope="session")
def stock_server(checkpoint: Path) -> Iterator[Server]:
    """SGLang as if this project were not installed, overlap scheduling on."""
    with Server(checkpoint, [*COMMON_FLAGS, "--kv-policy", "none"]) as server:
        yield server


@pytest.fixture(scope="session")
def aircache_server(checkpoint: Path) -> Iterator[Server]:
    """A compressing server at its default retention 0.1, overlap scheduling on, strict checks."""
    flags = [*COMPRESSING_FLAGS, "--enable-metrics"]
    with Server(checkpoint, flags, env=STRICT_MEMORY_CHECKS) as server:
        yield server


@pytest.fixture(scope="module")
def serial_server(checkpoint: Path) -> Iterator[Server]:
    """A compressing server without overlap scheduling that prefills 128 tokens at a time."""
    flags = [*COMPRESSING_FLAGS, "--disable-overlap-schedule", "--chunked-prefill-size", "128"]
    with Server(checkpoint, flags, env=STRICT_MEMORY_CHECKS) as server:
        yield server


@pytest.fixture(scope="module")
def parallel_server(checkpoint: Path) -> Iterator[Server]:
    """A compressing server of two tensor-parallel ranks, each with one of the two KV heads."""
    flags = [*COMPRESSING_FLAGS, "--tp-size", "2"]
    with Server(checkpoint, flags, env=STRICT_MEMORY_CHECKS) as server:
        yield server
