# SPDX-License-Identifier: Apache-2.0
"""The sizes of decode steps that are compiled at the start."""

from __future__ import annotations

import pytest

from aircache_kernels.launch import power_of_2
from aircache_sglang.engine.start import decode_sizes


@pytest.mark.parametrize("most", [1, 7, 16, 17, 64, 100, 256, 2048, 3000])
def test_every_block_of_rows_is_there(most: int) -> None:
    """BLOCK_B of aircache_kernels/decode.py, whatever the batch."""
    sizes = decode_sizes(most)
    assert max(sizes) == most and min(sizes) >= 1
    wanted = {power_of_2(batch, 16) for batch in range(1, most + 1)}
    assert {power_of_2(size, 16) for size in sizes} == wanted
