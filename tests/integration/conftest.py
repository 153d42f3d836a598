# SPDX-License-Identifier: Apache-2.0
"""The servers that integration tests share, each started when a test first asks for it.

Under `pytest -n 2 --dist loadgroup` all tests that use a server of SHARED_SERVERS run in one
worker, which starts them once; the others are a group per file, and one per family of models.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from aircache_sglang.testing import Server
from aircache_sglang.testing.checkpoints import make_qwen2_vl
from tests.support.preloaded import PreloadedServer

if TYPE_CHECKING:
    from aircache_sglang.testing.oracle import Oracle

# SGLang stops the server when a slot is lost or owned twice, idle and while requests run.
STRICT_MEMORY_CHECKS = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    # Ranks of one CPU share its memory with whatever else runs: they see different amounts of it.
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
}
# SGLang's default serves float32 weights in float16.
COMMON_FLAGS = ("--device", "cpu", "--dtype", "float32", "--enable-cache-report")
# Tests read in the log how many requests decode together, and their answers are too short to pay
# for a compression pass.
COMPRESSING_FLAGS = (
    *(*COMMON_FLAGS, "--kv-policy", "aircache", "--aircache-gate", "off"),
    *("--decode-log-interval", "4"),
)
SHARED_FLAGS = (*COMPRESSING_FLAGS, "--enable-metrics")  # of aircache_server


SHARED_SERVERS = {"stock_server", "aircache_server", "serial_server"}
STARTED: list[Server] = []
# The files and tests that use one of them; one that is not named costs time and memory, no more.
UNNAMED: list[str] = []
# Whose servers are of one family of models each, the tests' only parameter.
BY_FAMILY = ("test_families.py", "test_family_matrix.py")
SHARING = (
    *("test_beam_search.py", "test_exactness.py", "test_explain.py", "test_top.py"),
    *("test_follow_ups.py", "test_gate.py"),
    *("test_metrics.py", "test_policies.py", "test_router.py", "test_session_turns.py"),
    "test_shapes.py",
    "test_bad_requests.py::test_a_stream_and_a_batch",
    "test_bad_requests.py::test_an_expanded_prompt_is_answered",
    "test_bad_requests.py::test_bad_ones_among_good_ones",
    "test_bad_requests.py::test_chats",
    "test_bad_requests.py::test_no_request_ends_the_server",
    "test_examples.py::test_clients_of_stock_sglang",
    "test_examples.py::test_frontend_program",
    "test_examples.py::test_openai_client",
    "test_examples.py::test_overrides_of_a_frontend_program",
    "test_memory.py::test_the_next_question_hits_the_picture",
    "test_memory.py::test_tokens_in_use_while_decoding",
    "test_preloaded.py::test_as_many_processes",
    "test_pressure.py::test_alone_answers_are_those_of_stock",
    "test_preloaded.py::test_the_same_arguments_hooks_and_answers",
    "test_quality.py::test_a_cut_run_goes_on_at_any_server",
    "test_quality.py::test_a_killed_run_loses_and_repeats_nothing",
    "test_quality.py::test_a_video_that_the_server_cannot_read",
    "test_quality.py::test_policies_and_pruning",
    "test_quality.py::test_the_divergence_is_that_of_the_logprobs",
    "test_throughput.py::test_a_given_server",
    "test_throughput.py::test_a_server_without_metrics",
    "test_throughput.py::test_capacity_trial",
)


def group_of(nodeid: str) -> str:
    """Which tests must run in one worker: those that share servers, a file, a family."""
    test = nodeid.removeprefix("tests/integration/")
    if test.startswith(SHARING):
        return "shared"
    file, _, name = test.partition("::")
    family = name.partition("[")[2] if file in BY_FAMILY else ""
    return file + family


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of `--dist loadgroup`; pytest-xdist 3.8 does not find its own marks under pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Groups(config, log) if config.getoption("dist") == "loadgroup" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long groups go first, so that the workers end together."""
    ours = {}
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        fixtures = getattr(item, "fixturenames", ())
        group = group_of(item.nodeid)
        if SHARED_SERVERS.intersection(fixtures) and group != "shared":
            UNNAMED.append(item.nodeid)
            item.warn(pytest.PytestWarning(f"{item.nodeid} shares a server: name it in SHARING"))
        slow = item.get_closest_marker("slow") or "served" in fixtures
        ours[item] = 0 if group == "shared" else 1 if slow else 2
    in_order = iter(sorted(ours, key=lambda item: ours[item]))
    items[:] = [next(in_order) if item in ours else item for item in items]


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """The shared servers end with the last test that shares them: the next ones need the memory."""
    if group_of(item.nodeid) != "shared" or UNNAMED:
        return
    if nextitem is None or group_of(nextitem.nodeid) != "shared":
        for server in STARTED:
            server.terminate()


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
        STARTED.append(server)
        yield server


@pytest.fixture(scope="session")
def aircache_server(checkpoint: Path) -> Iterator[Server]:
    """A compressing server at its default retention 0.1, overlap scheduling on, strict checks."""
    with Server(checkpoint, SHARED_FLAGS, env=STRICT_MEMORY_CHECKS) as server:
        STARTED.append(server)
        yield server


@pytest.fixture(scope="session")
def serial_server(checkpoint: Path) -> Iterator[Server]:
    """A compressing server without overlap scheduling that prefills 128 tokens at a time."""
    flags = [*COMPRESSING_FLAGS, "--disable-overlap-schedule", "--chunked-prefill-size", "128"]
    with PreloadedServer(checkpoint, flags, env=STRICT_MEMORY_CHECKS) as server:
        STARTED.append(server)
        yield server


@pytest.fixture(scope="session")
def parallel_server(checkpoint: Path) -> Iterator[Server]:
    """A compressing server of two tensor-parallel ranks, each with one of the two KV heads."""
    flags = [*COMPRESSING_FLAGS, "--tp-size", "2"]
    with Server(checkpoint, flags, env=STRICT_MEMORY_CHECKS) as server:
        yield server
