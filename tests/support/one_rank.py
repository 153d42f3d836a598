# SPDX-License-Identifier: Apache-2.0
"""A tensor-parallel group of one rank, as a server without `--tp-size` has it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from aircache_sglang.engine.heads import TensorParallelHeads

GROUP: Any = SimpleNamespace(world_size=1)
ONE_RANK = TensorParallelHeads(GROUP, n_kv_heads=1)
