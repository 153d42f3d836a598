# SPDX-License-Identifier: Apache-2.0
"""Rungs are nested, and going down by steps leaves what going down at once leaves."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aircache_sglang.config import AirCacheConfig
from aircache_sglang.policy import get_policy, global_counts, layer_budgets_from_statistics
from aircache_sglang.runtime import rungs as rungs_module
from aircache_sglang.runtime.compress import PassInputs
from aircache_sglang.runtime.decide import Intent, Rung, rungs_of
from aircache_sglang.runtime.descend import Descent, descend
from aircache_sglang.runtime.kv_planes import absolute_rows
from aircache_sglang.runtime.record import CompressionRecord
from aircache_sglang.runtime.rungs import Ladder, make_ladder, nested, nested_cells, repack
from aircache_sglang.runtime.spans import VisualPrompt
from aircache_sglang.runtime.table import CompressionTable
from tests.support.one_rank import ONE_RANK


@st.composite
def two_budgets(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Budgets of a rung, and wanted ones of the next: any of a sum that is not larger."""
    above = draw(st.lists(st.integers(1, 60), min_size=1, max_size=9))
    least = len(above)
    total = draw(st.integers(least, sum(above)))
    cuts = draw(st.lists(st.integers(0, total - least), min_size=least - 1, max_size=least - 1))
    ends = [0, *sorted(cuts), total - least]
    return above, [b - a + 1 for a, b in itertools.pairwise(ends)]


@given(two_budgets())
def test_budgets_never_grow_and_add_up(budgets: tuple[list[int], list[int]]) -> None:
    above, wanted = (torch.tensor(each) for each in budgets)
    found = nested(wanted, above)
    assert int(found.sum()) == int(wanted.sum())
    assert (found <= above).all() and (found >= torch.minimum(wanted, above)).all()
    if (wanted <= above).all():
        assert torch.equal(found, wanted)


@given(
    st.integers(0, 1 << 30),
    st.sampled_from(["aircache", "strength", "skewness", "pyramid", "global"]),
)
def test_the_bound_costs_a_budget_no_more_than_rounding(seed: int, budget: str) -> None:
    g = torch.Generator().manual_seed(seed)
    statistics = torch.rand(2, 12, generator=g, dtype=torch.float64) ** 3
    scores = torch.rand(12, 2, 200, generator=g) * statistics[0, :, None, None].float()
    budgets = []
    for m in (100, 99, 50, 7):
        of_m = global_counts(scores, 12 * 2 * m)[None] if budget == "global" else statistics
        budgets.append(layer_budgets_from_statistics(of_m, 200, m, budget=budget))
    found = budgets[0]
    for wanted in budgets[1:]:
        found = nested(wanted, found)
        assert (found - wanted).abs().max() <= 1


@dataclasses.dataclass
class World:
    """One prefilled request of 40 visual tokens, text between them, and its ladder."""

    seed: int
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        n_layers, n_heads, rows, dim = 3, 2, 160, 4
        planes = torch.randn(2, n_layers, rows, n_heads, dim, generator=g)
        self.k_all, self.v_all = planes.to(self.dtype).unbind(0)
        self.prompt = VisualPrompt(((3, 23), (26, 46)), length=52, n_visual=40)
        config = AirCacheConfig(when="pressure", rungs=(0.5, 0.25, 0.1), min_visual_tokens=3)
        intent = Intent(config, self.prompt, 4)
        self.intent = dataclasses.replace(intent, rungs=rungs_of(intent))
        slots = torch.randperm(rows - 1, generator=g) + 1
        self.row, self.columns = slots[:60], slots[60:80]
        req_to_token = torch.zeros(3, 80, dtype=torch.int32)
        req_to_token[1, :60] = self.row.int()
        table = CompressionTable(req_to_token, n_layers)
        self.inputs = PassInputs(self.k_all, self.v_all, table, ONE_RANK, 0.5)
        scores = torch.rand(n_layers, n_heads, 40, generator=g)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        statistics = torch.rand(2, n_layers, generator=g, dtype=torch.float64)
        policy = get_policy("aircache")
        self.ladder = make_ladder(
            self.intent.rungs,
            order,
            lambda m: policy.budgets(statistics, 40, m),
            scores,
            lambda tensor: tensor,
        )
        self.scores = scores
        originals = self.row[: self.prompt.end].clone()
        self.whole = CompressionRecord(self.intent, 1, originals, self.row[:0])
        self.whole.ladder = self.ladder

    def record(self, rung: int) -> CompressionRecord:
        m = self.intent.rungs[rung].columns
        return self.whole.at(
            rung, originals=self.whole.originals, extra=self.columns[:m], packed_at=3
        )

    def cells(self, rung: int) -> torch.Tensor:
        """The K cells that a record of the rung names, [L * m, H_kv, D]."""
        n_layers, rows = self.k_all.shape[:2]
        m = self.intent.rungs[rung].columns
        cells = torch.arange(n_layers * m)
        where = absolute_rows(cells, self.columns[:m], n_layers, rows)
        return self.k_all.reshape(n_layers * rows, -1)[where]


