# SPDX-License-Identifier: Apache-2.0
"""SGLang's HiCache without an accelerator: host pools that are not pinned, and copies in torch.

Its streams and events are those of `torch.cpu`, which do nothing: every copy is done when it was
asked for. Of its ways to copy `--hicache-io-backend direct` is served (mem_cache/pool_host/mha.py
imports the kernels behind it on CUDA and HIP alone).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

# Of the machine's memory; SGLang leaves 10 GiB, which a small machine does not have.
RESERVE_BYTES = 1 << 30


def serve_host_pools() -> None:
    """Give the host pools of this process what they miss on a CPU."""
    from sglang.srt.mem_cache.pool_host import base, common, mha

    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = RESERVE_BYTES
    common.ALLOC_MEMORY_FUNCS["cpu"] = allocate
    for copy in (
        *(transfer_kv_direct, transfer_kv_all_layer_direct_lf_pf),
        transfer_kv_per_layer_direct_pf_lf,
    ):
        setattr(mha, copy.__name__, copy)


def allocate(dims: Any, *, dtype: torch.dtype, device: str, allocator: Any, **_: Any) -> Any:
    """In place of common.alloc_with_host_register, which pins."""
    return allocator.allocate(dims, dtype=dtype, device=device)


def transfer_kv_direct(
    src_layers: Sequence[torch.Tensor],
    dst_layers: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Copy rows of each pair of buffers [rows, heads, dim]."""
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]


def transfer_kv_all_layer_direct_lf_pf(
    src_ptrs: Sequence[torch.Tensor],
    dst_ptrs: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """From the K, then the V of all layers, [rows, heads, dim] each, to the pages of a host K and a
    host V [pages, layers, page_size, heads, dim]; indices name rows of whole pages."""
    pages = dst_indices[::page_size] // page_size
    layers = len(src_ptrs) // len(dst_ptrs)
    for i, source in enumerate(src_ptrs):
        rows = source[src_indices]
        dst_ptrs[i // layers][pages, i % layers] = rows.unflatten(0, (-1, page_size))


def transfer_kv_per_layer_direct_pf_lf(
    src_ptrs: Sequence[torch.Tensor],
    dst_ptrs: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    layer_id: int,
    page_size: int,
) -> None:
    """The way back, of one layer."""
    pages = src_indices[::page_size] // page_size
    for source, target in zip(src_ptrs, dst_ptrs, strict=True):
        target[dst_indices] = source[pages, layer_id].flatten(0, 1)
