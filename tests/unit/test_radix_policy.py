# SPDX-License-Identifier: Apache-2.0
"""The radix tree against a plain model: one dictionary entry a token, no nodes.

Requests live through match, chunks, pass, result, decode, finish, retraction and abort as SGLang
leads them (mem_cache/common.py), on its own allocator. Each slot is labelled with what its KV was
computed from, so that a row that holds the wrong KV, exact or lossy, is found at once.
"""

from __future__ import annotations

import dataclasses
import random
import time
from array import array
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sglang.srt.managers.schedule_batch import (
    MM_PAD_SHIFT_VALUE,
    Modality,
    MultimodalDataItem,
    ReqKvInfo,
)
from sglang.srt.managers.scheduler_components.pool_stats_observer import kv_private_tokens
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from aircache_sglang.config import AirCacheConfig
from aircache_sglang.engine import tree
from aircache_sglang.engine.radix_cache import AirCacheRadixCache
from aircache_sglang.engine.request import RequestState
from aircache_sglang.engine.tree import Kind
from aircache_sglang.runtime import spans
from aircache_sglang.runtime.compress import PassInputs
from aircache_sglang.runtime.decide import Intent
from aircache_sglang.runtime.record import CompressionRecord, Stage
from aircache_sglang.runtime.spans import VisualPrompt
from aircache_sglang.runtime.table import CompressionTable
from tests.support.one_rank import ONE_RANK
from tests.support.spans import between_positions

POOL = 60
ROWS, CONTEXT = 8, 64
INSTRUCTION = 2
TEXT_SHARE = 0.25

Ids = tuple[int, ...]


@pytest.fixture(autouse=True)
def short_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "INSTRUCTION_LIMIT", INSTRUCTION)


def picture(name: int, tokens: int = 3) -> list[int]:
    """Placeholders as SGLang pads them: four values in turn."""
    return [MM_PAD_SHIFT_VALUE + 10 * name + i % 4 for i in range(tokens)]


def is_visual(token: int) -> bool:
    return token >= MM_PAD_SHIFT_VALUE


def layout(ids: Ids) -> VisualPrompt | None:
    positions = [i for i, token in enumerate(ids) if is_visual(token)]
    if not positions or positions[-1] == len(ids) - 1:
        return None
    merged = spans.merge_spans([(i, i + 1) for i in positions])
    assert merged is not None
    return VisualPrompt(merged, len(ids), len(positions))


class Rows:
    """The part of SGLang's ReqToTokenPool that the tree uses."""

    def __init__(self) -> None:
        self.req_to_token = torch.zeros((ROWS, CONTEXT), dtype=torch.int32)

    def write(self, indices: Any, values: torch.Tensor) -> None:
        self.req_to_token[indices] = values


@dataclasses.dataclass(eq=False)
class Request:
    """The attributes of SGLang's Req that the tree reads."""

    prompt: Ids
    answer: Ids
    intent: Intent | None
    kv: ReqKvInfo = dataclasses.field(default_factory=ReqKvInfo)
    extra_key: str | None = None
    cache_salt: str | None = None
    priority: int = 0
    lock: Any = None
    last_node: Any = None
    prefix_len: int = 0
    n_out: int = 0  # tokens of the answer that are known
    aircache: RequestState = dataclasses.field(default_factory=lambda: RequestState(bare_spans=[]))

    @property
    def origin_input_ids(self) -> array[int]:
        return array("q", self.prompt)

    @property
    def fill(self) -> Ids:
        return self.prompt + self.answer[: self.n_out]

    @property
    def full_untruncated_fill_ids(self) -> array[int]:
        return array("q", self.fill)

    @property
    def everything(self) -> Ids:
        return self.prompt + self.answer

    def prefix(self, length: int) -> tuple[str | None, Ids]:
        """What the KV of the token at `length` - 1 depends on."""
        return self.extra_key, self.everything[:length]


