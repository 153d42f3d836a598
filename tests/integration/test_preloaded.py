# SPDX-License-Identifier: Apache-2.0
"""A server that forks is the server that a command line starts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
# Of one start: ports, seed, times.
OWN = {"port", "random_seed", "internal_states", "startup_time", "warmup_time"}


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
    # Per process: three apply the hooks.
    assert applied(aircache_server) == applied(forked)
    assert set(applied(forked).values()) == {3}
    prompt = user_prompt(picture(7, 9, 10), "what is this?" + words(5))
    for overrides in ({"retention": 1}, {"retention": 0.2, "return_selection": True}):
        mine, theirs = (ask(server, prompt, overrides) for server in (forked, aircache_server))
        assert mine["meta_info"]["aircache"] == theirs["meta_info"]["aircache"]
        assert mine["output_ids"] == theirs["output_ids"]
        if overrides["retention"] == 1:
            assert max_logprob_difference([theirs], [mine]) < 1e-5


def applied(server: Server) -> Counter[str]:
    return Counter(re.findall(r"Applied \d+ hook\(s\) to (\S+)", server.log()))


def test_processes(aircache_server: Server, forked: Server) -> None:
    """As many as of a command line, in a session of their own, and none is left."""

    def kinds(server: Server) -> Any:
        return len(server.pids())

    assert kinds(forked) == kinds(aircache_server)


def test_a_start_that_fails(checkpoint: Path, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    flags = [*SHARED_FLAGS, "--page-size", "16"]
    server = PreloadedServer(checkpoint, flags, env=STRICT_MEMORY_CHECKS, log=log)
    with pytest.raises(ServerError, match="the server exited with code 1"):
        server.start()
    assert "aircache: --kv-policy aircache does not work with --page-size 16" in log.read_text()
    assert server.pids() == []
