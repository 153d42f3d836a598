# SPDX-License-Identifier: Apache-2.0
"""Which older pictures give way in a bounded conversation, and which of their cells stay."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from aircache_sglang.config import AirCacheConfig
from aircache_sglang.runtime.decide import Intent
from aircache_sglang.runtime.record import Replica, Segment
from aircache_sglang.runtime.session import chain, older_cells, originals_of
from aircache_sglang.runtime.spans import VisualPrompt

LAYERS = 3


def segment(n_visual: int, rung: int, columns: int) -> Segment:
    """With uneven budgets: the first layer keeps one more than the last."""
    budgets = torch.full((LAYERS,), columns)
    if 1 <= columns < n_visual:
        budgets[0] += 1
        budgets[-1] -= 1
    return Segment(n_visual, rung, columns, budgets)


def replica(bound: int, *segments: Segment) -> Replica:
    n_visual = sum(part.n_visual for part in segments)
    prompt = VisualPrompt(((4, 4 + n_visual),), length=n_visual + 9, n_visual=n_visual)
    config = AirCacheConfig(
        reuse="compressed", session_columns=bound, rungs=(0.5, 0.25, 0.1), min_visual_tokens=3
    )
    m = sum(part.columns for part in segments)
    nothing = torch.empty(0)
    return Replica((), Intent(config, prompt, m), nothing, nothing, None, None, segments)


def with_pictures(base: Replica, *sizes: int) -> Intent:
    """The intent of a turn that goes on with pictures of these sizes."""
    done, at = base.intent.prompt, base.intent.prompt.length + 2
    spans = list(done.spans)
    for size in sizes:
        spans.append((at, at + size))
        at += size + 1
    n_visual = sum(b - a for a, b in spans)
    prompt = VisualPrompt(tuple(spans), length=at + 3, n_visual=n_visual)
    return Intent(base.intent.config, prompt, 1)


def sizes_of(base: Replica, *pictures: int) -> tuple[int, list[int], int]:
    """Visual tokens that keep nothing, columns of the older that do, columns of the new."""
    found = chain(base, with_pictures(base, *pictures))
    return found.gone, [part.columns for _, part in found.kept], found.columns


def test_the_oldest_give_way_rung_by_rung() -> None:
    old, new = segment(40, 0, 20), segment(40, 0, 20)
    assert sizes_of(replica(80, old, new), 40) == (0, [20, 20], 20)
    assert sizes_of(replica(55, old, new), 40) == (0, [10, 20], 20)
    assert sizes_of(replica(45, old, new), 40) == (0, [10, 10], 20)
    assert sizes_of(replica(39, old, new), 40) == (0, [4, 10], 20)
    assert sizes_of(replica(30, old, new), 40) == (0, [4, 4], 20)
    assert sizes_of(replica(27, old, new), 40) == (40, [4], 20)
    assert sizes_of(replica(20, old, new), 40) == (80, [], 20)
    # And at last the new one.
    assert sizes_of(replica(12, old, new), 40) == (80, [], 12)


def test_pictures_of_one_turn_are_one_segment() -> None:
    assert sizes_of(replica(80, segment(40, 0, 20)), 10, 30) == (0, [20], 20)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Replica, list[int]]:
    bound = draw(st.integers(1, 60))
    parts: list[Segment] = []
    for _ in range(draw(st.integers(1, 5))):
        n_visual = draw(st.integers(3, 60))
        columns = draw(st.integers(0, min(n_visual, bound - sum(p.columns for p in parts))))
        parts.append(segment(n_visual, draw(st.integers(0, 2)), columns))
    return replica(bound, *parts), draw(st.lists(st.integers(1, 50), min_size=1, max_size=3))


@given(conversations())
def test_the_bound_holds_and_no_layer_grows(case: tuple[Replica, list[int]]) -> None:
    base, pictures = case
    found = chain(base, with_pictures(base, *pictures))
    assert found.total <= base.intent.config.session_columns  # type: ignore[operator]
    assert found.columns >= 1
    for place, part in found.kept:
        before = base.segments[place]
        assert 0 < part.columns <= before.columns
        assert int(part.budgets.sum()) == LAYERS * part.columns
        assert (part.budgets <= before.budgets).all()
    kept = sum(part.n_visual for _, part in found.kept)
    assert found.gone + kept == sum(part.n_visual for part in base.segments)
    cells, counts = older_cells(found, LAYERS)
    assert counts == [int(sum(part.budgets[layer] for _, part in found.kept)) for layer in range(3)]
    assert len(set(cells)) == len(cells) == sum(counts)
    assert cells == sorted(cells), "each layer's, and within it the older first"


def test_slots_by_position() -> None:
    """Behind a packed row's gap its texts have moved up; what follows is where it was."""
    base_prompt = VisualPrompt(((2, 5), (7, 9), (10, 12)), length=15, n_visual=7)
    base = replica(20, segment(7, 0, 2))
    base = Replica((), Intent(AirCacheConfig(), base_prompt, 2), *[base.slots] * 2, None, None, ())
    prompt = VisualPrompt((*base_prompt.spans, (17, 19)), length=22, n_visual=9)
    # [0, 2) head, [2, 4) columns, [4, 9) padding, [9, 12) texts, [12, ...) as they were.
    row = torch.tensor([1, 2, 50, 51, 0, 0, 0, 0, 0, 6, 7, 10, *range(13, 30)], dtype=torch.int32)
    found = originals_of(base, Intent(AirCacheConfig(), prompt, 3), row)
    assert found.tolist() == [1, 2, 0, 0, 0, 6, 7, 0, 0, 10, 0, 0, *range(13, 20)]
