# SPDX-License-Identifier: Apache-2.0
"""What keeps tensor-parallel ranks together: settings, means, and who is declined."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing as processes

from aircache_sglang.config import AirCacheConfig
from aircache_sglang.engine.compressor import Compressor
from aircache_sglang.engine.request import RequestState, state_of
from aircache_sglang.runtime.decide import Intent, Reason
from aircache_sglang.runtime.spans import VisualPrompt
from tests.support.ranks import RANKS, in_a_group


def test_ranks_compare_their_settings_and_share_their_means(tmp_path: Path) -> None:
    with processes.Manager() as manager:
        results = manager.dict()
        processes.spawn(in_a_group, args=(str(tmp_path / "group"), results), nprocs=RANKS)
        (said, *found), *others = [results[rank] for rank in range(RANKS)]
    # To the bit: `min_visual_mass` compares them with a threshold on each rank.
    assert others == [(said, *found)]
    assert "same settings on every tensor-parallel rank" in said
    assert "rank 0: ('retention', 0.1)" in said and "rank 1: ('retention', 0.2)" in said


class Pool:
    """An allocator and a tree from which at most `room` slots can be had."""

    def __init__(self, room: int) -> None:
        self.room, self.asked = room, 0
        self.token_to_kv_pool_allocator = self

    def alloc(self, n: int) -> torch.Tensor | None:
        self.asked += n
        return torch.arange(1, n + 1) if n <= self.room else None


def test_a_request_without_columns_is_served_uncompressed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what its earlier chunks have kept for the pass is dropped."""
    monkeypatch.setattr(
        "aircache_sglang.engine.compressor.evict_from_tree_cache", lambda tree, n: None
    )
    reasons: list[Reason] = []
    compressor = Compressor.__new__(Compressor)
    compressor.records = {}
    compressor.metrics = SimpleNamespace(left_alone=reasons.append)  # type: ignore[assignment]
    compressor.table = SimpleNamespace(  # type: ignore[assignment]
        req_to_token=torch.arange(60, dtype=torch.int32).view(2, 30)
    )
    intent = Intent(AirCacheConfig(), VisualPrompt(((2, 12),), 20, 10), columns=4)
    reqs: list[Any] = [
        SimpleNamespace(
            kv=SimpleNamespace(req_pool_idx=row),
            last_node=SimpleNamespace(replica=None),
            extend_batch_idx=2,
            extend_end=20,
            full_untruncated_fill_ids=range(20),
            origin_input_ids=range(20),
            aircache=RequestState(decided_for=20, intent=intent, stash=object()),  # type: ignore[arg-type]
        )
        for row in range(2)
    ]
    pool = Pool(room=4)
    compressor.allocate_columns(SimpleNamespace(reqs=reqs[:1], tree_cache=pool))
    pool.room = 3
    compressor.allocate_columns(SimpleNamespace(reqs=reqs[1:], tree_cache=pool))
    assert list(compressor.records) == [0] and reasons == [Reason.NO_FREE_SLOTS]
    assert compressor.records[0].originals.tolist() == list(range(12))
    left = state_of(reqs[1])
    assert (left.intent, left.stash, left.reason) == (None, None, Reason.NO_FREE_SLOTS)
    assert compressor.intent(reqs[1]) is None and pool.asked == 8
