# SPDX-License-Identifier: Apache-2.0
"""Who gives back which slots of a packed request, with pages of any size; counted out."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from aircache_sglang.config import AirCacheConfig
from aircache_sglang.policy import columns
from aircache_sglang.runtime.decide import Intent, rungs_of
from aircache_sglang.runtime.pages import page_ceil, page_floor, whole_pages, without
from aircache_sglang.runtime.record import CompressionRecord
from aircache_sglang.runtime.spans import VisualPrompt, merge_spans

sizes = st.sampled_from([1, 2, 3, 16])


@st.composite
def prompts(draw: st.DrawFn) -> VisualPrompt:
    """Text, pictures with or without text between them, and an instruction."""
    at, spans = draw(st.integers(0, 40)), []
    for length, gap in draw(
        st.lists(st.tuples(st.integers(1, 60), st.integers(0, 20)), min_size=1, max_size=4)
    ):
        spans.append((at, at + length))
        at += length + gap
    merged = merge_spans(spans)
    assert merged is not None
    n_visual = sum(end - start for start, end in merged)
    return VisualPrompt(merged, merged[-1][1] + draw(st.integers(1, 40)), n_visual)


@given(st.integers(0, 1000), sizes)
def test_floor_and_ceil(n: int, page: int) -> None:
    assert page_floor(n, page) <= n <= page_ceil(n, page)
    assert page_floor(n, page) % page == page_ceil(n, page) % page == 0
    assert page_ceil(n, page) - page_floor(n, page) == (page if n % page else 0)


@given(prompts(), sizes)
def test_whole_pages_are_the_pages_without_text(prompt: VisualPrompt, page: int) -> None:
    visual = {position for span in prompt.spans for position in range(*span)}
    expected = {
        position
        for position in visual
        if visual.issuperset(range(page * (position // page), page * (position // page + 1)))
    }
    found = [position for span in whole_pages(prompt.spans, page) for position in range(*span)]
    assert found == sorted(expected)


@given(prompts(), sizes, st.integers(0, 200), st.integers(0, 200))
def test_without(prompt: VisualPrompt, page: int, start: int, length: int) -> None:
    holes = whole_pages(prompt.spans, page)
    gone = {position for hole in holes for position in range(*hole)}
    parts = list(without(start, start + length, holes))
    left = [position for part in parts for position in range(*part)]
    assert left == [p for p in range(start, start + length) if p not in gone]
    assert all(a < b for a, b in parts)


def intent_of(prompt: VisualPrompt, page: int, **fields: Any) -> Intent:
    config = AirCacheConfig("aircache", 0.1, **fields)
    m = columns(config.retention, prompt.n_visual)
    return Intent(config, prompt, m, page_size=page)


@given(prompts(), sizes, st.sampled_from(["exact", "compressed"]))
def test_what_an_intent_counts(prompt: VisualPrompt, page: int, reuse: str) -> None:
    intent = intent_of(prompt, page, reuse=reuse)
    assert intent.n_extra % page == 0
    assert 0 <= intent.n_extra - intent.columns - intent.n_copies < page
    assert all(start % page == end % page == 0 for start, end in intent.given_up)
    # Not a page of what is read afterwards: the head, the instruction, and text that is not copied.
    gone = {position for part in intent.given_up for position in range(*part)}
    head = range(intent.replica_start if reuse == "compressed" else prompt.start)
    kept = {*head, *range(prompt.end, prompt.length)}
    if reuse == "exact":
        visual = {position for span in prompt.spans for position in range(*span)}
        kept |= set(range(prompt.length)) - visual
    assert not {position // page for position in gone} & {position // page for position in kept}
    if page == 1:
        assert intent.n_freed == prompt.n_visual - intent.columns


@given(prompts(), sizes)
def test_rungs_take_fewer_pages_one_after_the_other(prompt: VisualPrompt, page: int) -> None:
    intent = intent_of(prompt, page, when="pressure", rungs=(0.5, 0.25, 0.1))
    taken = [page_ceil(rung.columns, page) for rung in rungs_of(intent)]
    assert all(first > second for first, second in itertools.pairwise(taken))
    assert all(n < intent.n_given_up for n in taken)
    if intent.n_freed > 0 and intent.columns < prompt.n_visual:
        assert rungs_of(intent)[-1].columns == intent.columns


@given(prompts(), sizes)
def test_a_replica_has_a_slot_for_every_position(prompt: VisualPrompt, page: int) -> None:
    """Its row: copied head, columns, padding, copied text between, the instruction's own slots."""
    intent = intent_of(prompt, page, reuse="compressed")
    if intent.replica_end < prompt.end:
        return
    first = page_ceil(prompt.length, page) + page
    originals = torch.arange(page, page + prompt.length)
    extra = torch.arange(first, first + intent.n_extra)
    record = CompressionRecord(intent, 0, originals[: prompt.end], extra)
    record.packed(torch.tensor([intent.columns]), torch.tensor(1.0), None)
    replica = record.replica(originals[page_floor(prompt.end, page) : intent.replica_end])
    row = replica.row_slots(replica.slots)
    assert len(row) == intent.replica_end - intent.replica_start
    # Whole pages, each once: it is freed by the page.
    pages = replica.slots[::page] // page
    assert len(set(pages.tolist())) == len(pages) == len(replica.slots) // page
    named = dict(enumerate(row.tolist(), start=intent.replica_start))
    head = [named[p] for p in range(intent.replica_start, prompt.start)]
    behind = prompt.start + prompt.n_visual
    cells = [named[p] for p in range(prompt.start, behind)]
    between = [named[p] for p in range(behind, prompt.end)]
    assert head + between == record.copies.tolist()
    assert cells == record.columns.tolist() + [0] * (prompt.n_visual - intent.columns)
    tail = range(prompt.end, intent.replica_end)
    assert [named[p] for p in tail] == originals[prompt.end : intent.replica_end].tolist()
