# SPDX-License-Identifier: Apache-2.0
"""Batched decode attention against a plain loop in float64 that never heard of packing."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aircache_sglang.config import AirCacheConfig
from aircache_sglang.runtime.compress import cells_of, pack
from aircache_sglang.runtime.decide import Intent
from aircache_sglang.runtime.decode import (
    CellCache,
    TorchDecoder,
    attend,
    layer_cell_rows,
    make_bucket,
    pad_rows,
    text_positions,
)
from aircache_sglang.runtime.record import CompressionRecord
from aircache_sglang.runtime.spans import VisualPrompt
from aircache_sglang.runtime.table import CompressionTable
from tests.support.spans import between_positions

SCALE = 0.37
SIZES = [(1, 1, 4), (2, 2, 8), (4, 2, 8), (6, 1, 5)]  # query heads, KV heads, head size


@dataclasses.dataclass(frozen=True)
class Ask:
    """One request: spans of its pictures (none: uncompressed), prompt length, tokens generated."""

    spans: tuple[tuple[int, int], ...]
    length: int
    generated: int
    budgets: tuple[int, ...] = ()

    @property
    def prompt(self) -> VisualPrompt:
        return VisualPrompt(self.spans, self.length, sum(b - a for a, b in self.spans))


class World:
    """A pool with requests in it, and for each the K and V that every layer should still see."""

    def __init__(
        self, asks: list[Ask], n_layers: int, sizes: tuple[int, int, int], seed: int = 0
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        self.n_heads, self.n_kv, self.dim = sizes
        self.n_layers = n_layers
        total = sum(2 * (ask.length + ask.generated) for ask in asks) + 8
        self.rows = total + 1
        self.k_all, self.v_all = torch.full(
            (2, n_layers, self.rows, self.n_kv, self.dim), torch.nan
        ).unbind(0)
        # SGLang's padding slot holds whatever was written there last, but numbers.
        self.k_all[:, 0] = self.v_all[:, 0] = 1e4
        self.free = torch.randperm(total, generator=g) + 1
        self.req_to_token = torch.zeros((len(asks) + 2, 64), dtype=torch.int32)
        self.table = CompressionTable(self.req_to_token, n_layers)
        self.records: dict[int, CompressionRecord] = {}
        self.rows_of = [int(row) + 1 for row in torch.randperm(len(asks) + 1, generator=g)]
        self.rows_of = self.rows_of[: len(asks)]
        self.seq_lens = [ask.length + ask.generated for ask in asks]
        self.q = torch.randn((len(asks), self.n_heads, self.dim), generator=g)
        # truth[i][layer][head]: (K [n, D], V [n, D]) in float64.
        self.truth: list[list[list[tuple[torch.Tensor, torch.Tensor]]]] = []
        for row, ask in zip(self.rows_of, asks, strict=True):
            self._add(row, ask, g)

    def _alloc(self, n: int) -> torch.Tensor:
        taken, self.free = self.free[:n], self.free[n:]
        return taken

    def _add(self, row: int, ask: Ask, g: torch.Generator) -> None:
        length = ask.length + ask.generated
        slots = self._alloc(length)
        shape = (self.n_layers, length, self.n_kv, self.dim)
        k, v = torch.randn((2, *shape), generator=g).unbind(0)
        self.k_all[:, slots], self.v_all[:, slots] = k, v
        self.req_to_token[row, :length] = slots
        kept = [[list(range(length)) for _ in range(self.n_kv)] for _ in range(self.n_layers)]
        if ask.spans:
            prompt = ask.prompt
            budgets = torch.tensor(ask.budgets)
            m = int(budgets.sum()) // self.n_layers
            assert int(budgets.sum()) == m * self.n_layers
            record = CompressionRecord(
                Intent(AirCacheConfig(reuse="compressed"), prompt, m),
                row,
                slots[: prompt.end].clone(),
                self._alloc(m + prompt.n_between),
                budgets=budgets,
            )
            order = torch.rand((self.n_layers, self.n_kv, prompt.n_visual), generator=g).argsort(-1)
            positions = prompt.visual_positions()
            visual = slots[positions]
            selected = cells_of(order, budgets, m * self.n_layers)
            pack(self.k_all, self.v_all, visual, record.columns, selected, budgets)
            between = slots[between_positions(prompt)]
            self.k_all[:, record.copies] = self.k_all[:, between]
            self.v_all[:, record.copies] = self.v_all[:, between]
            gap_end = prompt.start + prompt.n_visual
            self.req_to_token[row, prompt.start : gap_end] = 0
            self.req_to_token[row, prompt.start : prompt.start + m] = record.columns
            self.req_to_token[row, gap_end : prompt.end] = record.copies
            self.table.set(row, prompt.start, prompt.n_visual, budgets)
            self.records[row] = record
            # The original slots now belong to somebody else.
            gone = slots[prompt.start : prompt.end]
            self.k_all[:, gone] = self.v_all[:, gone] = torch.nan
            visual_set = set(positions.tolist())
            for layer in range(self.n_layers):
                for head in range(self.n_kv):
                    chosen = positions[order[layer, head, : ask.budgets[layer]]].tolist()
                    kept[layer][head] = [
                        p for p in range(length) if p not in visual_set or p in chosen
                    ]
        self.truth.append(
            [
                [
                    (k[layer, kept[layer][h], h].double(), v[layer, kept[layer][h], h].double())
                    for h in range(self.n_kv)
                ]
                for layer in range(self.n_layers)
            ]
        )

    def expected(self, i: int, layer: int) -> torch.Tensor:
        """Attention of request i, a loop over its query heads; float64 [H_q, D]."""
        out = []
        for head in range(self.n_heads):
            k, v = self.truth[i][layer][head // (self.n_heads // self.n_kv)]
            out.append((k @ self.q[i, head].double() * SCALE).softmax(0) @ v)
        return torch.stack(out)

    def decode(self) -> list[torch.Tensor]:
        """What the backend computes: per layer [bs, H_q, D]."""
        pool = SimpleNamespace(
            k_all=self.k_all,
            v_all=self.v_all,
            layer_num=self.n_layers,
            rows=self.rows,
            plane=lambda layer: layer.layer_id - 5,
        )
        self.decoder = TorchDecoder(pool, self.table)  # type: ignore[arg-type]
        batch = SimpleNamespace(
            req_pool_indices=torch.tensor(self.rows_of),
            seq_lens=torch.tensor(self.seq_lens),
        )
        self.decoder.plan(batch, [self.records.get(row) for row in self.rows_of])
        return [
            self.decoder.attend(self.q, SimpleNamespace(layer_id=layer + 5, scaling=SCALE), batch)
            for layer in range(self.n_layers)
        ]

    def check(self) -> None:
        for layer, out in enumerate(self.decode()):
            for i in range(len(self.rows_of)):
                want = self.expected(i, layer)
                # The same sums in float32; the bound follows from its precision alone.
                error = (out[i].double() - want).abs().max()
                assert error < 64 * torch.finfo(torch.float32).eps * (1 + want.abs().max())


MIXED = [
    Ask(spans=((3, 15),), length=20, generated=2, budgets=(1, 5, 3)),
    Ask(spans=(), length=30, generated=1),
    Ask(spans=((0, 4), (6, 7), (10, 16)), length=19, generated=4, budgets=(11, 1, 6)),
    Ask(spans=((1, 3),), length=4, generated=1, budgets=(1, 1, 1)),
    Ask(spans=(), length=1, generated=1),
]


@pytest.mark.parametrize("sizes", SIZES)
def test_a_mixed_batch(sizes: tuple[int, int, int]) -> None:
    world = World(MIXED, 3, sizes)
    world.check()
    assert len(world.decoder._buckets) == 2


@pytest.mark.parametrize("i", [0, 2, 3])
def test_alone_as_in_the_batch(i: int) -> None:
    world = World([MIXED[i]], 3, (4, 2, 8))
    world.check()
    assert len(world.decoder._buckets) == 1


@st.composite
def worlds(draw: st.DrawFn) -> World:
    n_layers = draw(st.integers(1, 5))
    asks = []
    for _ in range(draw(st.integers(1, 4))):
        spans: list[tuple[int, int]] = []
        position = draw(st.integers(0, 4))
        for _ in range(draw(st.integers(0, 3))):
            size = draw(st.integers(1, 8))
            spans.append((position, position + size))
            position += size + draw(st.integers(1, 3))
        n_visual = sum(b - a for a, b in spans)
        budgets: list[int] = []
        if spans:
            m = draw(st.integers(1, n_visual))
            left = n_layers * m
            for layer in range(n_layers):
                after = n_layers - layer - 1
                low, high = max(1, left - after * n_visual), min(n_visual, left - after)
                budgets.append(draw(st.integers(low, high)))
                left -= budgets[-1]
        asks.append(
            Ask(
                tuple(spans),
                position + draw(st.integers(1, 5)),
                draw(st.integers(1, 4)),
                tuple(budgets),
            )
        )
    if not any(ask.spans for ask in asks):
        asks.append(Ask(((0, 2),), 3, 1, (1,) * n_layers))
    return World(asks, n_layers, draw(st.sampled_from(SIZES)), draw(st.integers(0, 2**31)))


@settings(deadline=None)
@given(worlds())
def test_any_batch(world: World) -> None:
    world.check()


def test_a_pool_in_bfloat16_is_read_in_the_queries_precision() -> None:
    world = World(MIXED, 3, (4, 2, 8))
    world.k_all, world.v_all = world.k_all.bfloat16(), world.v_all.bfloat16()
    rounded = [
        [[(k.bfloat16().double(), v.bfloat16().double()) for k, v in heads] for heads in layers]
        for layers in world.truth
    ]
    world.truth = rounded
    world.check()


def test_the_cell_cache_follows_the_members() -> None:
    world = World(MIXED, 3, (2, 2, 8))
    records = list(world.records.values())
    cache = CellCache()
    first = cache.cells(records, 3, world.rows)
    assert cache.cells(list(records), 3, world.rows) is first
    fewer = cache.cells(records[1:], 3, world.rows)
    assert fewer is not first
    swapped = cache.cells(records[::-1], 3, world.rows)
    for layer in range(3):
        for place, record in enumerate(records[::-1]):
            index, valid = swapped[layer]
            want = layer_cell_rows(record, 3, world.rows)[layer]
            assert torch.equal(index[place][valid[place]], want)


def test_pad_rows() -> None:
    padded, valid = pad_rows([torch.tensor([5, 6, 7]), torch.tensor([9])])
    assert padded.tolist() == [[5, 6, 7], [9, 0, 0]]
    assert valid.tolist() == [[True, True, True], [True, False, False]]


def test_text_positions_skip_the_gap() -> None:
    lens, start, gap = torch.tensor([9, 4, 6]), torch.tensor([2, 0, 0]), torch.tensor([5, 0, 5])
    positions, valid = text_positions(lens, start, gap)
    assert valid.tolist() == [[True] * 4, [True] * 4, [True] + [False] * 3]
    assert positions[0].tolist() == [0, 1, 7, 8]
    assert positions[1].tolist() == [0, 1, 2, 3]
    assert positions[2, 0] == 5


def test_a_bucket_gathers_no_slot_of_the_gap() -> None:
    world = World(MIXED, 3, (4, 2, 8))
    world.decode()
    compressed = next(bucket for bucket in world.decoder._buckets if bucket.cells)
    members = torch.tensor(world.rows_of)[compressed.members].tolist()
    for place, row in enumerate(members):
        record = world.records[row]
        slots = compressed.text_slots[place][compressed.text_valid[place]].tolist()
        assert not set(slots) & set(record.columns.tolist())
        assert set(record.copies.tolist()) <= set(slots)
        assert 0 not in slots


def test_make_bucket_and_attend_for_one_member() -> None:
    world = World([MIXED[0]], 3, (4, 2, 8))
    row = world.rows_of[0]
    cells = CellCache().cells([world.records[row]], 3, world.rows)
    bucket = make_bucket(
        torch.tensor([0]),
        torch.tensor([row]),
        torch.tensor(world.seq_lens),
        world.req_to_token,
        world.table.gap_start,
        world.table.gap_len,
        cells,
    )
    assert int(bucket.text_valid.sum()) == 22 - 12
    out = attend(bucket, world.q, world.k_all, world.v_all, 1, SCALE)
    assert out.shape == (1, 4, 8)
    assert (out[0].double() - world.expected(0, 1)).abs().max() < 1e-5