class World:
    """Tree, allocator and requests, with the labels of the slots."""

    def __init__(self, *, disable: bool = False, policy: str = "lru") -> None:
        self.rows = Rows()
        kv = torch.zeros(2, POOL + 1, 1, 1)
        table = CompressionTable(self.rows.req_to_token, 2)
        self.inputs = PassInputs(kv, kv, table, ONE_RANK, 1.0)
        self.allocator = TokenToKVPoolAllocator(POOL, torch.float32, "cpu", None, False)
        self.records: dict[int, CompressionRecord] = {}
        self.surplus: dict[int, torch.Tensor] = {}
        self.counts: Counter[str] = Counter()
        params = CacheInitParams(
            disable=disable,
            eviction_policy=policy,
            req_to_token_pool=self.rows,  # type: ignore[arg-type]
            token_to_kv_pool_allocator=self.allocator,
            page_size=1,
        )
        self.tree = AirCacheRadixCache(params, self, TEXT_SHARE, self)
        self.label: dict[int, Any] = {}
        self.freed: list[int] = []
        free = self.allocator.free

        def watched(slots: torch.Tensor) -> None:
            self.freed.extend(slots.tolist())
            free(slots)

        self.allocator.free = watched  # type: ignore[method-assign]
        self.running: list[Request] = []

    # What the tree asks

    def intent(self, req: Request) -> Intent | None:
        return req.intent

    def released(self, req: Request, record: CompressionRecord) -> None:
        self.counts["released"] += 1

    def is_chained(self, req: Request) -> bool:
        return False

    def keeps_whole(self, req: Request) -> bool:
        return False

    def prefilled(self, req: Request) -> None:
        self.counts["prefilled"] += 1

    def forget(self, req: Request) -> CompressionRecord | None:
        return self.records.pop(req.kv.req_pool_idx, None)

    def evicted(self, kind: str, slots: int) -> None:
        self.counts[kind] += slots

    def refilled(self, slots: int) -> None:
        self.counts["refilled"] += slots

    # What SGLang does

    def alloc(self, n: int) -> torch.Tensor | None:
        self.allocator.evict_to_free_tokens(self.tree, n)
        return self.allocator.alloc(n)

    def match(self, req: Request) -> None:
        """init_next_round_input, and the lock of the admission."""
        key = RadixKey(req.full_untruncated_fill_ids, req.extra_key, limit=len(req.fill) - 1)
        found = self.tree.match_prefix(MatchPrefixParams(key=key, req=req))
        req.last_node, req.prefix_len = found.last_device_node, found.device_prefix_len
        req.lock = self.tree.lock(req.last_node)
        req.kv.cache_protected_len = req.prefix_len
        free_rows = set(range(ROWS)) - {other.kv.req_pool_idx for other in self.running}
        req.kv.req_pool_idx = min(free_rows)
        path = self.tree.path_device_indices(req.last_node)
        self.rows.write((req.kv.req_pool_idx, slice(0, req.prefix_len)), path.to(torch.int32))
        req.kv.kv_allocated_len = req.kv.kv_committed_len = req.prefix_len
        self.running.append(req)
        replica = req.last_node.replica
        if replica is not None:
            content = replica.content
            self.records[req.kv.req_pool_idx] = CompressionRecord.of_replica(
                content, req.kv.req_pool_idx, own=content.intent
            )

    def record(self, req: Request) -> CompressionRecord | None:
        return self.records.get(req.kv.req_pool_idx)

    def extend(self, req: Request, end: int) -> bool:
        """Allocate and compute [allocated, end); False if the pool is exhausted."""
        begin = req.kv.kv_allocated_len
        slots = self.alloc(end - begin)
        if slots is None:
            return False
        row = req.kv.req_pool_idx
        self.rows.write((row, slice(begin, end)), slots.to(torch.int32))
        req.kv.kv_allocated_len = req.kv.kv_committed_len = end
        record = self.record(req)
        packed = None if record is None else record.intent.config.variant()
        for position, slot in zip(range(begin, end), slots.tolist(), strict=True):
            self.label[slot] = (packed, req.prefix(position + 1))
        return True

    def run_pass(self, req: Request) -> bool:
        """Allocate the columns and pack."""
        intent, row = req.intent, req.kv.req_pool_idx
        assert intent is not None
        extra = self.alloc(intent.n_extra)
        if extra is None:
            return False
        prompt = intent.prompt
        originals = self.rows.req_to_token[row, : prompt.end].to(torch.int64)
        record = CompressionRecord(
            intent=intent,
            row=row,
            originals=originals,
            extra=extra,
            exact_tail=len(req.fill) > prompt.length,
        )
        self.records[row] = record
        for j, slot in enumerate(record.columns.tolist()):
            self.label[slot] = ("column", intent.config.variant(), req.prefix(prompt.length), j)
        if intent.n_copies:
            between = originals[between_positions(prompt)]
            for source, slot in zip(between.tolist(), record.copies.tolist(), strict=True):
                self.label[slot] = self.label[source]
        budgets = torch.full((2,), intent.columns)
        mass = torch.tensor(1.0, dtype=torch.float64)
        self.inputs.enter(record, budgets)
        self.inputs.finish(record, budgets, mass, torch.zeros(1, 2 * intent.columns))
        return True

    def release(self, req: Request, *, checkpoint: bool) -> None:
        """release_kv_cache (mem_cache/common.py)."""
        kv = req.kv
        owned = kv.kv_committed_len
        if checkpoint:
            self.tree.checkpoint(req, up_to=owned)
        self.tree.free_kv_row(kv, [(kv.cache_protected_len, owned)])
        self.tree.unlock(req.lock)
        req.lock = None
        self.tree.on_release(req, checkpointed=checkpoint)
        self.running.remove(req)
        req.kv = ReqKvInfo()
        req.last_node = None

    # Checks

    def check_row(self, req: Request) -> None:
        row = self.rows.req_to_token[req.kv.req_pool_idx].tolist()
        length, record = req.kv.kv_committed_len, self.record(req)
        if record is None:
            for position in range(length):
                assert self.label[row[position]] == (None, req.prefix(position + 1))
            return
        prompt, variant = record.intent.prompt, record.intent.config.variant()
        for position in range(prompt.start):
            assert self.label[row[position]] == (None, req.prefix(position + 1))
        m = record.intent.columns
        head = req.prefix(prompt.length)
        for j in range(m):
            assert self.label[row[prompt.start + j]] == ("column", variant, head, j)
        assert row[prompt.start : prompt.start + m] == record.columns.tolist()
        gap_end = prompt.start + prompt.n_visual
        assert not any(row[prompt.start + m : gap_end])
        for j, position in enumerate(between_positions(prompt).tolist()):
            assert self.label[row[gap_end + j]] == (None, req.prefix(position + 1))
        exact_end = len(req.prompt) if not record.exact_tail else self.prefill_end(req)
        exact_end = prompt.length if record.reused else exact_end
        for position in range(prompt.end, length):
            lossy = None if position < exact_end else variant
            assert self.label[row[position]] == (lossy, req.prefix(position + 1)), position

    def prefill_end(self, req: Request) -> int:
        return req.prefill_end  # type: ignore[attr-defined, no-any-return]

    def check(self) -> None:
        tree, allocator = self.tree, self.allocator
        free = allocator.free_pages.tolist()
        owned = tree.all_values_flatten().tolist()
        assert len(set(free)) == len(free), "freed twice"
        assert len(set(owned)) == len(owned), "owned twice by the tree"
        assert not set(free) & set(owned), "owned and free"
        assert len(owned) == tree.evictable_size() + tree.protected_size()
        private = 0
        for req in self.running:
            record, stock = self.record(req), kv_private_tokens(req.kv, 1)
            private += stock if record is None else record.private_tokens(stock)
            row = self.rows.req_to_token[req.kv.req_pool_idx, : req.kv.kv_allocated_len]
            assert not set(row.tolist()) & set(free), "a row names a free slot"
            self.check_row(req)
        # free + text + visual + columns = pool.
        assert len(free) + len(owned) + private == POOL


