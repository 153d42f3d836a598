# SPDX-License-Identifier: Apache-2.0
"""Models of which some layers attend and the others keep a recurrent state.

Only the attending layers have KV, and the pool has planes for them alone. The recurrent state of a
request is its own, and what it has read of a picture stays in it whatever is evicted.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from aircache_sglang.engine.backend import AttentionState, adopt
from aircache_sglang.engine.radix_cache import AirCacheRadixCache


def attending_pool(pool: Any) -> Any:
    """The KV pool of the attending layers (mem_cache/memory_pool.py, HybridLinearKVPool); a pool
    of another kind is that itself."""
    return getattr(pool, "full_kv_pool", pool)


class StatefulCache(AirCacheRadixCache):
    """Without a tree: a request's recurrent state goes with its row.

    SGLang's own is UnifiedRadixCache with a component for the states, switched off
    (mem_cache/unified_cache/components/mamba.py).
    """

    def supports_mamba(self) -> bool:
        """Whether models with recurrent states may be served (mem_cache/registry.py)."""
        return True

    def mamba_evictable_size(self) -> int:
        """States that the tree could give up: it has none."""
        return 0

    def mamba_protected_size(self) -> int:
        """States in the tree that requests hold."""
        return 0

    def all_mamba_values_flatten(self) -> torch.Tensor:
        """Slots of the states in the tree, int64 [0]."""
        return torch.empty(0, dtype=torch.int64)

    def on_release(self, req: Any, *, checkpointed: bool) -> None:
        super().on_release(req, checkpointed=checkpointed)
        if req.kv.holds_mamba:
            self.req_to_token_pool.free_mamba_cache(req)


@functools.cache
def _passing_on(stock: type) -> type:
    """The subclass of SGLang's wrapper around two backends that asks the attending one whole."""

    class PassingOnBackend(stock):
        def forward(
            self,
            q: Any = None,
            k: Any = None,
            v: Any = None,
            layer: Any = None,
            forward_batch: Any = None,
            save_kv_cache: bool = True,
            **kwargs: Any,
        ) -> Any:
            """The wrapper would call `forward_extend` or `forward_decode`, behind ours."""
            if self._is_full_attn(layer, kwargs.get("layer_id")):
                return self.full_attn_backend.forward(
                    q, k, v, layer, forward_batch, save_kv_cache, **kwargs
                )
            return super().forward(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)

        def can_run_prefill_cuda_graph(self, forward_batch: Any) -> bool:
            """Asked of the outermost backend alone."""
            return bool(self.full_attn_backend.can_run_prefill_cuda_graph(forward_batch))

        def resolve_prefill_shared_read_ends(self, forward_batch: Any, **kwargs: Any) -> Any:
            """With work of ours, what it says; else as the wrapper's."""
            if self.full_attn_backend.aircache.work.is_more:
                return self.full_attn_backend.resolve_prefill_shared_read_ends(
                    forward_batch, **kwargs
                )
            return super().resolve_prefill_shared_read_ends(forward_batch, **kwargs)

    PassingOnBackend.__name__ = PassingOnBackend.__qualname__ = f"AirCache{stock.__name__}"
    return PassingOnBackend


def adopt_attending(backend: Any, state: AttentionState) -> None:
    """Make the attending part of a backend a compressing one; a plain backend is all of it."""
    attending = getattr(backend, "full_attn_backend", None)
    if attending is None:
        adopt(backend, state)
        return
    adopt(attending, state)
    stock: type = type(backend)
    backend.__class__ = _passing_on(stock)
