# SPDX-License-Identifier: Apache-2.0
"""The trees of drafts in SGLang's mask of a verify step."""

from __future__ import annotations

import torch

from aircache_sglang.runtime.drafts import tree_of


def test_trees_behind_prefixes_of_any_length() -> None:
    """The mask as ngram_worker.py lays it out: all of the prefix, then the tree, row by row."""
    n, lengths = 5, [7, 1, 30]
    trees = torch.rand(3, n, n, generator=torch.Generator().manual_seed(0)) < 0.5
    parts = [
        torch.cat([torch.ones(n, length), tree], dim=1).bool().flatten()
        for length, tree in zip(lengths, trees, strict=True)
    ]
    for dtype in (torch.int32, torch.int64):
        found = tree_of(torch.cat(parts), torch.tensor(lengths, dtype=dtype), n)
        assert found.is_contiguous() and torch.equal(found, trees)