def make_request(
    ids: Ids,
    answer: Ids,
    mode: str,
    retention: float = 0.34,
    extra_key: str | None = None,
    **settings: Any,
) -> Request:
    prompt = layout(ids)
    intent = None
    if mode != "plain" and prompt is not None:
        config = AirCacheConfig(retention=retention, reuse=mode, **settings)
        intent = Intent(config, prompt, max(1, round(retention * prompt.n_visual)))
    return Request(ids, answer, intent, extra_key=extra_key)


def run_prefill(world: World, req: Request) -> bool:
    req.prefill_end = len(req.fill)  # type: ignore[attr-defined]
    if not world.extend(req, len(req.fill)):
        return False
    compressed = req.intent is not None and world.record(req) is None
    return world.run_pass(req) if compressed else True


def serve(world: World, ids: Ids, answer: Ids = (), mode: str = "exact", **kw: Any) -> Request:
    """A request from its match to the last token; it still runs."""
    req = make_request(ids, answer, mode, **kw)
    world.match(req)
    req.cached = req.prefix_len  # type: ignore[attr-defined]
    assert run_prefill(world, req)
    world.tree.checkpoint(req, up_to=len(req.fill))
    world.check()
    for position in range(len(answer)):
        req.n_out = position + 1
        assert world.extend(req, len(req.fill))
    world.check()
    return req


def complete(world: World, ids: Ids, answer: Ids = (), mode: str = "exact", **kw: Any) -> int:
    """A request from beginning to end; returns its hit tokens."""
    req = serve(world, ids, answer, mode, **kw)
    world.release(req, checkpoint=True)
    world.check()
    return req.cached  # type: ignore[attr-defined, no-any-return]


HEAD = (1, 2)
CAT, DOG = tuple(picture(1)), tuple(picture(2))


def kinds(world: World) -> list[tuple[str, int, int]]:
    """(label, tokens, slots) of every node, parents first."""
    return [(node.label, len(node.key), node.size) for node, _ in world.tree.nodes()]


def evicted(world: World, times: int) -> list[Ids]:
    """The tokens of the nodes that go, one slot asked for at a time."""
    order = []
    for _ in range(times):
        left = {node: node.key.raw_token_ids() for node, _ in world.tree.nodes() if node.size}
        world.tree.evict(EvictParams(num_tokens=1))
        held = {node for node, _ in world.tree.nodes() if node.size}
        order += [tuple(left[node]) for node in left.keys() - held]
        world.check()
    return order


def test_nodes_are_cut_at_span_edges() -> None:
    world = World()
    complete(world, (*HEAD, *CAT, 3, *DOG, 4, 5), (6, 7))
    assert kinds(world) == [
        ("prompt", 2, 2),
        ("visual", 3, 3),
        ("prompt", 1, 1),
        ("visual", 3, 3),
        ("prompt", 2, 2),
    ]


def test_both_parts_of_a_cut_picture_have_its_name() -> None:
    world = World()
    req = make_request((*HEAD, *picture(1, 9), 3, 4), (), "exact")
    world.match(req)
    assert world.extend(req, 7)
    world.tree.checkpoint(req, up_to=7)
    assert run_prefill(world, req)
    world.release(req, checkpoint=True)
    visual = [node for node, _ in world.tree.nodes() if node.kind is Kind.VISUAL]
    assert [len(node.key) for node in visual] == [5, 4]
    assert {node.name for node in visual} == {f"{picture(1)[0]:x}"}


def test_uncompressed_answers_are_generated_text_until_a_prompt_holds_them() -> None:
    world = World()
    complete(world, (1, 2, 3), (4, 5), mode="plain")
    assert kinds(world) == [("prompt", 3, 3), ("generated", 2, 2)]
    complete(world, (1, 2, 3, 4, 6), mode="plain")
    assert kinds(world) == [
        ("prompt", 3, 3),
        ("prompt", 1, 1),
        ("generated", 1, 1),
        ("prompt", 1, 1),
    ]


def test_a_running_request_holds_its_text_and_not_its_picture() -> None:
    world = World()
    req = serve(world, (*HEAD, *CAT, 3, *DOG, 4, 5), (6,))
    assert world.tree.protected_size() == 5 and world.tree.evictable_size() == 6
    world.tree.evict(EvictParams(num_tokens=POOL))
    assert kinds(world) == [
        ("prompt", 2, 2),
        ("visual", 3, 0),
        ("prompt", 1, 1),
        ("visual", 3, 0),
        ("prompt", 2, 2),
    ]
    world.check()
    # One slot a text token, its own answer and the columns: nothing else is held.
    free = world.allocator.available_size()
    assert POOL - free == 5 + 1 + req.intent.columns  # type: ignore[union-attr]
    world.release(req, checkpoint=True)
    world.check()


