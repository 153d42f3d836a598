# SPDX-License-Identifier: Apache-2.0
"""The radix cache with a host tier, on SGLang's own HiCacheController and host pool.

The scheduler's model is that of test_radix_cache.py. Copies are late: they are done when somebody
waits for them, so that who does not wait reads, or loses, what has not been copied.
"""

from __future__ import annotations

import threading
from array import array
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from sglang.srt.managers import cache_controller
from sglang.srt.managers.cache_controller import HiCacheController
from sglang.srt.mem_cache import l2_transfer
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.pool_host import mha
from sglang.srt.mem_cache.radix_cache import RadixKey

from aircache_sglang.engine.host_tier import TieredRadixCache
from aircache_sglang.engine.tree import Kind, Node
from aircache_sglang.platform.host_pool import serve_host_pools
from tests.unit.test_radix_cache import (
    PAD,
    REUSE,
    TEXT,
    FakeReq,
    Phase,
    Scheduler,
    World,
    pictures,
    published_settings,
    run_machine,
    short_instructions,
    truth,
)

__all__ = ["published_settings", "short_instructions"]  # fixtures

POLICIES = ("write_through", "write_through_selective", "write_back")
LAYOUTS = ("layer_first", "page_first_direct")


class Copies:
    """Copies that are not done before somebody waits for them, in the order of their calls."""

    def __init__(self) -> None:
        self.pending: list[Callable[[], None]] = []
        self.submitted = 0
        self.log: Counter[str] = Counter()

    def late(self, copy: Callable[..., None]) -> Callable[..., None]:
        def postponed(**arguments: Any) -> None:
            self.log[copy.__name__] += 1
            self.submitted += 1
            self.pending.append(lambda: copy(**arguments))

        return postponed

    @property
    def done(self) -> int:
        return self.submitted - len(self.pending)

    def settle(self, until: int | None = None) -> None:
        while self.pending and (until is None or self.done < until):
            self.pending.pop(0)()


COPIES = Copies()


class LateEvent:
    """In the place of `torch.cpu.Event`, for which everything has happened."""

    recorded = 0

    def record(self, stream: Any = None) -> None:
        self.recorded = COPIES.submitted

    def wait(self, stream: Any = None) -> None:
        """Of another stream, where nothing runs but these copies."""

    def query(self) -> bool:
        return COPIES.done >= self.recorded

    def synchronize(self) -> None:
        COPIES.settle(self.recorded)


@pytest.fixture(autouse=True)
def late_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_host_pools()
    COPIES.__init__()  # type: ignore[misc]
    stream = SimpleNamespace(wait_event=lambda event: event.synchronize())
    device = SimpleNamespace(
        __name__="late",
        Event=LateEvent,
        Stream=torch.cpu.Stream,
        stream=torch.cpu.stream,
        current_stream=lambda: stream,
    )
    monkeypatch.setattr(l2_transfer, "device_module", device)
    monkeypatch.setattr(cache_controller, "device_module", device)
    for name in (
        *("transfer_kv_direct", "transfer_kv_all_layer_direct_lf_pf"),
        "transfer_kv_per_layer_direct_pf_lf",
    ):
        monkeypatch.setattr(mha, name, COPIES.late(getattr(mha, name)))


