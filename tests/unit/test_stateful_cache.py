# SPDX-License-Identifier: Apache-2.0
"""Recurrent states in the radix cache, on SGLang's own pools: who owns each, and what it has read.

The state of a request is a number that all it has read determines, as its KV is in
test_radix_cache.py, whose model of the scheduler goes on here without overlap.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateDType, Mamba2StateShape
from sglang.srt.mem_cache.allocation import ensure_mamba_capacity
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.memory_pool import HybridReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey

from aircache_patches import prefill
from aircache_sglang.engine import stateful_cache
from aircache_sglang.engine.request import state_of
from aircache_sglang.engine.stateful_cache import StatefulCache
from aircache_sglang.engine.tree import Node
from tests.unit import test_radix_cache
from tests.unit.test_radix_cache import (
    HEAD,
    REUSE,
    FakeReq,
    Phase,
    Scheduler,
    World,
    has,
    lossy,
    pictures,
    run_machine,
    truth,
)

published_settings = test_radix_cache.published_settings
short_instructions = test_radix_cache.short_instructions
BRANCH = 3


@pytest.fixture(autouse=True)
def short_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stateful_cache, "BRANCH", BRANCH)


class StatefulWorld(World):
    """A scheduler with recurrent states, one number each."""

    def __init__(self, size: int, *, rows: int = 4, n_states: int = 0, **options: Any) -> None:
        super().__init__(size, rows=rows, **options)
        # By request, the prefix with which each of its lives began.
        self.began: dict[int, list[int]] = {}
        shape = Mamba2StateShape(
            conv=[(1, 1)],
            temporal=(1, 1, 1),
            intermediate_size=1,
            conv_dim=1,
            ssm_state_size=1,
            num_heads=1,
            head_dim=1,
            state_size=1,
            conv_kernel=2,
        )
        # As SGLang sizes it: of three states one is a request's (kv_cache_configurator.py).
        self.rows = self.tree.req_to_token_pool = HybridReqToTokenPool(
            size=rows,
            mamba_size=n_states or 3 * rows,
            mamba_spec_state_size=rows,
            max_context_len=256,
            device="cpu",
            enable_memory_saver=False,
            cache_params=Mamba2CacheParams(
                shape=shape,
                layers=[0],
                dtype=Mamba2StateDType(conv=torch.float32, temporal=torch.float32),
            ),
            mamba_layer_ids=[0],
            enable_mamba_extra_buffer=False,
            enable_overlap_schedule=False,
        )
        self.states = self.rows.mamba_pool.mamba_cache.temporal[0].view(-1)
        self.compressor.table.req_to_token = self.rows.req_to_token
        self.compressor._keeps_replicas = False
        ensured = self.rows.alloc

        def alloc(reqs: Any) -> Any:
            assert ensure_mamba_capacity(self.rows, reqs, self.tree), "states were over-admitted"
            return ensured(reqs)

        self.rows.alloc = alloc  # type: ignore[method-assign]

    def make_tree(self, *parts: Any) -> StatefulCache:
        return StatefulCache(*parts)

    def prefill(self, req: FakeReq, chunk: int = 1 << 30, *, reserve: bool = True) -> bool:
        first = req.phase is Phase.WAITING
        admitted = super().prefill(req, chunk, reserve=reserve)
        if first and admitted:
            self.began.setdefault(req.rid, []).append(self.prefix)
        if first and not admitted:
            # Scheduler.get_new_batch_prefill.
            req.kv.mamba_cow_src_index, req.kv.mamba_needs_clear = None, False
            if req.kv.holds_mamba:
                self.rows.mamba_allocator.free(req.kv.mamba_pool_idx.unsqueeze(-1))
                req.kv.mamba_pool_idx = None
        return admitted

    def _forward(self, req: FakeReq, extend: int) -> None:
        self.prefix = req.prefix_len
        kv, pool = req.kv, self.rows
        own = kv.mamba_pool_idx.unsqueeze(0)
        if kv.mamba_cow_src_index is not None:
            pool.copy_mamba_state(kv.mamba_cow_src_index, own)
        elif kv.mamba_needs_clear:
            pool.mamba_pool.clear_slots(own)
        kv.mamba_cow_src_index, kv.mamba_needs_clear = None, False
        read = tuple(req.ids[: req.prefix_len])
        assert self.states[own] == self.state(truth(read) if read else 0.0), "not its prefix's"
        super()._forward(req, extend)
        self.states[own] = truth(tuple(req.ids[: req.extend_end]))

    @staticmethod
    def state(value: float) -> torch.Tensor:
        return torch.tensor(value, dtype=torch.float32)

    def decode(self, req: FakeReq, *, mixed: bool = False) -> bool:
        done = super().decode(req, mixed=mixed)
        if done:
            record = self.compressor.records.get(req.kv.req_pool_idx)
            ids = tuple(req.ids[: req.kv.kv_committed_len])
            self.states[req.kv.mamba_pool_idx] = lossy(record.intent, ids) if record else truth(ids)
        return done

    def retract(self, req: FakeReq) -> None:
        super().retract(req)
        assert req.kv.mamba_pool_idx is None

    def stated(self) -> Iterator[tuple[Node, tuple[int, ...]]]:
        return ((node, tokens) for node, tokens in self.nodes() if node.state is not None)

    def check(self) -> None:
        super().check()
        self.tree.sanity_check()
        cached = [int(node.state) for node, _ in self.stated()]
        owned = [int(req.kv.mamba_pool_idx) for req in self.live if req.kv.holds_mamba]
        free = self.rows.mamba_allocator.free_slots.tolist()
        assert sorted(free + cached + owned) == list(range(1, self.rows.mamba_pool.size + 1))
        assert sorted(self.tree.all_mamba_values_flatten().tolist()) == sorted(cached)
        # Between two calls nothing is being copied: each first chunk has ended, or was not begun.
        assert self.tree.mamba_evictable_size() + self.tree.mamba_protected_size() == len(cached)
        locked = {id(r.last_node) for r in self.live if r.phase is Phase.IN_FLIGHT}
        assert self.tree.mamba_protected_size() == sum(
            id(node) in locked and bool(node.state_locks) for node, _ in self.stated()
        )
        for node, tokens in self.stated():
            assert self.states[node.state] == self.state(truth(tokens)), "a stale or lossy state"
            above = node
            while above is not self.tree.root_node:
                assert not above.is_tombstone, "no match reaches it"
                above = above.parent

    def hit(self, ids: list[int]) -> int:
        """What a plain request of this prompt goes on from; a state of which it has none."""
        found = self.tree.match_prefix(MatchPrefixParams(key=RadixKey(array("q", ids))))
        node = found.last_device_node
        assert found.device_prefix_len == node.end
        assert node is self.tree.root_node or node.state is not None
        return int(node.end)

    def run(self, req: FakeReq, steps: int = 0) -> FakeReq:
        while not self.prefill(req) or req.phase is Phase.CHUNKED:
            self.check()
        self.result(req)
        for _ in range(steps):
            assert self.decode(req)
        self.check()
        return req


def test_a_match_ends_at_a_state() -> None:
    world = StatefulWorld(60)
    first = world.run(world.submit(list(range(1, 11)), []), steps=3)
    assert world.hit([*range(1, 11), 50]) == 10, "where its prefill ended"
    assert world.hit([*range(1, 9), 50]) == 0, "full KV alone is no prefix"
    said = first.ids
    world.finish(first)
    world.check()
    assert world.hit([*said, 50, 51]) == len(said), "the finished request has left its own"


def test_the_next_question_begins_at_the_picture() -> None:
    world = StatefulWorld(80)
    ids, spans = pictures((12, 1), (6, 2), between=2)
    req = world.submit([*ids, 7, 8, 9], spans)
    assert world.prefill(req)
    assert req.extend_end == len(ids), "a chunk ends with the last picture"
    world.check()
    world.run(req, steps=2)
    again = world.submit([*ids, 5, 6], spans)
    assert world.prefill(again)
    assert again.prefix_len == len(ids) and again.phase is Phase.IN_FLIGHT, "in one chunk"
    world.result(again)
    world.check()
    said = req.ids
    for each in (req, again):
        world.finish(each)
        world.check()
    # What was said was computed beside columns; the prompt was not.
    assert world.hit([*said, 3]) == len(ids) + 3


def test_text_in_front_of_a_picture_is_shared_the_third_time() -> None:
    world = StatefulWorld(120)
    hits = []
    for picture in (1, 2, 3):
        ids, spans = pictures((12, picture))
        req = world.submit([*ids, 7, 8, 9], spans)
        world.finish(world.run(req))
        world.check()
        hits += world.began[req.rid]
    assert hits == [0, 0, len(HEAD)]


@pytest.mark.parametrize("decoded", [0, 2])
def test_what_is_beside_columns_leaves_no_state(decoded: int) -> None:
    world = StatefulWorld(80)
    ids, spans = pictures((12, 1))
    req = world.run(world.submit([*ids, 7, 8, 9], spans), steps=decoded)
    assert world.compressor.records
    n_states = len(list(world.stated()))
    world.finish(req)
    world.check()
    assert len(list(world.stated())) == n_states == 2


def test_a_step_beside_a_prefill_leaves_no_state() -> None:
    """With --enable-mixed-chunk each would (test_radix_cache.py, FakeReq)."""
    world = StatefulWorld(60)
    req = world.run(world.submit([1, 2, 3, 4], []))
    for _ in range(3):
        assert world.decode(req, mixed=True)
        world.result(req)
        world.check()
    assert len(list(world.stated())) == 1
    said = req.ids
    world.finish(req)
    assert world.hit([*said, 5]) == len(said)


def test_states_at_and_below_a_tombstone_are_free() -> None:
    world = StatefulWorld(80)
    ids, spans = pictures((12, 1))
    world.finish(world.run(world.submit([*HEAD, 50], [])))
    world.finish(world.run(world.submit([*ids, 7, 8, 9], spans)))
    assert world.hit([*ids, 7, 8, 9, 1]) == len(ids) + 3
    world.tree.evict(EvictParams(num_tokens=4))
    world.check()
    assert {tokens for _, tokens in world.stated()} == {tuple(HEAD), (*HEAD, 50)}
    world.finish(world.run(world.submit([*ids, 7, 8], spans)))
    assert world.hit([*ids, 1]) == len(ids), "refilled, with a state"


def test_the_least_recently_used_state_goes_first() -> None:
    world = StatefulWorld(120)
    prompts = [[n, n + 1, n + 2] for n in (10, 20, 30)]
    for prompt in prompts:
        world.finish(world.run(world.submit(prompt, [])))
    assert world.hit([*prompts[0], 5]) == 3
    assert world.tree.evict(EvictParams(num_tokens=0, mamba_num=1)).mamba_num_evicted == 1
    world.check()
    assert [world.hit([*prompt, 5]) for prompt in prompts] == [3, 0, 3]
    assert world.tree.evict(EvictParams(num_tokens=0, mamba_num=9)).mamba_num_evicted == 2
    assert world.tree.mamba_evictable_size() == 0 and world.tree.evictable_size() == 9


def test_a_state_that_is_being_copied_stays() -> None:
    world = StatefulWorld(120)
    prompt = [1, 2, 3, 4, 5]
    world.finish(world.run(world.submit(prompt, [])))
    req = world.submit([*prompt, 6, 7], [])
    assert world.prefill(req)
    assert world.tree.mamba_protected_size() == 1
    assert world.tree.evict(EvictParams(num_tokens=0, mamba_num=9)).mamba_num_evicted == 0
    world.result(req)
    assert world.tree.mamba_protected_size() == 0, "a request that runs holds none"
    world.check()


def test_a_split_leaves_the_state_below() -> None:
    world = StatefulWorld(60)
    world.finish(world.run(world.submit([1, 2, 3, 4, 5, 6], [])))
    world.finish(world.run(world.submit([1, 2, 3, 9, 9, 9], [])))
    world.check()
    assert {tokens for _, tokens in world.stated()} == {
        (1, 2, 3),
        (1, 2, 3, 4, 5, 6),
        (1, 2, 3, 9, 9, 9),
    }, "the second prefill ended a chunk where the first went on"


def test_a_request_that_was_matched_and_not_admitted_begins_anew() -> None:
    """SGLang leaves a session's request its slot (Scheduler.get_new_batch_prefill)."""
    world = StatefulWorld(60)
    prompt = [1, 2, 3, 4, 5]
    world.finish(world.run(world.submit(prompt, [])))
    req = world.submit([*prompt, 6, 7], [])
    req.refresh_fill_ids()
    key = RadixKey(req.full_untruncated_fill_ids)
    world.tree.match_prefix(MatchPrefixParams(key=key, req=req, cow_mamba=True))
    assert req.kv.holds_mamba and req.kv.mamba_cow_src_index is not None
    world.states[req.kv.mamba_pool_idx] = 5.0
    world.tree.evict(EvictParams(num_tokens=60))
    world.run(req)
    assert world.began[req.rid] == [0]


