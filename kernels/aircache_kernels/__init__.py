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
    from aircache_kernels.decode import DecodeConfig, build_text_csr, decode_attention
    from aircache_kernels.extend import extend_attention
    from aircache_kernels.flashinfer_decode import OnePlanDecode
    from aircache_kernels.flashinfer_tables import build_flashinfer_tables
    from aircache_kernels.packing import pack
    from aircache_kernels.rows import lay_out_rows
    from aircache_kernels.scoring import score
    from aircache_kernels.selection import select

_HOME = {
    "score": "scoring",
    "importance_statistics": "budgets",
    "layer_budgets": "budgets",
    "select": "selection",
    "pack": "packing",
    "lay_out_rows": "rows",
    "build_text_csr": "decode",
    "decode_attention": "decode",
    "DecodeConfig": "decode",
    "extend_attention": "extend",
    "build_flashinfer_tables": "flashinfer_tables",
    "OnePlanDecode": "flashinfer_decode",
}

__all__ = [
    "score",
    "importance_statistics",
    "layer_budgets",
    "select",
    "pack",
    "lay_out_rows",
    "build_text_csr",
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