class TieredWorld(World):
    tree: TieredRadixCache

    def __init__(
        self,
        size: int,
        host: int = 200,
        policy: str = "write_through",
        layout: str = "layer_first",
        **rest: Any,
    ) -> None:
        self.host, self.policy, self.layout = host, policy, layout
        self.load = -1
        super().__init__(size, **rest)

    def make_tree(self, *parts: Any) -> TieredRadixCache:
        host = mha.MHATokenToKVPoolHost(
            *(self.pool.get_device_pool_infos()[0].buffer_info, 1.0, 0, self.page, self.layout),
            pin_memory=False,
            device_capacity_tokens=self.pool.size,
            start_layer=0,
            end_layer=self.pool.layer_num,
            host_token_capacity=self.host // self.page * self.page,
        )
        # Nothing there is right by chance.
        host.kv_buffer.fill_(float("nan"))
        controller = HiCacheController(
            *(self.allocator, host, self.page, None, threading.Event()),
            write_policy=self.policy,
            io_backend="direct",
        )
        return TieredRadixCache(*parts, controller)

    def start_loading(self) -> int:
        self.load = self.tree.ready_to_load_host_cache()
        return self.load

    def settle(self) -> None:
        COPIES.settle()
        self.tree.check_hicache_events()

    def _forward(self, req: FakeReq, extend: int) -> None:
        # As TpModelWorker and stock attention do.
        self.tree.cache_controller.layer_done_counter.set_consumer(self.load)
        if not self.compressor.attention.work.extends_all:
            for layer in range(self.pool.layer_num):
                self.pool.get_kv_buffer(layer)
        super()._forward(req, extend)

    def check(self) -> None:
        super().check()
        pool, held = self.tree.token_to_kv_pool_host, []
        for node, tokens in self.nodes():
            assert node.size or node.host_value is not None or node.children
            assert node.occupied == bool(
                node.size or any(c.occupied for c in node.children.values())
            )
            assert (node in self.tree.backed) == (node.host_value is not None)
            if node.host_value is not None:
                assert not node.is_lossy and node.content is None, "lossy KV in host memory"
                places = node.host_value.tolist()
                assert len(places) == len(node.key)
                held += places
                if node.transfer is None:
                    self._check_copy(tokens, places)
        assert sorted(held) == pool.slot_used.nonzero().flatten().tolist()
        assert pool.available_size() + len(held) == pool.logical_size
        ongoing = self.tree.ongoing_write_through | self.tree.ongoing_load_back
        moving = {(node, number) for number, each in ongoing.items() for node in each.nodes}
        assert moving == {(n, n.transfer) for n, _ in self.nodes() if n.transfer is not None}
        assert all(node.size and node.lock_ref for node, _ in moving)

    def _check_copy(self, tokens: tuple[int, ...], places: list[int]) -> None:
        pool, first = self.tree.token_to_kv_pool_host, len(tokens) - len(places)
        for i, place in enumerate(places):
            value = torch.tensor(truth(tokens[: first + i + 1]), dtype=torch.float32)
            for layer in (*pool.k_data_refs, *pool.v_data_refs):
                row = layer.reshape(-1, *layer.shape[-2:])[place]
                assert bool((row == value).all()), "host memory holds other KV"

    def match(self, ids: list[int]) -> Any:
        key = RadixKey(array("q", ids))
        return self.tree.match_prefix(MatchPrefixParams(key=key))

    def forget_device(self) -> None:
        """Evict all that nobody holds."""
        self.settle()
        self.tree.evict(EvictParams(num_tokens=1 << 20))
        self.check()

    def backed_tokens(self) -> int:
        return sum(len(node.key) for node in self.tree.backed)


def answered(world: TieredWorld, ids: list[int], spans: Any, config: Any = None) -> FakeReq:
    """A request from its beginning to its end."""
    req = world.run(world.submit(ids, spans, config))
    world.check()
    world.finish(req)
    world.check()
    return req


