# SPDX-License-Identifier: Apache-2.0
"""What SGLang's memory saver releases and resumes of a compressing server's KV pool.

It keeps addresses and loses contents, of what was allocated in its region. Kernels that read
nothing but what they were given are held to that by pools of NaN (tests/unit/kernels/cases.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter

from aircache_sglang.engine.kv_pool import LayerContiguousKVPool
from aircache_sglang.runtime.kv_planes import KVPlanes


def test_all_planes_are_one_allocation_in_the_region_of_the_kv_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    open_regions: list[str] = []
    allocated_in: list[list[str]] = []

    class Saver:
        @contextlib.contextmanager
        def region(self, tag: str, enable_cpu_backup: bool = False) -> Iterator[None]:
            open_regions.append(tag)
            yield
            open_regions.remove(tag)

    create_planes = KVPlanes.create_planes

    def recorded(*args: Any) -> None:
        allocated_in.append(list(open_regions))
        create_planes(*args)

    monkeypatch.setattr(TorchMemorySaverAdapter, "create", lambda enable: Saver())
    monkeypatch.setattr(KVPlanes, "create_planes", recorded)
    pool = LayerContiguousKVPool(30, 1, torch.float32, 2, 4, 3, "cpu", enable_memory_saver=True)
    assert allocated_in == [[GPU_MEMORY_TYPE_KV_CACHE]]
    views = (pool.k_all, pool.v_all, *pool.k_buffer, *pool.v_buffer)
    assert len({view.untyped_storage().data_ptr() for view in views}) == 1
