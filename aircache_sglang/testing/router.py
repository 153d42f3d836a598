# SPDX-License-Identifier: Apache-2.0
"""SGLang's router in front of servers (`sglang-router`, of the extra `pd`)."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from aircache_sglang.testing.pair import Pair, packages
from aircache_sglang.testing.server import Server, ServerError, free_port


class Router(Server):
    """`python -m sglang_router.launch_router` on free ports of 127.0.0.1.

    Args:
        workers: URLs of servers, or a pair.
        flags: further flags of the router.
    """

    def __init__(self, workers: Sequence[str] | Pair, flags: Sequence[str] = ()) -> None:
        super().__init__("default", env={"PYTHONPATH": str(packages())})
        if isinstance(workers, Pair):
            servers = [
                *("--pd-disaggregation", "--decode", workers.decode.url),
                *("--prefill", workers.prefill.url, str(workers.bootstrap_port)),
            ]
        else:
            servers = ["--worker-urls", *workers]
        self.argv = [
            *(sys.executable, "-m", "sglang_router.launch_router", *servers),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())),
            *flags,
        ]

    def start(self) -> None:
        """Start it and wait until its servers are known, which `/health` does not wait for."""
        super().start()
        deadline = time.monotonic() + self.timeout
        # The small one (`--mini-lb`) has no such path, and asks its servers for every request.
        while self.request("GET", "/readiness").status_code not in (200, 404):
            if time.monotonic() > deadline:
                self.terminate()
                raise ServerError(f"the router has found no servers\n{self.log_tail()}")
            time.sleep(0.2)
