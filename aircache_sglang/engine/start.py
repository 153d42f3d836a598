# SPDX-License-Identifier: Apache-2.0
"""What a compressing server does on a GPU before its first request (runtime/warm_up.py)."""

from __future__ import annotations

import logging
import time

import torch

from aircache_sglang.engine.heads import TensorParallelHeads
from aircache_sglang.runtime.gate import CPU, Costs
from aircache_sglang.runtime.warm_up import (
    Kernels,
    costs_of,
    measured,
    room_to_measure,
    seconds_on_gpu,
    warm_up,
)

logger = logging.getLogger(__name__)


def decode_sizes(most: int) -> list[int]:
    """Decode batches for each power of two up to `most`, for which the kernels have own code."""
    sizes = [most]
    while sizes[0] > 16:
        sizes.insert(0, 1 << ((sizes[0] - 1).bit_length() - 1))
    return sizes


def start(kernels: Kernels, heads: TensorParallelHeads) -> Costs:
    """Compile all kernels and time the pass; the costs are the same on every rank.

    In Triton's interpreter nothing is compiled, and its times say nothing of a GPU's.
    """
    if kernels.pool.k_all.device.type != "cuda":
        return CPU
    began = time.perf_counter()
    warm_up(kernels, decode_sizes(kernels.table.req_to_token.shape[0] - 1))
    torch.cuda.synchronize()
    logger.info("aircache: kernels compiled in %.1f s.", time.perf_counter() - began)
    if not room_to_measure(kernels):
        logger.info("aircache: too small a pool to time a pass in; the gate takes %s.", CPU)
        return CPU
    seconds = torch.tensor(measured(kernels, seconds_on_gpu), device=kernels.pool.k_all.device)
    costs = costs_of(heads.mean(seconds).tolist(), kernels.least_read)
    logger.info("aircache: the gate takes %s, in reads of a visual token's KV.", costs)
    return costs
