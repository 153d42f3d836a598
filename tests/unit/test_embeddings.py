# SPDX-License-Identifier: Apache-2.0
"""What an update of the weights does to SGLang's vision embeddings."""

from __future__ import annotations

import pytest
import torch
from sglang.srt.managers import mm_schedule
from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager
from sglang.srt.mem_cache.multimodal_cache import EmbeddingResult, MultiModalStaticCache

from aircache_patches import embeddings


def test_embeddings_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = MultiModalStaticCache(1 << 20)
    cache.set(7, EmbeddingResult(embedding=torch.ones(4, 8)))
    monkeypatch.setattr(mm_schedule, "embedding_cache", cache)
    # A hook before SGLang's function changes its arguments unless it returns None.
    assert embeddings.flush_cache_after_weight_update(object()) is None
    assert len(cache) == 0 and cache.current_size == 0
    cache.set(7, EmbeddingResult(embedding=torch.zeros(4, 8)))
    found = cache.get_single(7)
    assert found is not None and not found.embedding.any()


def test_a_model_without_pictures_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mm_schedule, "embedding_cache", None)
    assert embeddings.flush_cache_after_weight_update(object()) is None


def test_every_update_that_succeeds_comes_by() -> None:
    """By name in the bytecode: an SGLang that goes another way needs another hook."""
    for update in ("disk", "distributed", "tensor", "ipc"):
        method = getattr(SchedulerWeightUpdaterManager, f"update_weights_from_{update}")
        assert "flush_cache_after_weight_update" in method.__code__.co_names
