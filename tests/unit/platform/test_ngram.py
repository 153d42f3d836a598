# SPDX-License-Identifier: Apache-2.0
"""What n-gram speculation needs of SGLang's kernels, in torch."""

from __future__ import annotations

import sys

import pytest
import torch

from aircache_sglang.platform import has_accelerator

if has_accelerator():
    pytest.skip("the plain-CPU platform is for machines without one", allow_module_level=True)

from aircache_sglang.platform import ngram


def random_trees(batch: int, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [batch, n, n], whether node i follows node j, itself included; their parents [batch, n].

    Siblings say different things, as in SGLang's corpus.
    """
    generator = torch.Generator().manual_seed(seed)
    trees = torch.eye(n, dtype=torch.bool).repeat(batch, 1, 1)
    parents = torch.full((batch, n), -1)
    for b in range(batch):
        for node in range(1, n):
            parents[b, node] = torch.randint(0, node, (), generator=generator)
            trees[b, node] |= trees[b, parents[b, node]]
    return trees, parents


def described(trees: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
    """Positions, indices, first children and next siblings, each [B, n]."""
    batch, n, _ = trees.shape
    positions = torch.full((batch * n,), -7)
    links = [torch.full((batch, n), -7) for _ in range(3)]
    ngram.describe_trees(trees.flatten(), lengths, positions, *links, batch, n)
    return [positions.view(batch, n), *links]


@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_trees_are_described_as_by_sglang(n: int) -> None:
    """Against its own derivation on the host, which grammars use."""
    derive = sys.modules[ngram.worker().__module__]._derive_tree_links
    trees, parents = random_trees(5, n, seed=n)
    lengths = torch.tensor([3, 100, 17, 1, 64])
    positions, index, children, siblings = described(trees, lengths)
    want_children, want_siblings = derive(trees.numpy(), 5, n)
    assert torch.equal(children, want_children) and torch.equal(siblings, want_siblings)
    assert torch.equal(index, torch.arange(5 * n).view(5, n))
    for b in range(5):
        for node in range(n):
            parent = int(parents[b, node])
            expected = lengths[b] if parent < 0 else positions[b, parent] + 1
            assert positions[b, node] == expected


def test_a_tree_is_followed_as_long_as_it_is_right() -> None:
    """Node 0 has children 1 and 2, and 2 has 3 and 4; padding hangs below node 0."""
    follows = torch.eye(6, dtype=torch.bool)
    follows[:, 0] = True
    follows[3, 2] = follows[4, 2] = True
    tokens = [9, 20, 21, 30, 31, 0]
    said = {
        (21, 31): ([0, 2, 4], [21, 31, 55]),
        (21, 40): ([0, 2], [21, 40]),
        (20, 31): ([0, 1], [20, 55]),
        (77, 31): ([0], [77]),
    }
    asked, count = list(said), len(said)
    trees = follows.repeat(count, 1, 1)
    _, *links = described(trees, torch.full((count,), 3))
    target = torch.full((count, 6), 55)
    for b, (first, second) in enumerate(asked):
        target[b, 0], target[b, 2] = first, second
    predicts = torch.zeros(count * 6, dtype=torch.int32)
    accepted = torch.full((count, 6), -1, dtype=torch.int32)
    numbers = torch.full((count,), -7, dtype=torch.int32)
    candidates = torch.tensor([tokens] * count)
    done = ngram.verify_greedy(predicts, accepted, numbers, candidates, *links, target)
    assert [part.data_ptr() for part in done] == [
        part.data_ptr() for part in (predicts, accepted, numbers)
    ]
    for b, (path, answer) in enumerate(said.values()):
        assert numbers[b] == len(path) - 1
        assert accepted[b].tolist() == [*(b * 6 + node for node in path), *[-1] * (6 - len(path))]
        assert predicts[accepted[b, : len(path)].long()].tolist() == answer


def test_slots_of_drafts_are_dealt_read_and_moved_to_the_front() -> None:
    rows, table = torch.tensor([2, 0]), torch.zeros(3, 9, dtype=torch.int32)
    start, end = torch.tensor([4, 1]), torch.tensor([7, 4])
    slots = torch.arange(11, 17)
    ngram.write_rows(rows, table, start, end, slots, 2)
    assert table.tolist() == [
        [0, 14, 15, 16, 0, 0, 0, 0, 0],
        [0] * 9,
        [0, 0, 0, 0, 11, 12, 13, 0, 0],
    ]
    window = ngram.draft_slots(
        req_pool_indices=rows,
        req_to_token=table,
        start_offset=start,
        end_offset=end,
        batch_size=2,
        draft_token_num=3,
        device="cpu",
    )
    assert torch.equal(window, slots)
    # The first request's nodes 0 and 2 are accepted, the second's node 0.
    accepted = torch.tensor([[0, 2, -1], [3, -1, -1]], dtype=torch.int32)
    to, source = torch.zeros(6, dtype=torch.int64), torch.zeros(6, dtype=torch.int64)
    ngram.front_slots(torch.tensor([2, 1]), window, to)
    ngram.accepted_slots(accepted, window, source, 6)
    assert to.tolist() == [11, 12, 14, 0, 0, 0] and source.tolist() == [11, 13, 14, 0, 0, 0]


def test_only_n_grams() -> None:
    from sglang.srt.platforms import current_platform

    served = {
        name: current_platform.supports_speculative_algorithm(name) for name in ("NGRAM", "EAGLE")
    }
    assert served == {"NGRAM": True, "EAGLE": False}
    assert current_platform.get_speculative_worker_cls("EAGLE") is None
    assert current_platform.get_speculative_worker_cls("NGRAM").__name__ == "NGRAMWorker"
