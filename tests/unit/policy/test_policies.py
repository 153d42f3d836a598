# SPDX-License-Identifier: Apache-2.0
"""The registry, and laws that every registered policy keeps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from aircache_sglang.policy import (
    BUDGET_MODES,
    ELITE_MODES,
    AirCache,
    Policy,
    columns,
    elite_mask_batched,
    get_policy,
    head_mean_statistics,
    importance_batched,
    layer_budgets,
    layer_budgets_from_statistics,
    policy_names,
    register_policy,
    select,
    select_padded,
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
assert policy.policy_names() == ("aircache",)
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
    layers: int = 4, n_text: int = 9, n_visual: int = 40, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((layers, n_text, 6, 8), (layers, n_text, 2, 8), (layers, n_visual, 2, 8))
    q, k, v = (torch.randn(size, generator=generator).to(device) for size in sizes)
    return q, k, v


@pytest.mark.parametrize("name", policy_names())
@pytest.mark.parametrize("retention", [1e-6, 0.1, 0.5, 1.0])
def test_every_policy_fills_its_columns(name: str, retention: float) -> None:
    policy = get_policy(name)
    assert policy.name == name
    scores = policy.score(*states())
    assert scores.dtype == torch.float32 and scores.shape == (4, 2, 40)
    m = columns(retention, 40)
    statistics = policy.statistics(scores)
    assert statistics.dtype == torch.float64 and statistics.shape[-1] == 4
    halves = torch.stack([policy.statistics(half) for half in scores.chunk(2, dim=1)])
    torch.testing.assert_close(halves.mean(dim=0), statistics)
    budgets = policy.budgets(statistics, 40, m)
    assert budgets.dtype == torch.int64 and int(budgets.sum()) == 4 * m
    assert all(1 <= count <= 40 for count in budgets.tolist())
    order = policy.order(scores, budgets)
    for l, kept in enumerate(select(scores, budgets)):
        assert order[l, :, : int(budgets[l])].sort(dim=-1).values.tolist() == kept.tolist()


@pytest.mark.parametrize("budget", BUDGET_MODES)
@pytest.mark.parametrize("elite", ELITE_MODES)
def test_aircache_composes_the_public_functions(budget: str, elite: str) -> None:
    q, k, v = states()
    policy = get_policy("aircache", alpha=0.4, elite=elite, budget=budget, window=5)
    scores = policy.score(q, k, v, scale=0.5)
    wanted = importance_batched(q, k, v, alpha=0.4, scale=0.5, elite=elite, window=5)
    assert torch.equal(scores, wanted)
    budgets = policy.budgets(policy.statistics(scores), 40, columns(0.2, 40))
    assert torch.equal(budgets, layer_budgets(wanted, 0.2, budget=budget))


def test_engine_functions_never_wait_for_the_device() -> None:
    # a meta tensor has no data: anything that looked at a value would raise
    q, k, v = states(device="meta")
    for elite in ELITE_MODES:
        assert elite_mask_batched(q, k, elite=elite).shape == (4, 6, 9)
        for size in (1, 500, 1 << 25):
            scores = importance_batched(q, k, v, elite=elite, window=4, max_elements=size)
            assert scores.shape == (4, 2, 40)
    statistics = head_mean_statistics(scores)
    for budget in BUDGET_MODES:
        assert layer_budgets_from_statistics(statistics, 40, 4, budget=budget).shape == (4,)
        budgets = layer_budgets(scores, 0.1, budget=budget)
        assert budgets.dtype == torch.int64 and budgets.device.type == "meta"
    assert select_padded(scores, budgets).shape == (4, 2, 40)
    policy = get_policy("aircache")
    assert policy.order(policy.score(q, k, v), budgets).shape == (4, 2, 40)


@pytest.mark.gpu
def test_engine_functions_on_a_gpu_equal_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    inputs = [tensor.double() for tensor in states()]
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
    assert policy_names() == ("aircache",)
    assert get_policy("aircache", alpha=0.5) == AirCache(alpha=0.5)
    with pytest.raises(ValueError, match="policy must be one of aircache, got 'snapkv'"):
        get_policy("snapkv")
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