def test_without_a_free_state_a_request_begins_at_the_front() -> None:
    world = StatefulWorld(60, rows=2, n_states=2)
    prompt = [1, 2, 3, 4, 5]
    world.finish(world.run(world.submit(prompt, [])))
    other = world.submit([9, 8, 7], [])
    assert world.prefill(other)
    assert world.hit([*prompt, 6]) == len(prompt)
    req = world.submit([*prompt, 6], [])
    assert world.prefill(req)
    assert world.began[req.rid] == [0], "the only other state is the one that it would copy"
    world.check()
    for each in (req, other):
        world.finish(each)
        world.check()


def test_a_replica_is_declined() -> None:
    world = StatefulWorld(80)
    ids, spans = pictures((12, 1))
    req = world.run(world.submit([*ids, 7, 8], spans, REUSE))
    assert state_of(req).reason == "unsupported_request" and not world.compressor.records
    world.finish(req)
    world.check()


def test_without_a_tree_there_is_no_state_but_the_requests() -> None:
    world = StatefulWorld(80, disable=True)
    ids, spans = pictures((12, 1))
    req = world.run(world.submit([*ids, 7, 8], spans), steps=2)
    assert not list(world.stated())
    world.finish(req)
    world.check()


def test_the_dump_counts_states() -> None:
    world = StatefulWorld(60)
    world.finish(world.run(world.submit([1, 2, 3], [])))
    dump = world.tree.describe()
    assert [node["state"] for node in dump["nodes"]] == [True]
    pool = dump["pool"]
    assert (pool["states_size"], pool["states_free"], pool["states"]) == (12, 11, 1)


