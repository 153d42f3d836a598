# SPDX-License-Identifier: Apache-2.0
"""One tensor-parallel rank in a process of its own, with nothing of SGLang."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from aircache_sglang.engine.heads import TensorParallelHeads
from aircache_sglang.policy import global_counts

RANKS = 2


def in_a_group(rank: int, file: str, results: Any) -> None:
    """What `check_same` says of equal and of unequal settings, the bits of a few means, and what
    of the highest scores each of 5 layers has."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=RANKS
    )
    world = torch.distributed.group.WORLD
    group = SimpleNamespace(
        world_size=RANKS, rank_in_group=rank, device_group=world, cpu_group=world
    )
    heads = TensorParallelHeads(group, RANKS)
    heads.check_same(("retention", 0.1))
    said = ""
    try:
        heads.check_same(("retention", 0.1 * (1 + rank)))
    except RuntimeError as error:
        said = str(error)
    numbers = torch.Generator().manual_seed(rank)
    means = [
        heads.mean(torch.rand(size, dtype=torch.float64, generator=numbers)).tolist()
        for size in (1, 7, 6, 5000)
    ]
    scores = torch.rand((5, 2 * RANKS, 77), generator=torch.Generator().manual_seed(9))
    scores = (scores * 50).round() / 50  # ties
    counts = [
        global_counts(scores[:, 2 * rank :][:, :2], cells, heads.total).tolist()
        for cells in (5 * 4, 5 * 4 * 9, 5 * 4 * 77)
    ]
    alone = [global_counts(scores, cells).tolist() for cells in (5 * 4, 5 * 4 * 9, 5 * 4 * 77)]
    assert counts == alone, "to the bit what one rank counts"
    results[rank] = (said, means, counts)
    torch.distributed.destroy_process_group()
