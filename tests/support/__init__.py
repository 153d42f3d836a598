# SPDX-License-Identifier: Apache-2.0
"""Helpers of the integration tests, the demo and the benchmarks."""

from __future__ import annotations

from tests.support.load import LoadWatch
from tests.support.server import Client, Server, ServerError, png_data_url

__all__ = ["Client", "LoadWatch", "Server", "ServerError", "png_data_url"]