class Adder:
    """The budget of SGLang's PrefillAdder, one request at a time."""

    def __init__(self, room: int | None, end: int | None) -> None:
        self.rem_chunk_tokens, self.can_run_list = room, []
        self.tree_cache = SimpleNamespace(chunk_end=lambda req: end)

    def add(self, _: Any, req: Any, *, fits: bool = True, **__: Any) -> int:
        size = req.total - req.prefix_len
        if fits:
            if self.rem_chunk_tokens is not None:
                size = min(size, self.rem_chunk_tokens)
                self.rem_chunk_tokens -= size
            self.can_run_list.append(req)
        return size if fits else 0


@pytest.mark.parametrize(
    ("room", "end", "computed", "left"),
    [(50, 20, 10, 0), (50, None, 30, 20), (5, 20, 5, 0), (10, 20, 10, 0), (None, 20, 30, None)],
    ids=["ends", "nothing is wanted", "ends before", "ends there anyway", "no chunks"],
)
def test_a_chunk_ends_where_a_state_is_wanted(
    room: Any, end: Any, computed: int, left: Any
) -> None:
    req, adder = SimpleNamespace(total=40, prefix_len=10), Adder(room, end)
    assert prefill.add_chunked_req(adder.add, adder, req) == computed
    assert adder.rem_chunk_tokens == left, "the batch ends with it"


