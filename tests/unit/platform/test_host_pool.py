# SPDX-License-Identifier: Apache-2.0
"""HiCache's host pools on a plain CPU: what SGLang imports on an accelerator alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.pool_host import base, common, mha

from aircache_sglang.platform.host_pool import RESERVE_BYTES, serve_host_pools

PAGE, LAYERS = 4, 3


@pytest.fixture(autouse=True)
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    name = "HICACHE_HOST_MEMORY_RESERVE_BYTES"
    monkeypatch.setattr(base, name, getattr(base, name))
    # In place: SGLang's modules have imported it by name.
    before = dict(common.ALLOC_MEMORY_FUNCS)
    serve_host_pools()
    yield
    common.ALLOC_MEMORY_FUNCS.clear()
    common.ALLOC_MEMORY_FUNCS.update(before)


@pytest.mark.parametrize("layout", ["layer_first", "page_first_direct"])
def test_pages_go_to_host_memory_and_come_back(layout: str) -> None:
    """A pool as SGLang builds it, which asks for pinned memory."""
    device = MHATokenToKVPool(
        32, PAGE, torch.float32, 2, 8, LAYERS, "cpu", enable_memory_saver=False
    )
    host = mha.MHATokenToKVPoolHost(
        *(device.get_device_pool_infos()[0].buffer_info, 2.0, 0, PAGE, layout),
        device_capacity_tokens=32,
        start_layer=0,
        end_layer=LAYERS,
    )
    assert base.HICACHE_HOST_MEMORY_RESERVE_BYTES == RESERVE_BYTES
    for buffer in (*device.k_buffer, *device.v_buffer):
        buffer.copy_(torch.randn_like(buffer))
    before = [buffer.clone() for buffer in (*device.k_buffer, *device.v_buffer)]
    host.alloc(PAGE)
    places = host.alloc(2 * PAGE)
    slots = torch.tensor([20, 21, 22, 23, 8, 9, 10, 11])
    host.backup_from_device_all_layer(device, places, slots, "direct")
    other = torch.tensor([28, 29, 30, 31, 4, 5, 6, 7])
    for layer in range(LAYERS):
        host.load_to_device_per_layer(device, places, other, layer, "direct")
    for old, new in zip(before, (*device.k_buffer, *device.v_buffer), strict=True):
        expected = old.clone()
        expected[other] = old[slots]
        assert torch.equal(new, expected)
    host.destroy()
