# SPDX-License-Identifier: Apache-2.0
"""Servers that the integration tests share: each is started once a session, when first asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.factories import make_qwen2_vl
from tests.support import Server

# SGLang stops the server when a slot is lost or owned twice, idle and while requests run.
STRICT_MEMORY_CHECKS = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}
# An idle scheduler would otherwise poll on a core that another server needs.
COMMON_FLAGS = ("--device", "cpu", "--sleep-on-idle", "--enable-cache-report")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2-VL in float32: 4 layers, 4 query heads, 2 KV heads."""
    return make_qwen2_vl(tmp_path_factory.mktemp("checkpoint") / "qwen2-vl")


@pytest.fixture(scope="session")
def stock_server(checkpoint: Path) -> Iterator[Server]:
    """SGLang as if this project were not installed, overlap scheduling on."""
    with Server(checkpoint, [*COMMON_FLAGS, "--kv-policy", "none"]) as server:
        yield server


@pytest.fixture(scope="session")
def aircache_server(checkpoint: Path) -> Iterator[Server]:
    """A compressing server at its default retention 0.1, overlap scheduling on, strict checks."""
    flags = [*COMMON_FLAGS, "--kv-policy", "aircache", "--enable-metrics"]
    with Server(checkpoint, flags, env=STRICT_MEMORY_CHECKS) as server:
        yield server