def test_refill_makes_the_text_below_a_hit_again() -> None:
    world = World()
    ids = (*HEAD, *CAT, 3, 4, 5, 6, 7)
    complete(world, ids)
    assert complete(world, ids) == len(ids) - INSTRUCTION
    world.tree.evict(EvictParams(num_tokens=1))
    assert kinds(world)[1] == ("visual", 3, 0)
    assert complete(world, ids) == len(HEAD)
    assert world.counts["refilled"] == 3
    assert complete(world, ids) == len(ids) - INSTRUCTION


def test_a_picture_is_shared_until_both_are_packed() -> None:
    world = World()
    complete(world, (*HEAD, *CAT, 3, 4))
    first = make_request((*HEAD, *CAT, 5, 6), (), "exact")
    second = make_request((*HEAD, *CAT, 7, 8), (), "exact")
    for req in (first, second):
        world.match(req)
        assert req.prefix_len == 5
    assert run_prefill(world, first)
    world.tree.checkpoint(first, up_to=7)
    # The second still reads the picture.
    world.tree.evict(EvictParams(num_tokens=POOL))
    assert kinds(world)[1] == ("visual", 3, 3)
    assert run_prefill(world, second)
    world.tree.checkpoint(second, up_to=7)
    world.tree.evict(EvictParams(num_tokens=1))
    assert kinds(world)[1] == ("visual", 3, 0)
    world.check()


def test_eviction_order() -> None:
    world = World()
    complete(world, (*HEAD, *CAT, 3, 4), mode="exact")
    complete(world, (9, 8, 7), (6, 5), mode="plain")
    order = []
    while world.tree.total_size():
        before = Counter(world.counts)
        world.tree.evict(EvictParams(num_tokens=1))
        order += [kind for kind in world.counts if world.counts[kind] != before[kind]]
        world.check()
    # The question goes with its picture, which was used as late.
    assert order == ["prompt", "visual", "generated", "prompt", "prompt"]
    assert not kinds(world)


def test_text_above_its_bound_is_pinned_no_more() -> None:
    """The least recently used goes: here a picture, then text, then the picture used last."""
    world = World()
    for _ in range(2):
        complete(world, (*HEAD, *CAT, 3, 4))
    complete(world, tuple(range(10, 26)), mode="plain")
    for _ in range(2):
        complete(world, (30, *DOG, 5, 6))
    assert world.tree.unlocked_text > TEXT_SHARE * POOL
    # Below a picture the two questions are text like any other.
    assert evicted(world, 6) == [(3, 4), CAT, HEAD, tuple(range(10, 26)), DOG, (5, 6)]


def test_a_picture_yields_before_text_within_its_bound() -> None:
    world = World()
    for _ in range(2):
        complete(world, (*HEAD, *CAT, 3, 4))
    complete(world, tuple(range(10, 15)), mode="plain")
    complete(world, (30, *DOG, 5, 6))
    assert world.tree.unlocked_text <= TEXT_SHARE * POOL
    assert evicted(world, 4) == [CAT, (5, 6), DOG, (3, 4)]


def test_of_a_prompts_pictures_the_last_goes_first() -> None:
    """Used at one time; behind a tombstone nothing would be a hit."""
    world = World()
    ids = (*HEAD, *CAT, 3, *DOG, 4, 5)
    complete(world, ids)
    assert evicted(world, 2) == [(4, 5), DOG]
    assert complete(world, ids) == len(HEAD) + len(CAT) + 1


def test_questions_that_one_request_asked_go_before_pictures_in_use() -> None:
    world = World()
    complete(world, (*HEAD, *DOG, 3, 3))
    complete(world, (*HEAD, *CAT, 4, 4))
    complete(world, (*HEAD, *CAT, 5, 5))
    complete(world, (*HEAD, *CAT, 6, 6))
    # A question that two requests asked stays, however old: pinned text.
    complete(world, (*HEAD, *CAT, 5, 5))
    assert evicted(world, 6) == [(3, 3), DOG, (4, 4), (6, 6), CAT, (5, 5)]


def test_the_instruction_alone_is_computed_anew() -> None:
    """Whatever the window: the attention mass is measured with all of it."""
    world = World()
    ids = (*HEAD, *CAT, 3, 4, 5)
    hits = []
    for window in ("elite", "elite", "last-1"):
        req = make_request(ids, (), "exact", window=window)
        world.match(req)
        hits.append(req.prefix_len)
        assert run_prefill(world, req)
        world.release(req, checkpoint=True)
        world.check()
    assert hits == [0, len(ids) - INSTRUCTION, len(ids) - INSTRUCTION]


def test_follow_up_extends_the_replica() -> None:
    world = World()
    turn = (*HEAD, *CAT, 3, 4)
    complete(world, turn, (5, 6), mode="compressed")
    assert [kind for kind, *_ in kinds(world)] == ["prompt", "visual", "packed", "lossy"]
    world.tree.evict(EvictParams(num_tokens=1))
    # The exact picture goes first: it was used before the replica.
    assert [kind for kind, *_ in kinds(world)] == ["prompt", "packed", "lossy"]
    second = (*turn, 5, 6, 7, 8)
    assert complete(world, second, (9,), mode="compressed") == 9
    assert complete(world, (*second, 9, 1, 2), mode="compressed") == 12
    # Without the answer it was given, up to where they agree.
    assert complete(world, (*turn, 5, 1, 1), mode="compressed") == 8


