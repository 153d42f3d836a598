# SPDX-License-Identifier: Apache-2.0
"""A real server, tiny checkpoints and the Transformers oracle.

What tests, benchmarks and examples share. It needs the `dev` extra, but neither pytest nor, before
a server starts, SGLang; nothing outside this package imports it, a server least of all.
"""

from __future__ import annotations

from aircache_sglang.testing.load import LoadWatch
from aircache_sglang.testing.server import Client, Server, ServerError, png_data_url

__all__ = ["Client", "LoadWatch", "Server", "ServerError", "png_data_url"]
