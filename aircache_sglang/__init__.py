# SPDX-License-Identifier: Apache-2.0
"""AirCache for SGLang: importance-aware compression of visual KV."""

from __future__ import annotations

__version__ = "0.1.0"
