# SPDX-License-Identifier: Apache-2.0
"""Each peer of AirCache against its paper, restated with loops; attention mass and merging."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from aircache_sglang.policy import (
    Policy,
    States,
    accumulate,
    get_policy,
    importance_batched,
    layer_budgets,
    merge_dropped,
    prompt_attention,
    select,
    select_padded,
    visual_mass,
)
from tests.unit.policy import reference

L, N_T, N_V, N_C, H_KV, GROUP, D = 3, 7, 19, 4, 2, 2, 8
SCALE = 0.6


@pytest.fixture(scope="module")
def given() -> States:
    generator = torch.Generator().manual_seed(3)

    def normal(n: int, heads: int) -> Tensor:
        return torch.randn((L, n, heads, D), generator=generator, dtype=torch.float64)

    return States(
        q_text=normal(N_T, H_KV * GROUP),
        k_text=normal(N_T, H_KV),
        k_visual=normal(N_V, H_KV),
        k_context=normal(N_C, H_KV),
        v_visual=normal(N_V, H_KV),
        q_visual=normal(5, H_KV * GROUP),
        scale=SCALE,
    )


def votes(given: States, layer: int, window: int) -> list[list[float]]:
    assert given.k_context is not None
    parts = (given.q_text, given.k_context, given.k_visual, given.k_text)
    return reference.votes(*(part[layer].tolist() for part in parts), window, SCALE)


def over_heads(policy: Policy, scores: Tensor) -> Tensor:
    """What the engine makes of the scores, on one device."""
    mean = scores.mean(dim=1, keepdim=True).expand_as(scores)
    return mean if policy.shares_selection else scores


def assert_scores(scores: Tensor, wanted: list[Any]) -> None:
    torch.testing.assert_close(scores, torch.tensor(wanted), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("window", "kernel"), [(3, 1), (3, 5), (32, 7)])
@pytest.mark.parametrize("name", ["snapkv", "pyramidkv"])
def test_snapkv(given: States, name: str, window: int, kernel: int) -> None:
    policy = get_policy(name, window=window, kernel=kernel)
    wanted = [
        reference.over_groups(
            [reference.max_pool(row, kernel) for row in votes(given, layer, window)], H_KV
        )
        for layer in range(L)
    ]
    scores = policy.score(given)
    assert_scores(scores, wanted)
    budgets = policy.budgets(policy.statistics(given, scores), N_V, 6).tolist()
    pyramid = reference.largest_remainder(reference.pyramid(L), 6 * L, N_V)
    assert budgets == ([6] * L if name == "snapkv" else pyramid)
    assert pyramid == [11, 6, 1], "the paper's sequence: 11.7, 6, 0.3, with a floor of 1"


def test_the_whole_instruction_votes(given: States) -> None:
    wanted = [reference.over_groups(votes(given, layer, N_T), H_KV) for layer in range(L)]
    assert_scores(get_policy("vlcache").score(given), wanted)


def whole_prompt(given: States, visual: list[int]) -> tuple[States, list[list[list[float]]]]:
    """`given` with the sums of a prompt of random states, and these restated, [L][H_q][N_v]."""
    generator = torch.Generator().manual_seed(11)
    n = visual[-1] + 4
    q = torch.randn((L, n, H_KV * GROUP, D), generator=generator, dtype=torch.float64)
    k = torch.randn((L, n, H_KV, D), generator=generator, dtype=torch.float64)
    q[1] *= 4  # a layer that looks sharply
    q[2] *= 0.1  # and one that looks about evenly
    sums = torch.zeros((L, H_KV, len(visual)))
    for layer in range(L):
        accumulate(sums[layer], q[layer], k[layer], 0, torch.tensor(visual), SCALE)
    wanted = [
        reference.received(q[layer].tolist(), k[layer].tolist(), visual, SCALE)
        for layer in range(L)
    ]
    return dataclasses.replace(given, accumulated=sums), wanted


VISUAL = [*range(2, 12), *range(15, 24)]  # text between two pictures


@pytest.mark.parametrize("m", range(1, N_V + 1))
@pytest.mark.parametrize("name", ["elastic", "prefixkv"])
def test_all_queries_and_heads_choose_one_set_a_layer(given: States, name: str, m: int) -> None:
    """Elastic Cache: as many in every layer; PrefixKV: the sizes of its binary search."""
    given, received = whole_prompt(given, VISUAL)
    wanted = [reference.over_groups(layer, 1)[0] for layer in received]
    policy = get_policy(name)
    assert policy.shares_selection
    scores = over_heads(policy, policy.score(given))
    assert_scores(scores, [[row] * H_KV for row in wanted])
    budgets = policy.budgets(policy.statistics(given, scores), N_V, m).tolist()
    if name == "elastic":
        assert budgets == [m] * L
    else:
        assert budgets == reference.prefix_budgets(wanted, L * m)
        assert len(set(budgets)) > 1 or not 3 < m < 12, "this test needs uneven sizes"


def test_vlcache_gives_to_the_dense_layers(given: States) -> None:
    policy = get_policy("vlcache")
    assert given.k_context is not None
    # the second layer looks sharply at few tokens
    sharp = given.q_text.clone()
    sharp[1] *= 4
    given = States(sharp, given.k_text, given.k_visual, given.k_context, scale=SCALE)
    wanted = [
        reference.density(
            sharp[layer].tolist(),
            [*given.k_context[layer].tolist(), *given.k_visual[layer].tolist()],  # type: ignore[index]
            given.k_text[layer].tolist(),
            SCALE,
        )
        for layer in range(L)
    ]
    statistics = policy.statistics(given, policy.score(given))
    torch.testing.assert_close(statistics, torch.tensor([wanted], dtype=torch.float64))
    budgets = policy.budgets(statistics, N_V, 5).tolist()
    assert budgets == reference.largest_remainder(wanted, 5 * L, N_V)
    assert budgets[1] == min(budgets) < max(budgets)


def test_tgvkv_weighs_by_the_attention_of_text_to_text(given: States) -> None:
    policy = get_policy("tgvkv")
    parts = (given.q_text, given.k_context, given.k_visual, given.k_text)
    found = [
        reference.text_weighted(*(part[layer].tolist() for part in parts), SCALE)  # type: ignore[index]
        for layer in range(L)
    ]
    scores = policy.score(given)
    assert_scores(scores, [reference.over_groups(weighted, H_KV) for weighted, _ in found])
    statistics = policy.statistics(given, scores)
    shares = [share for _, share in found]
    torch.testing.assert_close(statistics, torch.tensor([shares], dtype=torch.float64))
    budgets = policy.budgets(statistics, N_V, 5).tolist()
    assert budgets == reference.largest_remainder(shares, 5 * L, N_V)
    assert policy.shares_selection


@pytest.mark.parametrize("likeness", [0.0, 3.0])
def test_mixkv_takes_diversity_where_keys_are_alike(given: States, likeness: float) -> None:
    keys = given.k_visual.clone()
    keys[1, :, 1] += likeness  # one head of one layer
    given = dataclasses.replace(given, k_visual=keys)
    policy = get_policy("mixkv", window=3, kernel=5)
    assert given.v_visual is not None
    wanted = []
    for layer in range(L):
        pooled = [reference.max_pool(row, 5) for row in votes(given, layer, 3)]
        wanted.append(
            [
                reference.mixed(
                    row, keys[layer, :, head].tolist(), given.v_visual[layer, :, head].tolist()
                )
                for head, row in enumerate(reference.over_groups(pooled, H_KV))
            ]
        )
    assert_scores(policy.score(given), wanted)


def test_streaming() -> None:
    k = torch.zeros(2, 9, 3, 4)
    for sinks, wanted in ((2, [0, 1, 8, 7, 6, 5, 4, 3, 2]), (0, [8, 7, 6, 5, 4, 3, 2, 1, 0])):
        scores = get_policy("streaming", sinks=sinks).score(States(k, k, k))
        order = select_padded(scores, torch.ones(2, dtype=torch.int64))
        assert order.tolist() == [[wanted] * 3] * 2


def test_random_is_even_and_its_own_in_each_layer_head_prompt_and_seed() -> None:
    k = torch.zeros(6, 500, 4, 2)
    scores = get_policy("random").score(States(k, k, k, salt=1)).double() / 2**24
    assert scores.mean().item() == pytest.approx(0.5, abs=0.01)
    assert scores.var().item() == pytest.approx(1 / 12, abs=0.005)
    correlation = torch.corrcoef(scores.flatten(0, 1))
    assert (correlation - torch.eye(24)).abs().max() < 0.2
    for seed, salt in ((1, 1), (0, 2)):
        other = get_policy("random", seed=seed).score(States(k, k, k, salt=salt)).double() / 2**24
        pair = torch.stack([scores.flatten(), other.flatten()])
        assert abs(torch.corrcoef(pair)[0, 1].item()) < 0.05


@pytest.mark.parametrize("chunks", [[40], [13, 1, 20, 6]], ids=str)
def test_h2o_sums_all_queries_in_any_chunks(
    monkeypatch: pytest.MonkeyPatch, chunks: list[int]
) -> None:
    n, visual = 40, [*range(3, 14), *range(17, 30)]
    generator = torch.Generator().manual_seed(1)
    q = torch.randn((n, 4, D), generator=generator, dtype=torch.float64)
    k = torch.randn((n, 2, D), generator=generator, dtype=torch.float64)
    wanted = [[0.0] * len(visual) for _ in range(2)]
    for head in range(4):
        for i in range(n):
            keys = [k[j, head // 2].tolist() for j in range(i + 1)]
            row = reference.softmax(
                [SCALE * reference.dot(q[i, head].tolist(), key) for key in keys]
            )
            for column, j in enumerate(visual):
                wanted[head // 2][column] += row[j] / 2 if j <= i else 0.0
    monkeypatch.setattr(prompt_attention, "MAX_ELEMENTS", 1000)  # several blocks a chunk
    total = torch.zeros((2, len(visual)))
    done = 0
    for size in chunks:
        rows = slice(done, done + size)
        accumulate(total, q[rows], k[: done + size], done, torch.tensor(visual), SCALE)
        done += size
    assert_scores(total, wanted)
    states = States(q[None], k[None], k[None], accumulated=total[None])
    assert torch.equal(get_policy("h2o").score(states)[0], total)


def test_blocks_of_rows_do_not_change_the_votes(
    monkeypatch: pytest.MonkeyPatch, given: States
) -> None:
    names = ("vlcache", "tgvkv")
    whole = [get_policy(name).score(given) for name in names]
    monkeypatch.setattr(prompt_attention, "MAX_ELEMENTS", 1)
    for name, wanted in zip(names, whole, strict=True):
        torch.testing.assert_close(get_policy(name).score(given), wanted)


def test_the_visual_window_is_causal(given: States) -> None:
    scores = get_policy("aircache", visual=5).score(given)
    assert given.q_visual is not None
    q, k = given.q_visual, given.k_visual
    wanted = torch.zeros(L, H_KV, N_V, dtype=torch.float64)
    for layer in range(L):
        for head in range(H_KV * GROUP):
            for w in range(5):
                seen = N_V - 5 + w + 1
                logits = [
                    SCALE * reference.dot(q[layer, w, head].tolist(), key)
                    for key in k[layer, :seen, head // GROUP].tolist()
                ]
                row = torch.tensor(reference.softmax(logits), dtype=torch.float64)
                wanted[layer, head // GROUP, :seen] += row / (5 * GROUP)
    torch.testing.assert_close(scores, wanted.float())


def test_visual_mass(given: States) -> None:
    scores = importance_batched(given.q_text, given.k_text, given.k_visual, scale=SCALE)
    scores[1, 0] = 0.0  # nothing to lose there
    budgets = layer_budgets(scores, 0.4)
    kept = select(scores, budgets)
    selected = torch.cat(kept, dim=1)
    shares = [
        1.0 if (l, h) == (1, 0) else float(scores[l, h, kept[l][h]].sum() / scores[l, h].sum())
        for l in range(L)
        for h in range(H_KV)
    ]
    mass = visual_mass(scores, selected, budgets)
    assert mass.dtype == torch.float64
    assert mass.item() == pytest.approx(sum(shares) / len(shares))
    everything = torch.arange(N_V).repeat(H_KV, L)
    assert visual_mass(scores, everything, torch.full((L,), N_V)).item() == pytest.approx(1.0)


@pytest.mark.parametrize("positions", [None, VISUAL], ids=["similar", "position"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("budget", [1, 6, N_V])
def test_merge(given: States, share: float, budget: int, positions: list[int] | None) -> None:
    at = None if positions is None else torch.tensor(positions)
    generator = torch.Generator().manual_seed(9)
    k = given.k_visual[0].float()
    v = torch.randn(k.shape, generator=generator)
    order = torch.rand((H_KV, N_V), generator=generator).argsort(-1)
    new_k, new_v = merge_dropped(k, v, order, torch.tensor(budget), share, at)
    for head in range(H_KV):
        wanted = reference.merge(
            k[:, head].tolist(), v[:, head].tolist(), order[head].tolist(), budget, share, positions
        )
        assert len(wanted) == budget
        for i, (key, value) in wanted.items():
            torch.testing.assert_close(new_k[i, head], torch.tensor(key), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(new_v[i, head], torch.tensor(value), rtol=1e-5, atol=1e-6)
    half = merge_dropped(k.bfloat16(), v.bfloat16(), order, torch.tensor(budget), share, at)
    assert half[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("snapkv", {"window": 0}, "window must be an integer of at least 1, got 0"),
        ("snapkv", {"kernel": 4}, "kernel must be an odd number, got 4"),
        ("pyramidkv", {"kernel": 0}, "kernel must be an integer of at least 1, got 0"),
        ("random", {"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ("streaming", {"sinks": 1.5}, "sinks must be an integer of at least 0, got 1.5"),
        ("aircache", {"visual": True}, "visual must be an integer of at least 0, got True"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_policy(name, **options)
