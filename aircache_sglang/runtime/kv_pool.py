# SPDX-License-Identifier: Apache-2.0
"""A KV pool in which any layer can read any cell."""

from __future__ import annotations

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)


class LayerContiguousKVPool(MHATokenToKVPool):
    """SGLang's MHA pool with the buffers of all layers in one tensor [2, L, rows, H_kv, D].

    `k_all` and `v_all` are its halves [L, rows, H_kv, D]; `k_buffer[l]` and `v_buffer[l]` stay
    SGLang's per-layer views of them, so every stock reader and writer works unchanged
    (mem_cache/memory_pool.py, MHATokenToKVPool._create_buffers_normal). Row `slot` of plane `l` is
    the absolute row `l * rows + slot`, with rows = size + page_size: slot 0 is the padding slot.

    With float8 KV SGLang's views are raw bytes, ours have the type itself.
    """

    k_all: torch.Tensor
    v_all: torch.Tensor

    def _create_buffers_normal(self) -> None:
        if self.use_hnd or self.kv_cache_layout != "nhd":
            raise ValueError(
                "--kv-policy aircache needs the token-major KV layout, "
                f"got {self.kv_cache_layout!r}; drop the flag that selects it"
            )
        if self.head_dim != self.v_head_dim:
            raise ValueError(
                "--kv-policy aircache needs keys and values of one head size, "
                f"got {self.head_dim} and {self.v_head_dim}"
            )
        if self.dtype not in _DTYPES:
            raise ValueError(
                "--kv-policy aircache holds KV of 16 or 32 bits, or float8_e4m3fn, "
                f"got {self.dtype}; set --kv-cache-dtype bf16"
            )
        rows = self.size + self.page_size
        with self.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE):
            cells = torch.zeros(
                (2, self.layer_num, rows, self.head_num, self.head_dim),
                dtype=self.store_dtype,
                device=self.device,
            )
        self.k_all, self.v_all = cells.view(self.dtype).unbind(0)
        self.k_buffer, self.v_buffer = (list(half.unbind(0)) for half in cells.unbind(0))

    @property
    def rows(self) -> int:
        """Rows of one plane, the padding slot included."""
        return int(self.k_all.shape[1])
