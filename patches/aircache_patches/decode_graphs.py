# SPDX-License-Identifier: Apache-2.0
"""Decode CUDA graphs for the batches that packing makes room for, and the memory they take.

SGLang 0.5.23 captures batch sizes up to 256 on an H100 and runs larger batches eagerly, while its
pool takes 2,048 requests or more. Packed requests fill a pool of the same bytes with more of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of, resolving_view
from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase
from sglang.srt.utils.common import get_device_memory_capacity

logger = logging.getLogger(__name__)

# SGLang's own estimates in MiB (arg_groups/memory_hook.py, reserve_for_graph_mb): of one more
# request in the largest batch, and of a graph outside the memory pool that all graphs share.
_REQUEST_MIB = 2.0
_GRAPH_MIB = 8.0
# The largest index that a backend's static page table holds a token of a request (Triton's int64).
_INDEX_BYTES = 8
# Five of six prompt tokens are a picture's: then retention 0.1 takes a quarter of the slots.
_VISUAL_SHARE = 5 / 6
# What graphs may take of the device beyond SGLang's own budget.
_MEMORY_SHARE = 1 / 32
# Without --max-running-requests SGLang runs at least so many where the pool has two tokens for
# each (mem_cache/kv_cache_configurator.py, resolve_max_num_reqs).
_RUNNING_REQUESTS = 2048


def concurrency_gain(retention: float) -> float:
    """How many requests fit where one did, by the share of visual KV that is kept."""
    return 1 / (1 - _VISUAL_SHARE + _VISUAL_SHARE * retention)


def further_sizes(largest: int, target: int) -> list[int]:
    """Batch sizes above `largest` up to `target`, in steps of an eighth, rounded to powers of 2."""
    sizes = []
    while largest < target:
        step = max(8, 1 << (largest.bit_length() - 4))
        largest = min(target, (largest // step + 1) * step)
        sizes.append(largest)
    return sizes


def extra_mib(sizes: Sequence[int], stock: Sequence[int], context_len: int) -> float:
    """Memory of the graphs of `sizes`, each captured twice, beyond SGLang's budget for `stock`."""
    per_request = _REQUEST_MIB + context_len * _INDEX_BYTES / 2**20
    return (max(sizes) - max(stock)) * per_request + len(sizes) * _GRAPH_MIB


def handle_gpu_memory_settings(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Capture larger batches and reserve their memory, where the operator left both open."""
    view = resolving_view(server_args)
    memory_is_open = view.mem_fraction_static is None
    previous(server_args)
    graphs = view.cuda_graph_config.decode
    if view.device != "cuda" or graphs.backend == Backend.DISABLED:
        return
    if view.speculative_algorithm is not None:
        # SGLang's own sizes: a request is as many rows as it has drafts.
        return
    sizes = sorted(graphs.bs)
    running = view.max_running_requests or _RUNNING_REQUESTS
    flag = _operators_flag(server_args, view)
    if flag is None and not memory_is_open:
        flag = "--cuda-graph-max-bs-decode"
    if flag is not None:
        if running > sizes[-1] and server_args.aircache_retention < 1:
            logger.warning(
                "aircache: %d requests may run at once, and decode steps of more than %d run "
                "without a CUDA graph; raise %s, or lower --max-running-requests.",
                running,
                sizes[-1],
                flag,
            )
        return
    device_mib = get_device_memory_capacity(view.device)
    context_len = model_config_of(server_args).context_len
    target = min(running, int(sizes[-1] * concurrency_gain(server_args.aircache_retention)))
    further = further_sizes(sizes[-1], target)
    while further and extra_mib(sizes + further, sizes, context_len) > device_mib * _MEMORY_SHARE:
        further.pop()
    extra = extra_mib(sizes + further, sizes, context_len)
    fraction = view.mem_fraction_static - extra / device_mib
    logger.info(
        "aircache: decode graphs for batches of up to %d (SGLang's default: %d), two for each of "
        "%d sizes; %.1f GiB more are kept free for them: mem_fraction_static %.3f instead of %.3f.",
        (sizes + further)[-1],
        sizes[-1],
        len(sizes + further),
        extra / 1024,
        fraction,
        view.mem_fraction_static,
    )
    declare_resolution(
        server_args,
        "aircache.decode_graphs",
        cuda_graph_config=with_phase(
            view.cuda_graph_config,
            Phase.DECODE,
            bs=sizes + further,
            max_bs=(sizes + further)[-1],
        ),
        mem_fraction_static=fraction,
    )


def _operators_flag(server_args: Any, view: Any) -> str | None:
    """The flag with which the operator chose the sizes, None if they are SGLang's."""
    chosen = server_args._cuda_graph_config_locked
    for key, flag in (
        ("bs", "--cuda-graph-bs-decode"),
        ("max_bs", "--cuda-graph-max-bs-decode"),
    ):
        if (Phase.DECODE, key) in chosen:
            named = getattr(view, flag[2:].replace("-", "_")) is not None
            return flag if named else "--cuda-graph-config"
    # Every size up to the largest is captured then.
    return "--cuda-graph-max-bs-decode" if view.disable_cuda_graph_padding else None
