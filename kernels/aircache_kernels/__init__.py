# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the AirCache pass and of attention over packed cells, beside torch oracles.

Importing this package imports neither triton nor a GPU runtime: the kernels load on first use,
`aircache_kernels.reference` needs torch alone. Nothing here imports SGLang or the rest of this
project. See README.md for the map from equation to kernel to test.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aircache_kernels.budgets import importance_statistics, layer_budgets
    from aircache_kernels.decode import DecodeConfig, decode_attention
    from aircache_kernels.extend import extend_attention
    from aircache_kernels.flashinfer.one_plan import OnePlanDecode
    from aircache_kernels.flashinfer.tables import build_flashinfer_tables
    from aircache_kernels.packing import pack
    from aircache_kernels.rows import lay_out_rows
    from aircache_kernels.scoring import score
    from aircache_kernels.selection import select
    from aircache_kernels.tables import Tables
    from aircache_kernels.threshold import global_budgets

_HOME = {
    "Tables": "tables",
    "score": "scoring",
    "importance_statistics": "budgets",
    "layer_budgets": "budgets",
    "global_budgets": "threshold",
    "select": "selection",
    "pack": "packing",
    "lay_out_rows": "rows",
    "decode_attention": "decode",
    "DecodeConfig": "decode",
    "extend_attention": "extend",
    "build_flashinfer_tables": "flashinfer.tables",
    "OnePlanDecode": "flashinfer.one_plan",
}

__all__ = [
    "Tables",
    "score",
    "importance_statistics",
    "layer_budgets",
    "global_budgets",
    "select",
    "pack",
    "lay_out_rows",
    "decode_attention",
    "DecodeConfig",
    "extend_attention",
    "build_flashinfer_tables",
    "OnePlanDecode",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
