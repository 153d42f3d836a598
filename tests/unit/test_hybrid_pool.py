# SPDX-License-Identifier: Apache-2.0
"""A hybrid model's KV pool has planes for the layers that attend."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool

from aircache_sglang.engine.hybrid import attending_pool
from aircache_sglang.engine.kv_pool import LayerContiguousKVPool

SIZE, HEADS, HEAD_DIM = 6, 2, 4
ATTENDING = [3, 7, 11]


@pytest.fixture
def pool() -> HybridLinearKVPool:
    """SGLang's own, around ours, without recurrent states."""
    return HybridLinearKVPool(
        size=SIZE,
        dtype=torch.float32,
        page_size=1,
        head_num=HEADS,
        head_dim=HEAD_DIM,
        full_attention_layer_ids=ATTENDING,
        device="cpu",
        mamba_pool=None,  # type: ignore[arg-type]
        full_kv_pool_class=LayerContiguousKVPool,
    )


def test_a_layer_is_written_to_its_plane(pool: HybridLinearKVPool) -> None:
    planes = attending_pool(pool)
    assert isinstance(planes, LayerContiguousKVPool) and planes.layer_num == 3
    slots = torch.tensor([2, 5])
    for number in ATTENDING:
        layer = SimpleNamespace(layer_id=number)
        k = torch.full((2, HEADS, HEAD_DIM), float(number))
        planes.write(layer, slots, k, -k)
        # As SGLang's attention reads it.
        assert torch.equal(pool.get_key_buffer(number)[slots], k)
        assert torch.equal(planes.k_all[planes.plane(layer)][slots], k)
        assert torch.equal(planes.v_all[planes.plane(layer)][slots], -k)


def test_a_layer_that_does_not_attend_has_no_plane(pool: HybridLinearKVPool) -> None:
    with pytest.raises(ValueError):
        attending_pool(pool).plane(SimpleNamespace(layer_id=4))


def test_a_plain_pool_is_its_own() -> None:
    plain = LayerContiguousKVPool(SIZE, 1, torch.float32, HEADS, HEAD_DIM, 2, "cpu", False)
    assert attending_pool(plain) is plain
    assert [plain.plane(SimpleNamespace(layer_id=i)) for i in range(2)] == [0, 1]
