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


def test_a_sampled_answer_has_the_models_probabilities() -> None:
    """What follows the known token, drafted or not, and what follows a draft that was right."""
    n_times, generator = 6000, torch.Generator().manual_seed(0)
    follows = torch.eye(4, dtype=torch.bool)
    follows[:, 0] = True
    follows[3, 1] = True  # 0 has children 1 and 2, and 1 has the child 3
    tokens = torch.tensor([[9, 1, 2, 0]] * n_times)
    after = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.5, 0.0, 0.25, 0.25]])
    probs = after[[0, 1, 1, 1]].repeat(n_times, 1, 1)
    _, *links = described(follows.repeat(n_times, 1, 1), torch.full((n_times,), 3))
    predicts = torch.zeros(n_times * 4, dtype=torch.int32)
    accepted = torch.full((n_times, 4), -1, dtype=torch.int32)
    numbers = torch.zeros(n_times, dtype=torch.int32)
    ngram.verify_sampled(
        *(predicts, accepted, numbers, tokens, *links),
        torch.rand(n_times, 4, generator=generator),
        torch.rand(n_times, generator=generator),
        probs,
        draft_probs=torch.zeros_like(probs),
        threshold_single=1.0,
        threshold_acc=1.0,
        deterministic=True,
    )
    first = predicts.view(n_times, 4)[:, 0].long()
    shares = first.bincount(minlength=4) / n_times
    torch.testing.assert_close(shares, after[0], rtol=0.0, atol=0.03)
    assert torch.equal(numbers > 0, (first == 1) | (first == 2))
    second = predicts.view(n_times, 4)[first == 1, 1].long()
    shares = second.bincount(minlength=4) / len(second)
    torch.testing.assert_close(shares, after[1], rtol=0.0, atol=0.05)


def test_a_coin_of_almost_1_finds_a_token_that_can_be() -> None:
    probs = torch.tensor([[[0.5, 0.5, 0.0]]])
    predicts, accepted = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    none, known = torch.full((1, 1), -1), torch.zeros(1, 1, dtype=torch.int64)
    numbers = torch.zeros(1, dtype=torch.int32)
    ngram.verify_sampled(
        *(predicts, accepted, numbers, known, known, none, none),
        *(torch.ones(1, 1), torch.ones(1), probs),
        threshold_single=1.0,
        threshold_acc=1.0,
    )
    assert predicts.tolist() == [1]


def test_truncated_probabilities() -> None:
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]] * 3)
    top_k = ngram.renormed_top_k(probs, torch.tensor([1, 2, 1 << 30]))
    expected = torch.tensor([[0, 1, 0, 0], [0, 4 / 7, 0, 3 / 7], [0.1, 0.4, 0.2, 0.3]])
    torch.testing.assert_close(top_k, expected)
    top_p = ngram.renormed_top_p(probs, torch.tensor([0.3, 0.65, 1.0]))
    torch.testing.assert_close(top_p, expected)


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
