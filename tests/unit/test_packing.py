# SPDX-License-Identifier: Apache-2.0
"""Survivors of all layers in whole columns, and nothing else touched."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aircache_sglang.config import AirCacheConfig
from aircache_sglang.policy import Policy, States, importance_batched
from aircache_sglang.runtime import compress
from aircache_sglang.runtime.compress import (
    Job,
    PassInputs,
    TorchPass,
    cells_of,
    layer_blocks,
    pack,
)
from aircache_sglang.runtime.decide import Intent
from aircache_sglang.runtime.decode import layer_cell_rows
from aircache_sglang.runtime.kv_planes import absolute_rows, cell_address
from aircache_sglang.runtime.record import CompressionRecord
from aircache_sglang.runtime.spans import VisualPrompt
from aircache_sglang.runtime.table import CompressionTable
from tests.support.one_rank import ONE_RANK
from tests.support.spans import between_positions


def draw_budgets(draw: st.DrawFn, n_layers: int, m: int, n_visual: int) -> list[int]:
    """Any split of L * m cells with 1 <= n_l <= N_v."""
    left = n_layers * m
    budgets = []
    for layer in range(n_layers):
        after = n_layers - layer - 1
        budgets.append(
            draw(st.integers(max(1, left - after * n_visual), min(n_visual, left - after)))
        )
        left -= budgets[-1]
    return draw(st.permutations(budgets))


@dataclasses.dataclass
class Case:
    n_layers: int
    n_heads: int
    n_visual: int
    m: int
    budgets: list[int]
    seed: int

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        self.rows = self.n_visual + self.m + 9
        shape = (2, self.n_layers, self.rows, self.n_heads, 3)
        self.k_all, self.v_all = torch.randn(shape, generator=g).unbind(0)
        slots = torch.randperm(self.rows - 1, generator=g) + 1
        self.visual_slots = slots[: self.n_visual]
        self.columns = slots[self.n_visual : self.n_visual + self.m]
        self.order = torch.rand((self.n_layers, self.n_heads, self.n_visual), generator=g).argsort(
            -1
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n_layers, n_heads = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    n_visual = draw(st.integers(1, 23))
    m = draw(st.integers(1, n_visual))
    budgets = draw_budgets(draw, n_layers, m, n_visual)
    return Case(n_layers, n_heads, n_visual, m, budgets, draw(st.integers(0, 2**31)))


@given(st.integers(1, 64), st.integers(1, 64))
def test_cell_address_is_a_bijection_onto_the_columns(n_layers: int, m: int) -> None:
    column, plane = cell_address(torch.arange(n_layers * m), n_layers)
    assert sorted(zip(column.tolist(), plane.tolist(), strict=True)) == [
        (c, p) for c in range(m) for p in range(n_layers)
    ]


def test_absolute_rows_do_not_overflow_32_bits() -> None:
    n_layers, rows = 80, 1 << 28
    columns = torch.tensor([rows - 1])
    found = absolute_rows(torch.arange(n_layers), columns, n_layers, rows)
    assert found.tolist() == [plane * rows + rows - 1 for plane in range(n_layers)]


@given(cases())
def test_packed_cells_read_back_as_selected(case: Case) -> None:
    k_before, v_before = case.k_all.clone(), case.v_all.clone()
    budgets = torch.tensor(case.budgets)
    selected = cells_of(case.order, budgets, case.n_layers * case.m)
    assert selected.shape == (case.n_heads, case.n_layers * case.m)
    pack(case.k_all, case.v_all, case.visual_slots, case.columns, selected, budgets)

    record = CompressionRecord(
        intent=Intent(
            AirCacheConfig(),
            VisualPrompt(((0, case.n_visual),), case.n_visual + 1, case.n_visual),
            case.m,
        ),
        row=1,
        originals=case.visual_slots,
        extra=case.columns,
        budgets=budgets,
    )
    all_rows = layer_cell_rows(record, case.n_layers, case.rows)
    assert [rows.numel() for rows in all_rows] == case.budgets
    for cache, before in ((case.k_all, k_before), (case.v_all, v_before)):
        flat = cache.reshape(case.n_layers * case.rows, case.n_heads, -1)
        for layer, rows in enumerate(all_rows):
            for head in range(case.n_heads):
                for j, row in enumerate(rows.tolist()):
                    slot = int(case.visual_slots[case.order[layer, head, j]])
                    assert torch.equal(flat[row, head], before[layer, slot, head])
        kept = torch.ones(case.rows, dtype=torch.bool)
        kept[case.columns] = False
        assert torch.equal(cache[:, kept], before[:, kept])


@given(cases())
def test_every_cell_of_the_columns_is_written(case: Case) -> None:
    case.k_all[:, case.columns] = torch.nan
    case.v_all[:, case.columns] = torch.nan
    budgets = torch.tensor(case.budgets)
    selected = cells_of(case.order, budgets, case.n_layers * case.m)
    assert selected.shape == (case.n_heads, case.n_layers * case.m)
    pack(case.k_all, case.v_all, case.visual_slots, case.columns, selected, budgets)
    assert torch.isfinite(case.k_all).all()
    assert torch.isfinite(case.v_all).all()


@pytest.mark.parametrize("n_layers", [1, 3, 28])
@pytest.mark.parametrize("bytes_per_layer", [1, 1 << 20, 10 << 20, 1 << 30])
def test_layer_blocks_cover_each_layer_once(n_layers: int, bytes_per_layer: int) -> None:
    blocks = list(layer_blocks(n_layers, bytes_per_layer))
    assert [layer for block in blocks for layer in range(n_layers)[block]] == list(range(n_layers))
    for block in blocks:
        assert (block.stop - block.start) * bytes_per_layer <= max(64 << 20, bytes_per_layer)


class FixedPolicy(Policy):
    """Keeps what it is told to, and checks what it is asked."""

    reads_context = True

    def __init__(self, order: torch.Tensor, budgets: torch.Tensor) -> None:
        self.fixed_order, self.fixed_budgets = order, budgets

    def score(self, states: States) -> torch.Tensor:
        self.seen = states
        return -self.fixed_order.argsort(-1).float()

    def budgets(self, statistics: torch.Tensor, n_visual: int, m: int) -> torch.Tensor:
        assert n_visual == self.fixed_order.shape[2]
        assert self.fixed_budgets.sum() == self.fixed_order.shape[0] * m
        return self.fixed_budgets


@pytest.mark.parametrize("reuse", ["exact", "compressed"])
def test_the_pass_lays_out_the_row_and_only_reads_the_originals(
    monkeypatch: pytest.MonkeyPatch, reuse: str
) -> None:
    """Text between pictures moves up behind the gap; a replica needs copies of it."""
    g = torch.Generator().manual_seed(0)
    n_layers, n_heads, dim, rows, m = 3, 2, 4, 60, 3
    prompt = VisualPrompt(((2, 7), (9, 12), (13, 15)), length=18, n_visual=10)
    k_all, v_all = torch.randn((2, n_layers, rows, n_heads, dim), generator=g).unbind(0)
    k_before, v_before = k_all.clone(), v_all.clone()
    slots = torch.randperm(rows - 1, generator=g) + 1
    n_copies = prompt.n_between if reuse == "compressed" else 0
    extra = slots[18 : 18 + m + n_copies]
    req_to_token = torch.full((4, 32), -7, dtype=torch.int32)
    req_to_token[2, :18] = slots[:18]
    # The mass is measured by the elite window, whatever the policy's own is.
    config = AirCacheConfig(window="all", return_selection=True, reuse=reuse)
    intent = Intent(config, prompt, m)
    assert (prompt.n_between, intent.n_extra) == (3, m + n_copies)
    record = CompressionRecord(intent, 2, slots[: prompt.end].clone(), extra)
    table = CompressionTable(req_to_token, n_layers)
    budgets = torch.tensor([1, 6, 2])
    order = torch.rand((n_layers, n_heads, 10), generator=g).argsort(-1)
    policy = FixedPolicy(order, budgets)
    q = torch.randn((n_layers, 3, 4, dim), generator=g)
    monkeypatch.setattr(compress, "policy_of", lambda config: policy)
    TorchPass(PassInputs(k_all, v_all, table, ONE_RANK, 0.5))([Job(record, q)])
    assert torch.equal(policy.seen.q_text, q) and policy.seen.scale == 0.5
    assert torch.equal(policy.seen.k_text, k_before[:, slots[15:18]])
    k_visual = k_before[:, slots[prompt.visual_positions()]]
    assert torch.equal(policy.seen.k_visual, k_visual)
    assert policy.seen.k_context is not None
    context = slots[[0, 1, *between_positions(prompt).tolist()]]
    assert torch.equal(policy.seen.k_context, k_before[:, context])
    row = req_to_token[2].tolist()
    assert row[:2] == slots[:2].tolist()
    assert row[2:5] == record.columns.tolist()
    assert row[5:12] == [0] * 7
    between = slots[between_positions(prompt)]
    assert row[12:15] == (record.copies if n_copies else between).tolist()
    assert row[15:18] == slots[15:18].tolist()
    assert row[18:] == [-7] * 14
    assert bool((req_to_token[[0, 1, 3]] == -7).all())
    for cache, before in ((k_all, k_before), (v_all, v_before)):
        if n_copies:
            assert torch.equal(cache[:, record.copies], before[:, between])
        untouched = torch.ones(rows, dtype=torch.bool)
        untouched[extra] = False
        assert torch.equal(cache[:, untouched], before[:, untouched])
    assert (int(table.gap_start[2]), int(table.gap_len[2])) == (2, 10)
    assert table.cell_offset[2].tolist() == [0, 1, 7, 9]
    assert table.gap_len.tolist() == [0, 0, 10, 0]
    assert record.budgets is not None
    scores = importance_batched(q, k_before[:, slots[15:18]], k_visual, scale=0.5)
    shares = [
        float(scores[layer, head, order[layer, head, :n]].sum() / scores[layer, head].sum())
        for layer, n in enumerate([1, 6, 2])
        for head in range(n_heads)
    ]
    report = record.report()
    assert report.pop("visual_mass") == pytest.approx(sum(shares) / len(shares), abs=1e-6)
    assert report == {
        "policy": "aircache",
        "retention": 0.1,
        "visual_tokens": 10,
        "columns": 3,
        "slots_freed": 7,
        "layer_budgets": [1, 6, 2],
        "instruction_tokens": 3,
        "reused": False,
        "when": "prefill",
        "rung": 0,
        "packed_at": 1,
        "selection": [
            [sorted(order[layer, head, :n].tolist()) for head in range(n_heads)]
            for layer, n in enumerate([1, 6, 2])
        ],
    }
    table.clear(torch.tensor([2, 1]))
    assert table.gap_len.tolist() == [0, 0, 0, 0]


def test_the_private_slots_of_a_record() -> None:
    prompt = VisualPrompt(((2, 7), (9, 12)), length=15, n_visual=8)
    intent = Intent(AirCacheConfig(), prompt, 2)
    record = CompressionRecord(intent, 1, torch.arange(12), torch.arange(20, 22))
    # 17 slots since the head of 2: all 15 of the prompt, and 4 generated.
    assert record.private_tokens(17) == 17 + 2
    record.released = prompt.n_visual
    assert record.private_tokens(17) == 17 + 2 - 8
    record.shared = True
    assert record.private_tokens(17) == 17 - 8
