# SPDX-License-Identifier: Apache-2.0
"""The compressor of this process: a scheduler has one model runner, and so one compressor."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aircache_sglang.engine.compressor import Compressor

_compressor: Compressor | None = None


def set_compressor(compressor: Compressor) -> None:
    """Called when the model runner has its attention backend."""
    global _compressor
    _compressor = compressor


def compressor() -> Compressor:
    """The compressor; hooks on the scheduler run only after the model runner is built."""
    assert _compressor is not None, "no model runner has been initialised in this process"
    return _compressor