@pytest.mark.parametrize("page", [1, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_picture_that_was_evicted_is_loaded_back_and_compressed(
    policy: str, layout: str, page: int
) -> None:
    world = TieredWorld(80, policy=policy, layout=layout, page=page)
    ids, spans = pictures((12, 1), (8, 2), between=3)
    answered(world, [*ids, 7, 8, 9], spans)
    answered(world, [*ids, 7, 8, 9, 9], spans)
    world.forget_device()
    assert world.allocator.available_size() == world.allocator.size
    req = world.submit([*ids, 5, 6, 7], spans)
    assert world.prefill(req)
    whole = len(ids) // page * page
    assert req.prefix_len == whole
    record = world.compressor.records[req.kv.req_pool_idx]
    # What was packed are cells of the pictures: `check` compares them.
    assert record.budgets is not None and record.intent.columns == 8
    world.check()
    world.result(req)
    world.check()
    world.finish(req)
    world.forget_device()


def test_when_nodes_are_copied() -> None:
    prompt = [1, 2, 3, 4, 5, 6]
    for policy, copied in zip(POLICIES, ([6, 6, 6], [0, 6, 6], [0, 0, 6]), strict=True):
        world = TieredWorld(40, policy=policy)
        seen = []
        for _ in range(2):
            answered(world, prompt, [])
            seen.append(world.backed_tokens())
        world.forget_device()
        seen.append(world.backed_tokens())
        assert seen == copied, policy


def test_slots_are_not_evicted_while_they_are_copied() -> None:
    world = TieredWorld(40)
    answered(world, [1, 2, 3, 4, 5, 6], [])
    world.tree.evict(EvictParams(num_tokens=40))
    assert world.hit([1, 2, 3, 4, 5, 6]) == 6
    assert world.tree.protected_size() == 6
    world.compressor._made_room = False
    world.settle()
    assert world.tree.evictable_size() == 6
    # What was found locked may be had now: waiting requests are to be looked at again.
    assert world.compressor.made_room()


def test_a_match_runs_through_device_and_host_alike() -> None:
    """The picture in the middle alone is lost: it is loaded, and the text behind it is a hit."""
    world = TieredWorld(80)
    ids, spans = pictures((10, 1), (6, 2), between=5)
    answered(world, [*ids, 7, 8, 9], spans)
    world.settle()
    (first,) = (n for n, _ in world.nodes() if n.kind is Kind.VISUAL and len(n.key) == 10)
    world.tree._evict_node(first)
    found = world.match([*ids, 7, 8, 9])
    assert found.device_prefix_len == first.end - 10 and found.host_hit_length == 10
    assert found.best_match_node.end == len(ids) + 3
    req = world.submit([*ids, 5, 6, 7], spans)
    assert world.prefill(req)
    assert req.prefix_len == len(ids) and COPIES.log["transfer_kv_direct"] > 0
    world.check()


def test_a_host_hit_ends_before_the_instruction() -> None:
    world = TieredWorld(80)
    ids, spans = pictures((10, 1))
    prompt = [*ids, 7, 8, 9, 9, 9]
    plain = answered(world, prompt, spans, {"retention": 1.0})
    world.forget_device()
    assert world.match(prompt).host_hit_length == len(prompt)
    req = world.submit(prompt, spans)
    intent = world.compressor.intent(req)
    assert intent is not None and world.compressor.intent(plain) is None
    assert world.prefill(req) and req.prefix_len == intent.match_limit < len(prompt)
    world.check()


@pytest.mark.parametrize("size", [60, 66, 72, 84])
def test_requests_are_packed_before_a_load_takes_the_room_for_their_columns(size: int) -> None:
    """Whole or packed: what admission has promised to others can still be won."""
    ids, spans = pictures((20, 2))
    world = TieredWorld(size, when="pressure")
    answered(world, [*ids, 7, 8, 9], spans)
    world.forget_device()
    other, where = pictures((30, 1))
    whole = world.run(world.submit([*other, 7, 8, 9], where))
    world.settle()
    req = world.submit([*ids, 7, 7, 7], spans)
    assert world.prefill(req) and req.prefix_len >= 20
    world.check()
    world.pressure.recount()
    packed = whole.kv.req_pool_idx in world.compressor.records
    assert packed == (size < 84)
    assert packed or world.pressure.promised(world.tree) > 0


def test_what_is_lossy_stays_off_the_host() -> None:
    for policy in POLICIES:
        world = TieredWorld(120, policy=policy)
        ids, spans = pictures((10, 1), (5, 2), between=3)
        prompt = [*ids, 7, 8, 9]
        first = world.run(world.submit(prompt, spans, REUSE), steps=2)
        said = first.ids
        world.finish(first)
        world.run(world.submit([*said, 7, 7, 7], spans, REUSE), steps=2)
        world.settle()
        world.check()
        lossy = {node.kind for node, _ in world.nodes() if node.is_lossy}
        assert lossy == {Kind.PACKED, Kind.PROMPT}
        for req in list(world.live):
            world.finish(req)
        world.forget_device()
        assert not any(node.is_lossy for node, _ in world.nodes())
        # The exact picture is there, and is what a turn after that finds.
        again = world.submit(prompt, spans, REUSE)
        assert world.prefill(again)
        assert again.prefix_len == (len(ids) if policy != "write_through_selective" else 0)
        world.check()


def test_nothing_is_loaded_where_the_slots_cannot_be_had() -> None:
    world = TieredWorld(40)
    prompt = list(range(1, 31))
    answered(world, prompt, [])
    world.forget_device()
    found = world.match(prompt)
    assert (found.device_prefix_len, found.host_hit_length) == (0, 30)
    world.run(world.submit(list(range(50, 70)), []))
    req = world.submit(prompt, [])
    req.refresh_fill_ids()
    req.last_node = found.last_device_node
    params: Any = SimpleNamespace(best_match_node=found.best_match_node, req=req)
    assert world.tree.init_load_back(params) == (0, found.last_device_node)
    assert world.tree.ready_to_load_host_cache() == -1
    world.check()
    assert world.match(prompt).host_hit_length == 30


def test_copies_that_were_used_last_stay() -> None:
    world = TieredWorld(200, host=20)
    for start in (10, 20, 30):
        answered(world, list(range(start, start + 8)), [])
        world.forget_device()
    assert [world.match(list(range(s, s + 8))).host_hit_length for s in (10, 20, 30)] == [0, 8, 8]
    world.match(list(range(20, 28)))
    answered(world, list(range(40, 48)), [])
    assert [world.match(list(range(s, s + 8))).host_hit_length for s in (20, 30)] == [8, 0]
    # More than there is host memory: nothing else is given up for it.
    answered(world, list(range(50, 75)), [])
    assert world.match(list(range(20, 28))).host_hit_length == 8


def test_with_write_back_copies_of_what_the_device_has_go_first() -> None:
    world = TieredWorld(200, host=20, policy="write_back")
    for start in (10, 20):
        answered(world, list(range(start, start + 8)), [])
        world.forget_device()
    # The later one is on both tiers now.
    answered(world, list(range(20, 28)), [])
    answered(world, list(range(30, 38)), [])
    world.settle()
    node = world.match(list(range(30, 38))).last_device_node
    world.tree._evict_node(node)
    world.check()
    assert world.match(list(range(10, 18))).host_hit_length == 8
    assert world.match(list(range(30, 38))).host_hit_length == 8
    assert world.match(list(range(20, 28))).last_device_node.host_value is None


def test_a_node_is_cut_while_it_is_copied() -> None:
    world = TieredWorld(80)
    answered(world, list(range(1, 13)), [])
    world.match([*range(1, 6), 99])
    world.check()
    (transfer,) = world.tree.ongoing_write_through.values()
    assert sorted(len(node.key) for node in transfer.nodes) == [5, 7]
    world.forget_device()
    req = world.submit([*range(1, 13), 70], [])
    assert world.prefill(req)
    world.match([*range(1, 9), 99])
    world.check()
    (transfer,) = world.tree.ongoing_load_back.values()
    assert sorted(len(node.key) for node in transfer.nodes) == [3, 4, 5]
    world.settle()
    world.check()
    assert not world.tree.ongoing_load_back


def test_a_forward_of_ours_waits_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours reads the pool without asking it; stock attention asks layer by layer."""
    world = TieredWorld(80)
    ids, spans = pictures((10, 1))
    answered(world, [*ids, 7, 8, 9], spans)
    world.forget_device()
    log: list[Any] = []
    wait = cache_controller.LayerLoadingEvent.wait

    def logged(event: Any, layer: int) -> None:
        log.append(layer)
        wait(event, layer)

    monkeypatch.setattr(cache_controller.LayerLoadingEvent, "wait", logged)
    forward = World._forward
    monkeypatch.setattr(World, "_forward", lambda *args: (log.append("forward"), forward(*args)))
    monkeypatch.setattr(TieredWorld, "_forward", World._forward)
    assert world.prefill(world.submit([*ids, 5, 6, 7], spans))
    assert log == [world.pool.layer_num - 1, "forward"]
    world.check()


def test_text_above_what_is_on_the_host_alone_may_be_evicted() -> None:
    world = TieredWorld(80, pin_text=1.0)
    answered(world, [1, 2, 3, 4, 5], [])
    answered(world, [1, 2, 3, 9, 9], [])
    world.settle()
    for left in (7 - 2, 7 - 4, 0):
        world.tree.evict(EvictParams(num_tokens=1))
        world.check()
        assert world.cached_tokens(*TEXT) == left
    found = world.match([1, 2, 3, 4, 5])
    assert (found.device_prefix_len, found.host_hit_length) == (0, 5)


def test_a_prompt_computed_anew_fills_what_is_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that has both again is one node, and its copy stays."""
    world = TieredWorld(80)
    answered(world, [1, 2, 3, 4, 5], [])
    world.forget_device()
    copies = COPIES.log["transfer_kv_direct"]
    monkeypatch.setattr(TieredRadixCache, "init_load_back", lambda tree, p: (0, p.req.last_node))
    answered(world, [1, 2, 3, 4, 5], [])
    assert world.hit([1, 2, 3, 4, 5]) == 5 and world.backed_tokens() == 5
    assert COPIES.log["transfer_kv_direct"] == copies


class Tiered(Scheduler):
    """Requests in any order, with copies in flight between any two steps."""

    world: TieredWorld
    seen: Counter[str] = Counter()

    @initialize(
        size=st.sampled_from([36, 60, 100]),
        host=st.sampled_from([12, 40, 200]),
        policy=st.sampled_from(POLICIES),
        layout=st.sampled_from(LAYOUTS),
    )
    def start(self, size: int, host: int, policy: str, layout: str) -> None:
        COPIES.pending.clear()  # of the example before
        self.sizes = host, policy, layout
        super().start(size)

    def make_world(self, size: int) -> World:
        world = TieredWorld(
            *(size, *self.sizes), disable=False, rows=4, when=self.when, page=self.page
        )
        load = world.tree.init_load_back

        def counted(params: Any) -> tuple[int, Node]:
            loaded, node = load(params)
            self.seen["loaded" if loaded else "declined"] += 1
            self.seen["pictures"] += any(
                token >= PAD for token in node.key.token_ids[: len(node.key)]
            )
            return loaded, node

        world.tree.init_load_back = counted  # type: ignore[method-assign]
        return world

    @precondition(lambda self: self.past and len(self.world.live) < 4)
    @rule(data=st.data(), chunk=st.sampled_from([100, 5]), whole=st.booleans())
    def once_more(self, data: st.DataObject, chunk: int, whole: bool) -> None:
        """A prompt that was answered twice, of which the device has what others hold."""
        ids, spans, config = data.draw(st.sampled_from(self.past))
        for _ in range(2):
            req = self.world.submit(ids, spans, config)
            self.begin(req, 100, True)
            if req.phase is Phase.RUNNING:
                self.world.finish(req)
        self.world.settle()
        self.world.tree.evict(EvictParams(num_tokens=1 << 20))
        self.begin(self.world.submit(ids, spans, config), chunk, whole)

    @rule()
    def copies_are_done(self) -> None:
        COPIES.settle()

    @rule()
    def events(self) -> None:
        self.world.tree.check_hicache_events()

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "world"):
            self.world.tree.reset()
            pool = self.world.tree.token_to_kv_pool_host
            assert pool.available_size() == pool.logical_size


class TieredUnderPressure(Tiered):
    when = "pressure"


class TieredPages(Tiered):
    page = 4


class TieredPagesUnderPressure(TieredUnderPressure):
    page = 4


@pytest.mark.parametrize(
    "machine", [Tiered, TieredUnderPressure, TieredPages, TieredPagesUnderPressure]
)
def test_slots_of_both_tiers_are_conserved_in_any_order(machine: type[Tiered]) -> None:
    Tiered.seen.clear()
    run_machine(machine)
    assert Tiered.seen["loaded"] >= 10 and Tiered.seen["pictures"] >= 5, Tiered.seen
