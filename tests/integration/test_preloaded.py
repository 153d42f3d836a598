# SPDX-License-Identifier: Apache-2.0
"""A server that forks is the server that a command line starts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from aircache_sglang.platform import has_accelerator
from aircache_sglang.testing import Server, ServerError
from aircache_sglang.testing.prompts import ask, max_logprob_difference, picture, user_prompt, words
from tests.integration.conftest import SHARED_FLAGS, STRICT_MEMORY_CHECKS
from tests.support.preloaded import PreloadedServer

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(has_accelerator(), reason="SGLang would use the accelerator"),
]
# Of one start: port, seed and times.
OWN = {"port", "launch_command", "random_seed", "startup_time", "internal_states"}


@pytest.fixture(scope="module")
def forked(checkpoint: Path) -> Iterator[Server]:
    """With the flags and the environment of `aircache_server`."""
    with PreloadedServer(checkpoint, SHARED_FLAGS, env=STRICT_MEMORY_CHECKS) as server:
        yield server


def test_the_same_arguments_hooks_and_answers(aircache_server: Server, forked: Server) -> None:
    one, other = (
        {name: value for name, value in server.info().items() if name not in OWN}
        for server in (aircache_server, forked)
    )
    assert one == other
    # Once in the launched process and once in its scheduler.
    assert applied(aircache_server) == applied(forked)
    assert set(applied(forked).values()) == {2}
    prompt = user_prompt(picture(7, 9, 10), "what is this?" + words(5))
    for overrides in ({"retention": 1}, {"retention": 0.2, "return_selection": True}):
        mine, theirs = (ask(server, prompt, overrides) for server in (forked, aircache_server))
        assert mine["meta_info"]["aircache"] == theirs["meta_info"]["aircache"]
        assert mine["output_ids"] == theirs["output_ids"]
        if overrides["retention"] == 1:
            assert max_logprob_difference([theirs], [mine]) < 1e-5


def applied(server: Server) -> Counter[str]:
    return Counter(re.findall(r"Applied \d+ hook\(s\) to (\S+)", server.log()))


def test_as_many_processes(aircache_server: Server, forked: Server) -> None:
    assert len(forked.pids()) == len(aircache_server.pids())


def test_a_start_that_fails(checkpoint: Path, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    flags = [*SHARED_FLAGS, "--kv-canary", "log"]
    server = PreloadedServer(checkpoint, flags, env=STRICT_MEMORY_CHECKS, log=log)
    with pytest.raises(ServerError, match="the server exited with code 1"):
        server.start()
    assert "aircache: --kv-policy aircache does not work with --kv-canary log" in log.read_text()
    assert server.pids() == []


def test_a_request_that_hangs(forked: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    children = [psutil.Process(pid) for pid in forked.pids()[1:]]
    monkeypatch.setattr(forked, "timeout", 3.0)
    for process in children:
        process.suspend()
    try:
        with pytest.raises(ServerError, match=r"POST /generate: [\s\S]*http_server\.py"):
            forked.generate("a garden", max_new_tokens=1)
    finally:
        for process in children:
            process.resume()


def test_a_start_that_hangs(checkpoint: Path) -> None:
    server = PreloadedServer(checkpoint, SHARED_FLAGS, env=STRICT_MEMORY_CHECKS, timeout=2.0)
    with (
        pytest.warns(UserWarning, match="Started once more"),
        pytest.raises(ServerError, match="not ready after"),
    ):
        server.start()
    assert server.pids() == []
