# SPDX-License-Identifier: Apache-2.0
"""SGLang's KV pool with the planes that packing needs."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool

from aircache_sglang.runtime.kv_planes import KVPlanes

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)


class LayerContiguousKVPool(KVPlanes, MHATokenToKVPool):
    """SGLang's MHA pool with the buffers of all layers in one tensor.

    `k_buffer[l]` and `v_buffer[l]` stay SGLang's per-layer views, so every stock reader and writer
    works unchanged (mem_cache/memory_pool.py, MHATokenToKVPool._create_buffers_normal).
    """

    def _create_buffers_normal(self) -> None:
        if self.use_hnd or self.kv_cache_layout != "nhd":
            raise ValueError(
                "--kv-policy needs the token-major KV layout, "
                f"got {self.kv_cache_layout!r}; drop the flag that selects it"
            )
        if self.head_dim != self.v_head_dim:
            raise ValueError(
                "--kv-policy needs keys and values of one head size, "
                f"got {self.head_dim} and {self.v_head_dim}"
            )
        if self.dtype not in _DTYPES:
            raise ValueError(
                "--kv-policy holds KV of 16 or 32 bits, or float8_e4m3fn, "
                f"got {self.dtype}; set --kv-cache-dtype bf16"
            )
        shape = (self.layer_num, self.size + self.page_size, self.head_num, self.head_dim)
        with self.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE):
            self.create_planes(shape, self.dtype, self.store_dtype, self.device)

    def write(self, layer: Any, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store one layer's K and V, in its own type and scaling."""
        # A hybrid model's pool has planes for its attending layers alone, without their numbers
        # (mem_cache/memory_pool.py, HybridLinearKVPool).
        number = self.start_layer + self.plane(layer)
        self.set_kv_buffer(layer, KVWriteLoc(slots, None), k, v, layer_id_override=number)

    def wait_for_load(self, load: int) -> None:
        """Let the current stream wait until all layers of a load from host memory are here.

        load: of those that the counter holds apart (managers/cache_controller.py,
            LayerDoneCounter); its layers are copied in their order.
        """
        counter = self.layer_transfer_counter
        counter.events[load].wait(counter.num_layers - 1)
