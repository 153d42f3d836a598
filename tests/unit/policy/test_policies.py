# SPDX-License-Identifier: Apache-2.0
"""The registry, and laws that every registered policy keeps."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from aircache_sglang import config
from aircache_sglang.policy import (
    BUDGET_MODES,
    ELITE_MODES,
    AirCache,
    Policy,
    States,
    accumulate,
    columns,
    elite_mask_batched,
    get_policy,
    global_counts,
    head_mean_statistics,
    importance_batched,
    layer_budgets,
    layer_budgets_from_statistics,
    merge_dropped,
    policy_names,
    register_policy,
    select_padded,
    visual_mass,
)

ROOT = Path(__file__).resolve().parents[3]
BLOCKED = ("sglang", "triton", "transformers", "flashinfer", "aircache_kernels", "aircache_patches")

FRESH_IMPORT = """
import sys

sys.modules.update(dict.fromkeys(sys.argv[1:]))  # None: importing it raises
import torch
from aircache_sglang import policy

value = torch.rand(3, 2, 10)
assert sum(len(kept[0]) for kept in policy.select(value, policy.layer_budgets(value, 0.5))) == 15
assert "aircache" in policy.policy_names()
# An editable install brings a finder of its own, named after the distribution.
inside = {
    name
    for name, module in sys.modules.items()
    if module and "aircache" in name and not name.startswith("__editable__")
}
assert all(
    name == "aircache_sglang" or name.startswith("aircache_sglang.policy") for name in inside
), inside
print("passed")
"""


def test_import_needs_torch_alone() -> None:
    result = subprocess.run(
        [sys.executable, "-c", FRESH_IMPORT, *BLOCKED],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["passed"]


def states(
    layers: int = 4, n_text: int = 9, n_visual: int = 40, device: str = "cpu", between: int = 0
) -> States:
    """All that any policy looks at, of one prompt in which every query saw what was before it.

    3 tokens of context, two pictures with `between` tokens of text between them, the instruction;
    a visual window of 4.
    """
    generator = torch.Generator().manual_seed(0)
    first = n_visual // 2
    visual = [3 + i + (between if i >= first else 0) for i in range(n_visual)]
    context = sorted({*range(3 + n_visual + between)} - {*visual})
    q, k = (
        torch.randn((layers, 3 + n_visual + between + n_text, heads, 8), generator=generator)
        for heads in (6, 2)
    )
    q, k = q.to(device), k.to(device)
    sums = torch.zeros((layers, 2, n_visual), device=device)
    for layer in range(layers):
        accumulate(sums[layer], q[layer], k[layer], 0, torch.tensor(visual, device=device), 8**-0.5)
    v = torch.randn((layers, n_visual, 2, 8), generator=generator).to(device)
    return States(
        q_text=q[:, -n_text:],
        k_text=k[:, -n_text:],
        k_visual=k[:, visual],
        k_context=k[:, context],
        v_visual=v,
        q_visual=q[:, visual[-4:]],
        accumulated=sums,
        salt=7,
    )


def part_of(whole: States, layers: slice, heads: slice) -> States:
    """What a rank with those KV heads, or a block of those layers, would be given."""
    group = whole.q_text.shape[2] // whole.k_text.shape[2]
    query_heads = slice(heads.start * group, heads.stop * group)
    assert whole.k_context is not None and whole.q_visual is not None
    assert whole.accumulated is not None and whole.v_visual is not None
    return dataclasses.replace(
        whole,
        q_text=whole.q_text[layers, :, query_heads],
        k_text=whole.k_text[layers, :, heads],
        k_visual=whole.k_visual[layers, :, heads],
        k_context=whole.k_context[layers, :, heads],
        v_visual=whole.v_visual[layers, :, heads],
        q_visual=whole.q_visual[layers, :, query_heads],
        accumulated=whole.accumulated[layers, heads],
        first_layer=layers.start,
        first_head=heads.start,
    )


def budgets_of(
    policy: Policy, statistics: torch.Tensor, scores: torch.Tensor, m: int
) -> torch.Tensor:
    """As the engine asks for them, on one rank."""
    n_layers, n_kv, n_visual = scores.shape
    if policy.global_budgets:
        statistics = global_counts(scores, n_layers * n_kv * m)[None]
    return policy.budgets(statistics, n_visual, m)


POLICIES = [
    *((name, {}) for name in policy_names()),
    ("aircache", {"visual": 4}),
    ("aircache", {"budget": "pyramid"}),
    ("aircache", {"budget": "global"}),
    ("aircache", {"budget": "global", "floor": 0.25}),
    ("snapkv", {"window": 3, "kernel": 1}),
    ("random", {"seed": 5}),
    ("streaming", {"sinks": 0}),
]
matrix = pytest.mark.parametrize(("name", "options"), POLICIES, ids=str)


@matrix
@pytest.mark.parametrize(("n_visual", "between"), [(1, 0), (2, 0), (2, 5), (40, 0), (40, 5)])
@pytest.mark.parametrize("retention", [1e-6, 0.1, 0.5, 1.0])
def test_every_policy_fills_its_columns(
    name: str, options: dict[str, Any], n_visual: int, between: int, retention: float
) -> None:
    policy = get_policy(name, **options)
    given = states(n_visual=n_visual, between=between)
    assert policy.name == name
    scores = policy.score(given)
    assert scores.dtype == torch.float32 and scores.shape == (4, 2, n_visual)
    assert scores.isfinite().all()
    statistics = policy.statistics(given, scores)
    assert statistics.dtype == torch.float64 and statistics.shape[-1] == 4
    m = columns(retention, n_visual)
    budgets = budgets_of(policy, statistics, scores, m)
    assert budgets.dtype == torch.int64 and int(budgets.sum()) == 4 * m
    assert all(1 <= count <= n_visual for count in budgets.tolist())
    # the same prompt, the same tokens
    again = policy.score(states(n_visual=n_visual, between=between))
    assert torch.equal(again, scores)
    assert torch.equal(budgets_of(policy, policy.statistics(given, scores), again, m), budgets)


@matrix
def test_blocks_of_layers_and_shards_of_heads_make_the_whole(
    name: str, options: dict[str, Any]
) -> None:
    policy, whole = get_policy(name, **options), states()
    scores = policy.score(whole)
    statistics = policy.statistics(whole, scores)
    blocks = [part_of(whole, layers, slice(0, 2)) for layers in (slice(0, 1), slice(1, 4))]
    ranks = [part_of(whole, slice(0, 4), heads) for heads in (slice(0, 1), slice(1, 2))]
    for parts, axis in ((blocks, 0), (ranks, 1)):
        found = [policy.score(part) for part in parts]
        torch.testing.assert_close(torch.cat(found, dim=axis), scores, rtol=1e-5, atol=1e-7)
    if policy.shares_selection:  # the engine's mean over heads and ranks
        scores = scores.mean(dim=1, keepdim=True).expand_as(scores)
        found = [scores[:, :1]] * 2
        statistics = policy.statistics(whole, scores)
    by_rank = [policy.statistics(*both) for both in zip(ranks, found, strict=True)]
    torch.testing.assert_close(torch.stack(by_rank).mean(dim=0), statistics, rtol=1e-5, atol=1e-7)
    by_block = [
        policy.statistics(part, scores[part.first_layer :][: part.q_text.shape[0]])
        for part in blocks
    ]
    torch.testing.assert_close(torch.cat(by_block, dim=1), statistics, rtol=1e-5, atol=1e-7)


@matrix
def test_budgets_add_up_whatever_the_statistics_hold(name: str, options: dict[str, Any]) -> None:
    policy, given = get_policy(name, **options), states()
    statistics = policy.statistics(given, policy.score(given))
    for value in (0.0, math.nan, math.inf, -1.0):
        budgets = policy.budgets(torch.full_like(statistics, value), 40, 7)
        assert int(budgets.sum()) == 28 and int(budgets.min()) >= 1 and int(budgets.max()) <= 40


@matrix
def test_no_policy_waits_for_the_device(name: str, options: dict[str, Any]) -> None:
    # a meta tensor has no data: anything that looked at a value would raise
    policy, given = get_policy(name, **options), states(device="meta")
    scores = policy.score(given)
    budgets = budgets_of(policy, policy.statistics(given, scores), scores, 4)
    assert scores.shape == (4, 2, 40) and budgets.shape == (4,)
    selected = torch.zeros((2, 16), dtype=torch.int64, device="meta")
    assert visual_mass(scores, selected, budgets).device.type == "meta"
    k = given.k_visual[0]
    order = select_padded(scores, budgets)[0]
    for positions in (None, order[0]):
        assert merge_dropped(k, k, order, budgets[0], 0.5, positions)[0].shape == k.shape


@pytest.mark.parametrize("budget", BUDGET_MODES)
@pytest.mark.parametrize("elite", ELITE_MODES)
def test_aircache_composes_the_public_functions(budget: str, elite: str) -> None:
    given = dataclasses.replace(states(), scale=0.5)
    q, k, v = given.q_text, given.k_text, given.k_visual
    policy = get_policy("aircache", alpha=0.4, elite=elite, budget=budget, window=5)
    scores = policy.score(given)
    wanted = importance_batched(q, k, v, alpha=0.4, scale=0.5, elite=elite, window=5)
    assert torch.equal(scores, wanted)
    budgets = budgets_of(policy, policy.statistics(given, scores), scores, columns(0.2, 40))
    assert torch.equal(budgets, layer_budgets(wanted, 0.2, budget=budget))


def test_engine_functions_never_wait_for_the_device() -> None:
    # a meta tensor has no data: anything that looked at a value would raise
    given = states(device="meta")
    q, k, v = given.q_text, given.k_text, given.k_visual
    for elite in ELITE_MODES:
        assert elite_mask_batched(q, k, elite=elite).shape == (4, 6, 9)
        for size in (1, 500, 1 << 25):
            scores = importance_batched(q, k, v, elite=elite, window=4, max_elements=size)
            assert scores.shape == (4, 2, 40)
    statistics = head_mean_statistics(scores)
    for budget in BUDGET_MODES:
        if budget == "global":
            statistics = global_counts(scores, 4 * 2 * 4)[None]
        assert layer_budgets_from_statistics(statistics, 40, 4, budget=budget).shape == (4,)
        budgets = layer_budgets(scores, 0.1, budget=budget)
        assert budgets.dtype == torch.int64 and budgets.device.type == "meta"
    assert select_padded(scores, budgets).shape == (4, 2, 40)


@pytest.mark.gpu
def test_engine_functions_on_a_gpu_equal_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    given = states()
    inputs = [tensor.double() for tensor in (given.q_text, given.k_text, given.k_visual)]
    on_gpu = [tensor.cuda() for tensor in inputs]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        scores = importance_batched(*on_gpu)
        budgets = layer_budgets(scores, 0.1)
        order = select_padded(scores, budgets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wanted = importance_batched(*inputs)
    torch.testing.assert_close(scores.cpu(), wanted, rtol=1e-6, atol=1e-12)
    assert torch.equal(budgets.cpu(), layer_budgets(wanted, 0.1))
    assert torch.equal(order.cpu(), select_padded(wanted, budgets.cpu()))


def test_registry() -> None:
    assert policy_names() == config.POLICIES == tuple(sorted(config.POLICIES))
    assert BUDGET_MODES == config.BUDGET_MODES and ELITE_MODES == config.ELITE_MODES
    assert get_policy("aircache", alpha=0.5) == AirCache(alpha=0.5)
    with pytest.raises(ValueError, match=r"policy must be one of aircache, .*, got 'snap'"):
        get_policy("snap")
    with pytest.raises(ValueError, match=r"policy 'aircache': .*'beta'"):
        get_policy("aircache", beta=1)
    assert register_policy(AirCache) is AirCache

    class Other(AirCache):
        pass

    with pytest.raises(ValueError, match="policy name 'aircache' is taken by AirCache"):
        register_policy(Other)
    assert type(get_policy("aircache")) is AirCache
    with pytest.raises(TypeError, match="abstract"):
        Policy()  # type: ignore[abstract]


@pytest.mark.parametrize(
    "options", [{"alpha": 2}, {"elite": "x"}, {"budget": None}, {"window": 0}, {"alpha": True}]
)
def test_aircache_refuses_bad_options(options: dict[str, Any]) -> None:
    (key,) = options
    with pytest.raises(ValueError, match=f"{key} must be"):
        get_policy("aircache", **options)