def test_replicas_outlive_pictures_that_nobody_else_read() -> None:
    world = World()
    for first in (DOG, CAT):
        complete(world, (*HEAD, *first, 3, 4), (5, 6), mode="compressed")
    # The last question reads the cat's exact KV, which is then as good as a replica.
    complete(world, (*HEAD, *CAT, 6, 6), mode="compressed")
    order = []
    for _ in range(3):
        left = {node for node, _ in world.tree.nodes()}
        world.tree.evict(EvictParams(num_tokens=1))
        gone = left - {node for node, _ in world.tree.nodes()}
        order += [(node.label, node.key.token_ids[0] if node.key else 0) for node in gone]
    assert order == [("visual", DOG[0]), ("lossy", 5), ("packed", DOG[0])]


def test_a_picture_is_as_good_as_any_once_its_replica_is_gone() -> None:
    world = World()
    complete(world, (*HEAD, *CAT, 3, 4), mode="compressed")
    (replica,) = (node for node, _ in world.tree.nodes() if node.kind is Kind.PACKED)
    cat = next(node for node, _ in world.tree.nodes() if node.kind is Kind.VISUAL)
    assert cat.is_spare
    world.tree._evict_node(replica)
    assert not cat.is_spare
    complete(world, (9, *DOG, 3, 4))
    cat.last_access_time = float("inf")
    assert evicted(world, 3) == [(3, 4), DOG, CAT]


def test_the_replica_that_reaches_furthest_is_extended() -> None:
    """Not the one with the longest prompt of its own."""
    world = World()
    turn, second = (*HEAD, *CAT, 3, 4), (*HEAD, *CAT, 3, 4, 5, 6)
    # Both are packed, since neither is there when the other is matched.
    both = [make_request(ids, (5, 6, 7, 8), "compressed") for ids in (turn, second)]
    for req in both:
        world.match(req)
        assert run_prefill(world, req)
    for req in both:
        world.tree.checkpoint(req, up_to=len(req.fill))
    first, _ = both
    for position in range(4):
        first.n_out = position + 1
        assert world.extend(first, len(first.fill))
    for req in both:
        world.release(req, checkpoint=True)
    world.check()
    assert sum(kind == "packed" for kind, *_ in kinds(world)) == 2
    nodes = len(kinds(world))
    assert complete(world, (*second, 7, 8, 9), mode="compressed") == len(second) + 2
    assert len(kinds(world)) == nodes + 1, "the other replica is left as it was"
    # Where both reach as far, the one with more of its text from beside the picture.
    assert complete(world, (*second, 1, 1), mode="compressed") == len(second)
    packed = [node for node, _ in world.tree.nodes() if node.kind is Kind.PACKED]
    assert len(max(packed, key=lambda node: len(node.key)).children) == 1


def test_a_replica_without_a_selection_gets_one_with_it_beside() -> None:
    world = World()
    turn = (*HEAD, *CAT, 3, 4)
    complete(world, turn, mode="compressed")
    for hit in (len(HEAD) + len(CAT), len(turn)):
        again = (*turn, 5) if hit == len(turn) else turn
        assert complete(world, again, mode="compressed", return_selection=True) == hit
    assert sum(kind == "packed" for kind, *_ in kinds(world)) == 2
    # One that does not ask for a selection packs no third.
    assert complete(world, (*turn, 6), mode="compressed") == len(turn)
    assert sum(kind == "packed" for kind, *_ in kinds(world)) == 2


@pytest.mark.parametrize("mode", ["plain", "exact"])
def test_nothing_lossy_is_a_hit_in_exact_kv(mode: str) -> None:
    world = World()
    turn = (*HEAD, *CAT, 3, 4)
    complete(world, turn, (5, 6), mode="compressed")
    # Nothing behind the picture: neither the replica's instruction nor the answer.
    assert complete(world, (*turn, 5, 6, 7, 8), mode=mode) == 5


def test_variants_live_side_by_side_and_do_not_mix() -> None:
    world = World()
    turn, second = (*HEAD, *CAT, *DOG, 3, 4), (*HEAD, *CAT, *DOG, 3, 4, 5, 6)
    complete(world, turn, (5,), mode="compressed", retention=0.2)
    assert complete(world, second, mode="compressed", retention=0.5) == 8
    complete(world, turn, (5,), mode="compressed", retention=0.5)
    assert complete(world, second, mode="compressed", retention=0.5) == 11
    assert complete(world, second, mode="compressed", retention=0.2) == 11
    names = [node.name for node, _ in world.tree.nodes() if node.kind is Kind.PACKED]
    assert len(names) == 3 and len(set(names)) == 2


def test_a_new_picture_does_not_extend_a_replica() -> None:
    world = World()
    turn = (*HEAD, *CAT, 3, 4)
    complete(world, turn, (5,), mode="compressed")
    # The first picture is a hit in exact KV.
    assert complete(world, (*turn, 5, *DOG, 6), mode="compressed") == 5


def test_equal_prompts_at_once_leave_one_replica() -> None:
    world = World()
    turn = (*HEAD, *CAT, 3, *DOG, 4)
    first = serve(world, turn, (5,), mode="compressed")
    second = serve(world, turn, (5,), mode="compressed")
    for req in (second, first):
        world.release(req, checkpoint=True)
        world.check()
    assert sum(kind == "packed" for kind, *_ in kinds(world)) == 1