def test_the_sizes_of_the_rungs() -> None:
    config = AirCacheConfig(when="pressure", rungs=(0.5, 0.25, 0.1))

    def rungs(config: AirCacheConfig, n: int, page: int = 1) -> tuple[Rung, ...]:
        prompt = VisualPrompt(((0, n),), n + 8, n)
        return rungs_of(Intent(config, prompt, 1, page_size=page))

    assert rungs(config, 40) == (Rung(0.5, 20), Rung(0.25, 10), Rung(0.1, 4))
    # Sizes that are no fewer columns than the next are left out, and so is all of the picture.
    assert rungs(config, 3) == (Rung(0.5, 2), Rung(0.1, 1))
    # Nor what takes as many pages as the next.
    assert rungs(config, 64, page=16) == (Rung(0.5, 32), Rung(0.1, 6))
    one = dataclasses.replace(config, retention=0.3)
    assert rungs(one, 100) == (Rung(0.5, 50), Rung(0.3, 30))
    assert rungs(dataclasses.replace(config, reuse="compressed"), 100) == (Rung(0.1, 10),)


@pytest.mark.parametrize("seed", range(4))
def test_a_rung_keeps_the_best_of_every_layer(seed: int) -> None:
    world = World(seed)
    for rung, (_, m) in enumerate(world.intent.rungs):
        budgets = world.ladder.budgets[rung].tolist()
        assert sum(budgets) == 3 * m
        parts = world.ladder.selected(rung).split(budgets, dim=1)
        for layer, part in enumerate(parts):
            for head in range(2):
                best = world.scores[layer, head].topk(budgets[layer]).indices
                assert part[head].tolist() == best.tolist()
    masses = world.ladder.reported[1].tolist()
    assert masses == sorted(masses, reverse=True) and 0 < masses[-1] < masses[0] < 1


@pytest.mark.parametrize("staging", [1, 200, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_step_by_step_is_at_once(
    dtype: torch.dtype, staging: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rungs_module, "STAGING_BYTES", staging)
    for seed in range(3):
        stepwise, at_once = World(seed, dtype), World(seed, dtype)
        descend(stepwise.inputs, Descent(stepwise.record(0), None, stepwise.columns[:20]))
        for rung in (1, 2):
            before = stepwise.record(rung - 1)
            descend(stepwise.inputs, Descent(stepwise.record(rung), rung - 1, before.columns))
        descend(at_once.inputs, Descent(at_once.record(2), None, at_once.columns[:4]))
        mine, theirs = (world.cells(2).view(torch.uint8) for world in (stepwise, at_once))
        assert torch.equal(mine, theirs)
        tables = [world.inputs.table for world in (stepwise, at_once)]
        assert torch.equal(tables[0].req_to_token, tables[1].req_to_token)
        assert torch.equal(tables[0].cell_offset, tables[1].cell_offset)
        # Nothing but the columns of the first rung has been written.
        untouched = torch.ones(160, dtype=torch.bool)
        untouched[stepwise.columns] = False
        fresh = World(seed, dtype)
        for cache, other in ((stepwise.k_all, fresh.k_all), (stepwise.v_all, fresh.v_all)):
            mine, theirs = (each[:, untouched].view(torch.uint8) for each in (cache, other))
            assert torch.equal(mine, theirs)


def test_cells_move_down_alone() -> None:
    above, below = torch.tensor([5, 9, 4]), torch.tensor([2, 3, 4])
    sources = nested_cells(above, below, 9)
    assert sources.tolist() == [0, 1, 5, 6, 7, 14, 15, 16, 17]
    k_all = torch.arange(3 * 10.0).view(3, 10, 1, 1).clone()
    v_all = -k_all.clone()
    columns = torch.tensor([4, 2, 9, 1, 7, 3])
    cells = absolute_rows(torch.arange(18), columns, 3, 10)
    wanted = k_all.view(-1)[cells[sources]].clone()
    repack(k_all, v_all, columns, sources)
    assert torch.equal(k_all.view(-1)[cells[:9]], wanted)
    assert torch.equal(v_all.view(-1)[cells[:9]], -wanted)


def test_a_ladder_is_small() -> None:
    ladder: Ladder = World(1).ladder
    assert ladder.order.dtype == torch.int32 and ladder.order.shape == (2, 3 * 20)
