# SPDX-License-Identifier: Apache-2.0
"""Models of which some layers attend and the others keep a recurrent state.

Only the attending layers have KV, and the pool has planes for them alone. What a recurrent state
has read of a picture stays in it whatever is evicted. States in the radix cache: stateful_cache.py.
"""

from __future__ import annotations

import functools
from typing import Any

from aircache_sglang.engine.backend import AttentionState, adopt


def attending_pool(pool: Any) -> Any:
    """The KV pool of the attending layers (mem_cache/memory_pool.py, HybridLinearKVPool); a pool
    of another kind is that itself."""
    return getattr(pool, "full_kv_pool", pool)


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