def test_pictures_without_placeholders_are_told_apart() -> None:
    """SGLang's Transformers fallback leaves one image token for every picture in the prompt."""
    world = World()
    hits = []
    for pads in (CAT, DOG, CAT):
        req = make_request((1, 2, 9, 9, 9, 3, 4), (), "plain")
        req.aircache.bare_spans = [(2, list(pads))]
        world.match(req)
        hits.append(req.prefix_len)
        assert world.extend(req, 7)
        world.release(req, checkpoint=True)
    assert hits == [0, 2, 6]
    assert sum(kind == "visual" for kind, *_ in kinds(world)) == 2


def test_bare_spans_are_padded_by_the_pictures_hash() -> None:
    items = [
        MultimodalDataItem(modality=Modality.IMAGE, offsets=[(2, 4)]),
        MultimodalDataItem(modality=Modality.IMAGE, offsets=[(6, 7)]),
    ]
    for number, item in enumerate(items):
        item.set_identity(bytes([number]) * 32)
    bare = [1, 2, 9, 9, 9, 3, 9, 9, 4]
    found = spans.bare_spans(bare, items, MM_PAD_SHIFT_VALUE)
    assert found == [(2, items[0].padding_sequence(3)), (6, items[1].padding_sequence(2))]
    assert all(is_visual(token) for _, pads in found for token in pads)
    padded = [1, 2, *found[0][1], 3, *found[1][1], 4]
    assert spans.bare_spans(padded, items, MM_PAD_SHIFT_VALUE) == []


@pytest.mark.parametrize("evicted", [False, True])
def test_what_a_retracted_request_had_said(evicted: bool) -> None:
    """It is extended on the replica; beside the full picture it is no part of the next replica."""
    world = World()
    turn = (*HEAD, *CAT, 3, 4)
    req = serve(world, turn, (5, 6), mode="compressed")
    world.release(req, checkpoint=False)
    if evicted:
        world.tree.evict(EvictParams(num_tokens=POOL))
    world.match(req)
    assert req.prefix_len == (0 if evicted else len(turn))
    assert run_prefill(world, req)
    world.tree.checkpoint(req, up_to=len(req.fill))
    world.check()
    world.release(req, checkpoint=True)
    assert complete(world, (*turn, 5, 6, 7), mode="compressed") == (7 if evicted else 9)


CLOCKS = {"fine": time.monotonic, "of whole seconds": lambda: float(int(time.monotonic()))}


@pytest.mark.parametrize("policy", ["lru", "lfu", "slru", "fifo", "mru", "filo", "priority"])
def test_ranks_evict_the_same_nodes(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor-parallel rank has its own clock; hits and free slots must be the same on all."""
    histories = []
    for clock in CLOCKS.values():
        namespace = SimpleNamespace(monotonic=clock, perf_counter=time.perf_counter)
        monkeypatch.setattr(tree, "time", namespace)
        world, rng, history = World(policy=policy), random.Random(3), []
        for _ in range(120):
            name, tail = rng.randrange(6), rng.randrange(4)
            ids = (*HEAD, *picture(name), tail, tail + 1)
            mode = rng.choice(["plain", "exact", "compressed"])
            hit = complete(world, ids, (7, 8), mode=mode)
            history.append((hit, world.allocator.free_pages.tolist(), dict(world.counts)))
        histories.append(history)
    assert world.counts["visual"] and world.counts["packed"] and world.counts["generated"]
    assert histories[0] == histories[1]


def test_without_a_tree() -> None:
    world = World(disable=True)
    for mode in ("exact", "compressed"):
        req = serve(world, (*HEAD, *CAT, 3, *DOG, 4), (5, 6), mode=mode)
        held = 2 + 1 + 1 + 2 + req.intent.columns  # type: ignore[union-attr]
        assert POOL - world.allocator.available_size() == held
        world.release(req, checkpoint=True)
        assert world.allocator.available_size() == POOL


class Namespace:
    """A slot for each token's prefix behind the first `start`, None where it was evicted."""

    def __init__(self, start: int = 0) -> None:
        self.start = start
        self.slots: dict[Ids, int | None] = {}

    def match(self, ids: Ids) -> int:
        length = self.start
        while length < len(ids) and self.slots.get(ids[: length + 1]) is not None:
            length += 1
        return length

    def insert(self, ids: Ids, slots: list[int]) -> None:
        """slots: of the tokens behind `start`."""
        for length, slot in enumerate(slots, self.start + 1):
            if self.slots.get(ids[:length]) is None:
                self.slots[ids[:length]] = slot

    def evict(self, slots: set[int]) -> None:
        gone = {key for key, slot in self.slots.items() if slot in slots}
        for key in gone:
            self.slots[key] = None
        # What has no slot stays for as long as something follows it; text never does.
        for key in sorted(self.slots, key=len, reverse=True):
            if self.slots[key] is None and not self.followed(key):
                del self.slots[key]
        assert all(is_visual(key[-1]) for key in gone if key in self.slots), "text left a hole"

    def followed(self, key: Ids) -> bool:
        return any(len(k) == len(key) + 1 and k[:-1] == key for k in self.slots)

    def held(self) -> set[int]:
        return {slot for slot in self.slots.values() if slot is not None}


@dataclasses.dataclass(eq=False)
class PackedPrompt:
    """A replica: the prompt that it stands for, its slots, and the text that follows it."""

    variant: Any
    prompt: Ids
    knows_selection: bool
    slots: set[int]
    below: Namespace

    def held(self) -> set[int]:
        return self.slots | self.below.held()


class Model:
    """The tree of one `extra_key`: exact KV by tokens, and the replicas by variant and prompt."""

    def __init__(self) -> None:
        self.exact = Namespace()
        self.replicas: list[PackedPrompt] = []  # oldest first

    def match(self, ids: Ids, intent: Intent | None) -> tuple[int, PackedPrompt | None]:
        """How many tokens are a hit, and through which replica."""
        if intent is None:
            return self.exact.match(ids), None
        found = [
            replica
            for replica in self.replicas
            if intent.reuses
            and replica.variant == intent.config.variant()
            and replica.prompt == ids[: len(replica.prompt)]
            and len(replica.prompt) >= intent.prompt.end
            and (replica.knows_selection or not intent.config.return_selection)
        ]
        if not found:
            return self.exact.match(ids[: intent.match_limit]), None
        best = max(found, key=lambda r: (r.below.match(ids), len(r.prompt)))
        return best.below.match(ids), best

    def add(self, new: PackedPrompt) -> bool:
        """False if there is such a replica already, which knows as much."""
        for old in self.replicas:
            same = (old.variant, old.prompt) == (new.variant, new.prompt)
            if same and old.knows_selection >= new.knows_selection:
                return False
        self.replicas.append(new)
        return True

    def evict(self, slots: set[int]) -> None:
        self.exact.evict(slots)
        for replica in list(self.replicas):
            replica.below.evict(slots)
            if replica.slots & slots:
                assert replica.slots <= slots and not replica.below.slots, "a replica is whole"
                self.replicas.remove(replica)


TEXT = st.integers(1, 2)
PICTURES = st.integers(1, 2).map(lambda name: tuple(picture(name)))


@st.composite
def prompts(draw: st.DrawFn) -> Ids:
    ids = tuple(draw(st.lists(TEXT, max_size=2)))
    for _ in range(draw(st.integers(0, 2))):
        ids += draw(PICTURES) + tuple(draw(st.lists(TEXT, max_size=2)))
    return ids + tuple(draw(st.lists(TEXT, min_size=1, max_size=5)))


SETTINGS = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["plain", "exact", "compressed", "compressed"]),
        "retention": st.sampled_from([0.34, 0.67]),
        "extra_key": st.sampled_from([None, None, "adapter"]),
        "return_selection": st.booleans(),
    }
)


