# SPDX-License-Identifier: Apache-2.0
"""What all kernels share: launch helpers and the one map from cells to memory."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
_TL = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def dot_dtype(q_dtype: torch.dtype) -> Any:
    """Type in which q, k, p and v meet in `tl.dot`: that of q, with float32 accumulation.

    The interpreter has no bfloat16 arithmetic, so there bfloat16 becomes float32 after the load.
    """
    if INTERPRETED and q_dtype == torch.bfloat16:
        return tl.float32
    return _TL[q_dtype]


def power_of_2(value: int, least: int = 1) -> int:
    return max(least, 1 << max(0, value - 1).bit_length())


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 8 stands in for them under the interpreter."""
    if device.type != "cuda":
        return 8
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@triton.jit
def cell_address(cell, NUM_LAYERS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Column (ordinal among the request's columns) and plane of a cell; sequential map."""
    return cell // NUM_LAYERS, cell % NUM_LAYERS