def test_what_does_not_fit_leaves_the_budget() -> None:
    req, adder = SimpleNamespace(total=40, prefix_len=10), Adder(50, 20)
    refused = lambda *parts: adder.add(*parts, fits=False)  # noqa: E731
    assert prefill.add_chunked_req(refused, adder, req) == 0
    assert adder.rem_chunk_tokens == 50


class Hybrids(Scheduler):
    """Requests of a hybrid in any order, on few states, without overlap."""

    n_states = 12

    @initialize(size=st.sampled_from([60, 100]))
    def start(self, size: int) -> None:
        super().start(size)

    def make_world(self, size: int) -> World:
        return StatefulWorld(
            size, disable=self.disable, rows=4, when=self.when, n_states=self.n_states
        )

    @precondition(has(Phase.RUNNING))
    @rule(data=st.data())
    def decode(self, data: st.DataObject) -> None:
        req = self.pick(data, Phase.RUNNING)
        if len(req.output_ids) < 6:
            self.world.decode(req)

    @rule(n=st.integers(1, 4))
    def evict_states(self, n: int) -> None:
        tree = self.world.tree
        evictable = tree.mamba_evictable_size()
        done = tree.evict(EvictParams(num_tokens=0, mamba_num=n))
        assert done.mamba_num_evicted == min(n, evictable)
        assert tree.mamba_evictable_size() == evictable - done.mamba_num_evicted

    def teardown(self) -> None:
        super().teardown()
        world = getattr(self, "world", None)
        if world is not None:
            assert world.rows.mamba_allocator.available_size() == self.n_states


class HybridsOnFewStates(Hybrids):
    n_states = 6


class HybridsUnderPressure(Hybrids):
    when = "pressure"


class HybridsWithoutTree(Hybrids):
    disable = True


@pytest.mark.parametrize(
    "machine", [Hybrids, HybridsOnFewStates, HybridsUnderPressure, HybridsWithoutTree]
)
def test_states_are_conserved_in_any_order(machine: type[Hybrids]) -> None:
    run_machine(machine)
