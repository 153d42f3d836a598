# SPDX-License-Identifier: Apache-2.0
"""SGLang's leak check while busy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aircache_patches import process


def kv_private_tokens(original: Callable[..., int], kv: Any, page_size: int) -> int:
    """AROUND kv_private_tokens: slots a request owns outside the tree."""
    stock = original(kv, page_size)
    record = process.compressor().records.get(kv.req_pool_idx)
    return stock if record is None else record.private_tokens(stock)