class RadixMachine(RuleBasedStateMachine):
    """Requests in any order of their steps."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.forget()
        self.past: list[tuple[Ids, dict[str, Any]]] = []
        # Between the launch of a prefill and its result.
        self.launched: list[Request] = []

    def forget(self) -> None:
        self.models = {None: Model(), "adapter": Model()}
        # The replica that a running request holds.
        self.held: dict[Request, PackedPrompt | None] = {}

    def pick(self, data: st.DataObject, requests: list[Request]) -> Request:
        return requests[data.draw(st.integers(0, len(requests) - 1))]

    def settled(self) -> list[Request]:
        return [req for req in self.world.running if req not in self.launched]

    def begin(self, req: Request) -> None:
        self.match(req)
        self.launch(req)

    def match(self, req: Request) -> None:
        """Match, then check the hit against the model."""
        self.world.match(req)
        self.reconcile()
        model = self.models[req.extra_key]
        length, self.held[req] = model.match(req.fill[:-1], req.intent)
        assert req.prefix_len == length
        assert (self.world.record(req) is None) == (self.held[req] is None)

    def launch(self, req: Request) -> None:
        """The rest of the prefill, or an abort for lack of memory."""
        if run_prefill(self.world, req):
            self.launched.append(req)
        else:
            self.world.release(req, checkpoint=False)
        self.reconcile()

    def reconcile(self) -> None:
        """Carry what was evicted into the model."""
        gone, self.world.freed = set(self.world.freed), []
        held = set(self.world.tree.all_values_flatten().tolist())
        for model in self.models.values():
            model.evict(gone - held)

    def publish(self, req: Request, up_to: int) -> None:
        """Carry into the model what a checkpoint inserts."""
        record, model = self.world.record(req), self.models[req.extra_key]
        row = self.world.rows.req_to_token[req.kv.req_pool_idx].tolist()
        if record is None:
            if req.intent is not None:
                intent = req.intent
                up_to = min(up_to, intent.prompt.end if intent.reuses else intent.prompt.length)
            model.exact.insert(req.fill[:up_to], row[:up_to])
            return
        prompt, config = record.intent.prompt, record.intent.config
        if record.stage is Stage.PREFILLED:
            end = prompt.end if record.intent.reuses else prompt.length
            model.exact.insert(req.prompt[:end], record.originals.tolist() + row[prompt.end : end])
            if record.intent.reuses:
                slots = {*record.extra.tolist(), *row[prompt.end : prompt.length]}
                packed = PackedPrompt(
                    config.variant(),
                    req.prompt,
                    config.return_selection,
                    slots,
                    Namespace(prompt.length),
                )
                self.held[req] = packed if model.add(packed) else None
        replica = self.held[req]
        if replica is not None and not record.exact_tail:
            replica.below.insert(req.fill[:up_to], row[len(replica.prompt) : up_to])

    def request(self, ids: Ids, answer: Ids, settings: dict[str, Any]) -> Request:
        req = make_request(ids, answer, **settings)
        req.settings = settings  # type: ignore[attr-defined]
        return req

    @rule(ids=prompts(), answer=st.lists(TEXT, min_size=1, max_size=4), settings=SETTINGS)
    @precondition(lambda self: len(self.world.running) < ROWS)
    def arrive(self, ids: Ids, answer: list[int], settings: dict[str, Any]) -> None:
        self.begin(self.request(ids, tuple(answer), settings))

    @rule(
        ids=prompts(),
        more=st.lists(TEXT, max_size=2),
        settings=SETTINGS,
        selections=st.tuples(st.booleans(), st.booleans()),
    )
    @precondition(lambda self: len(self.world.running) < ROWS - 2)
    def two_turns_at_once(
        self, ids: Ids, more: list[int], settings: dict[str, Any], selections: tuple[bool, bool]
    ) -> None:
        """Both may be packed; the first one's answer then reaches further than the second."""
        first, second = ({**settings, "return_selection": wanted} for wanted in selections)
        twins = [
            self.request(ids, (*more, 1, 2), first),
            self.request((*ids, *more), (1,), second),
        ]
        for req in twins:
            self.begin(req)
        for req in twins:
            if req in self.launched:
                self.settle(req)
        if twins[0] in self.world.running:
            for _ in twins[0].answer:
                self.step(twins[0])
            self.end(twins[0])
        self.begin(self.request((*ids, *more, 1, 1), (1,), second))

    @rule(
        more=st.lists(TEXT, min_size=1, max_size=3),
        data=st.data(),
        other=st.none() | SETTINGS,
    )
    @precondition(lambda self: self.past and len(self.world.running) < ROWS)
    def follow_up(self, more: list[int], data: st.DataObject, other: Any) -> None:
        ids, settings = self.past[data.draw(st.integers(0, len(self.past) - 1))]
        if len(ids) < 30:
            self.begin(self.request(ids + tuple(more), (1, 2), other or settings))

    @rule(ids=prompts(), settings=SETTINGS, share=st.floats(0.1, 0.9))
    @precondition(lambda self: len(self.world.running) < ROWS)
    def arrive_in_chunks(self, ids: Ids, settings: dict[str, Any], share: float) -> None:
        req = self.request(ids, (1, 2), settings)
        self.match(req)
        middle = req.prefix_len + int(share * (len(ids) - req.prefix_len))
        if req.prefix_len < middle < len(ids):
            if not self.world.extend(req, middle):
                self.world.release(req, checkpoint=False)
                self.reconcile()
                return
            self.reconcile()
            self.publish(req, middle)
            self.world.tree.checkpoint(req, up_to=middle)
        self.launch(req)

    @rule(data=st.data())
    @precondition(lambda self: self.launched)
    def result(self, data: st.DataObject) -> None:
        self.settle(self.pick(data, self.launched))

    def settle(self, req: Request) -> None:
        self.launched.remove(req)
        self.publish(req, self.world.prefill_end(req))
        self.world.tree.checkpoint(req, up_to=self.world.prefill_end(req))

    @rule(data=st.data())
    @precondition(lambda self: self.world.running)
    def decode(self, data: st.DataObject) -> None:
        # With overlap scheduling the first step runs before the prefill's result is known.
        self.step(self.pick(data, self.world.running))

    def step(self, req: Request) -> None:
        length = req.kv.kv_committed_len
        if length >= len(req.everything):
            return
        if self.world.extend(req, length + 1):
            req.n_out = max(req.n_out, length + 1 - len(req.prompt))
        self.reconcile()

    @rule(data=st.data())
    @precondition(lambda self: self.world.running)
    def finish(self, data: st.DataObject) -> None:
        self.end(self.pick(data, self.world.running))

    def end(self, req: Request) -> None:
        if req in self.launched:
            self.launched.remove(req)
        self.publish(req, req.kv.kv_committed_len)
        self.past.append((req.fill, req.settings))  # type: ignore[attr-defined]
        self.world.release(req, checkpoint=True)
        self.reconcile()

    @rule(data=st.data(), again=st.booleans())
    @precondition(lambda self: self.world.running)
    def abort(self, data: st.DataObject, again: bool) -> None:
        req = self.pick(data, self.world.running)
        if req in self.launched:
            self.launched.remove(req)
        self.world.release(req, checkpoint=False)
        self.reconcile()
        if again:  # retracted: the answer so far is prefilled with the prompt
            self.begin(req)

    @rule(n=st.integers(1, 12))
    def evict(self, n: int) -> None:
        tree = self.world.tree
        before = Counter(self.world.counts)
        evictable, text = tree.evictable_size(), tree.unlocked_text
        done = tree.evict(EvictParams(num_tokens=n)).num_tokens_evicted
        assert done >= min(n, evictable)
        assert evictable - tree.evictable_size() == done
        counts = self.world.counts - before
        assert sum(counts.values()) == done
        if tree.unlocked_text < text <= tree.text_bound:
            yielding = [node for node, _ in tree.nodes() if node.yields]
            assert all(node.lock_ref for node in yielding if node.size), "text went first"
        self.reconcile()

    @rule()
    @precondition(lambda self: not self.world.running)
    def flush(self) -> None:
        self.world.tree.reset()
        self.world.allocator.clear()
        self.forget()

    @invariant()
    def all_is_accounted_for(self) -> None:
        self.world.check()
        exact: set[int] = set()
        lossy: set[int] = set()
        for node, _ in self.world.tree.nodes():
            if node.value is not None:
                (lossy if node.is_lossy else exact).update(node.value.tolist())
        models = self.models.values()
        assert exact == set().union(*(model.exact.held() for model in models))
        assert lossy == set().union(*(r.held() for model in models for r in model.replicas))

    @invariant()
    def nodes_are_pure(self) -> None:
        for node, _ in self.world.tree.nodes():
            if node.kind is not Kind.PACKED:
                ids = node.key.raw_token_ids()
                assert {is_visual(token) for token in ids} == {node.kind is Kind.VISUAL}
            if node.is_tombstone:
                assert node.kind is Kind.VISUAL and node.children and not node.lock_ref


TestRadixMachine = RadixMachine.TestCase
TestRadixMachine.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
