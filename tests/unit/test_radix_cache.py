# SPDX-License-Identifier: Apache-2.0
"""The radix cache on SGLang's own allocator and request pool: who owns each slot, at every moment.

A model of the scheduler drives the real compressor, allocator, row pool and `release_kv_cache`.
The KV of a token is a number that its whole prefix determines, and what it was computed beside:
wrong contents of a slot show. The tree itself has its own tests (test_radix_policy.py).
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import Phase as HypothesisPhase
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sglang.srt.managers.schedule_batch import (
    MM_PAD_SHIFT_VALUE,
    Modality,
    MultimodalDataItem,
    MultimodalInputs,
    ReqKvInfo,
)
from sglang.srt.mem_cache import common
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    InitLoadBackParams,
    MatchPrefixParams,
)
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from aircache_sglang.config import AirCacheConfig
from aircache_sglang.engine.backend import AttentionState
from aircache_sglang.engine.compressor import Compressor
from aircache_sglang.engine.kv_pool import LayerContiguousKVPool
from aircache_sglang.engine.metrics import Metrics
from aircache_sglang.engine.pressure import Pressure
from aircache_sglang.engine.radix_cache import AirCacheRadixCache
from aircache_sglang.engine.request import RequestState, state_of
from aircache_sglang.engine.tree import Kind, Node
from aircache_sglang.runtime import spans as spans_module
from aircache_sglang.runtime.compress import PassInputs, TorchPass
from aircache_sglang.runtime.decide import Intent, Reason
from aircache_sglang.runtime.decode import TorchDecoder
from aircache_sglang.runtime.extend import TorchExtender
from aircache_sglang.runtime.gate import CPU
from aircache_sglang.runtime.record import Stage
from aircache_sglang.runtime.spans import VisualPrompt
from aircache_sglang.runtime.table import CompressionTable
from tests.support.one_rank import ONE_RANK
from tests.support.spans import between_positions

LAYERS, KV_HEADS, Q_HEADS, DIM = 2, 1, 2, 2
INSTRUCTION = 3  # tokens that are scored, and computed anew by every compressed request
PAD = MM_PAD_SHIFT_VALUE


class Phase(enum.Enum):
    WAITING = enum.auto()
    CHUNKED = enum.auto()  # between two chunks of its prefill
    IN_FLIGHT = enum.auto()  # prefill launched, result unknown to the scheduler
    RUNNING = enum.auto()


def truth(tokens: tuple[int, ...]) -> float:
    """What every layer's K holds for the last of these tokens."""
    return (hash(tokens) % (1 << 20)) / (1 << 20)


def lossy(intent: Intent, tokens: tuple[int, ...]) -> float:
    """The same, computed beside the columns of `intent`: no exact KV, nor beside others'."""
    return -1 - truth((hash(intent.config.variant()), intent.prompt.length, *tokens))


class FakeReq:
    """The part of SGLang's `Req` that the cache, the release and the compressor read."""

    def __init__(self, rid: int, ids: list[int], spans: list[tuple[int, int]], config: Any) -> None:
        self.rid = rid
        self.spans, self.config = spans, config
        self.origin_input_ids = array("q", ids)
        self.output_ids = array("q")
        items = [
            MultimodalDataItem(modality=Modality.IMAGE, offsets=[(a, b - 1)]) for a, b in spans
        ]
        self.multimodal_inputs = (
            MultimodalInputs(mm_items=items, im_token_id=PAD - 1) if spans else None
        )
        self.sampling_params = SimpleNamespace(
            max_new_tokens=8,
            ignore_eos=False,
            custom_params={"aircache": config} if config else None,
        )
        self.kv = ReqKvInfo()
        self.full_untruncated_fill_ids = array("q")
        self.extra_key = self.cache_salt = self.priority = None
        self.input_embeds = self.positional_embed_overrides = self.beam_group = None
        self.skip_radix_cache_insert = False
        self.lock: Any = None
        self.last_node: Any = None
        self.prefix_len = self.extend_end = self.extend_batch_idx = self.prefilled = 0
        self.finished_len: int | None = None
        self.retracted_stain = False
        self.decode_batch_idx = 0
        self.phase = Phase.WAITING

    @property
    def ids(self) -> list[int]:
        return [*self.origin_input_ids, *self.output_ids]

    def finished(self) -> bool:
        return self.finished_len is not None

    def owned_kv_len(self) -> int:
        return min(self.kv.kv_committed_len, len(self.ids))

    def refresh_fill_ids(self) -> None:
        self.full_untruncated_fill_ids = self.origin_input_ids + self.output_ids


def in_conversation(replica: Node | None) -> bool:
    """Whether a replica holds the pictures of several turns, whose texts saw different columns."""
    return replica is not None and replica.content is not None and len(replica.content.segments) > 1


def report(req: FakeReq) -> dict[str, Any]:
    """What the answer will say of a compressed request."""
    found = state_of(req).report
    assert found is not None
    return found


class World:
    """A pool, a tree and a compressor, without a model."""

    def __init__(
        self,
        size: int,
        *,
        disable: bool = False,
        rows: int = 8,
        pin_text: float = 0.5,
        when: str = "prefill",
        page: int = 1,
    ) -> None:
        self.page = page
        self.pool = LayerContiguousKVPool(
            size, page, torch.float32, KV_HEADS, DIM, LAYERS, "cpu", enable_memory_saver=False
        )
        self.allocator = (
            TokenToKVPoolAllocator(size, torch.float32, "cpu", self.pool, need_sort=False)
            if page == 1
            else PagedTokenToKVPoolAllocator(
                *(size, page, torch.float32, "cpu", self.pool), need_sort=False
            )
        )
        self.rows = ReqToTokenPool(rows, 256, "cpu", enable_memory_saver=False)
        compressor = Compressor.__new__(Compressor)
        compressor.config = AirCacheConfig(
            *("aircache", 0.4),
            min_visual_tokens=3,
            gate="off",
            when=when,
            rungs=(0.8, 0.6, 0.4),
        )
        compressor.pool = self.pool
        compressor.records, compressor.surplus, compressor.costs = {}, {}, CPU
        table = compressor.table = CompressionTable(self.rows.req_to_token, LAYERS)
        compressor.metrics = Metrics(None)
        cells = PassInputs(self.pool.k_all, self.pool.v_all, table, ONE_RANK, 1.0)
        compressor.compress, compressor.inputs = TorchPass(cells), cells
        compressor._running, compressor._admitted, compressor._has_tree = (), (), not disable
        compressor.mode, compressor.arriving = "null", {}
        self.pressure = Pressure(cells, compressor.records, compressor.metrics)
        compressor._launch = self.pressure.launch
        compressor.pressure = self.pressure
        decoder = TorchDecoder(self.pool, compressor.table)
        extender = TorchExtender(self.pool, compressor.table)
        compressor.attention = AttentionState(self.pool, decoder, extender, lambda: None)
        self.compressor = compressor
        params = CacheInitParams(
            disable=disable,
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            page_size=page,
        )
        self.tree = self.make_tree(params, compressor, pin_text, compressor.metrics)
        # Visual KV that was computed beside columns.
        self.beside: list[float] = []
        self.live: list[FakeReq] = []
        self.numbers = itertools.count()

    def make_tree(self, *parts: Any) -> AirCacheRadixCache:
        return AirCacheRadixCache(*parts)

    # What the scheduler does, in SGLang's order.

    def submit(
        self, ids: list[int], spans: list[tuple[int, int]], config: dict[str, Any] | None = None
    ) -> FakeReq:
        req = FakeReq(next(self.numbers), ids, spans, config)
        self.live.append(req)
        return req

    def free_or_evictable(self) -> int:
        return self.allocator.available_size() + self.tree.evictable_size()

    def prefill(self, req: FakeReq, chunk: int = 1 << 30, *, reserve: bool = True) -> bool:
        """One chunk; False if not admitted. Without `reserve` the columns are not counted."""
        first = req.phase is Phase.WAITING
        req.refresh_fill_ids()
        total, on_host = len(req.full_untruncated_fill_ids), 0
        if first:
            key = RadixKey(req.full_untruncated_fill_ids, req.extra_key, limit=total - 1)
            params = MatchPrefixParams(key=key, req=req, cow_mamba=self.tree.supports_mamba())
            found = self.tree.match_prefix(params)
            req.prefix_len = req.kv.cache_protected_len = found.device_prefix_len
            req.last_node, on_host = found.last_device_node, found.host_hit_length
        end = self.tree.chunk_end(req)
        chunk = chunk if end is None else min(chunk, end - req.prefix_len)
        extend = min(chunk, total - req.prefix_len - on_host)
        lock = self.tree.lock(req.last_node) if first else None
        if not self._has_room(req, on_host + extend, reserve):
            self.tree.unlock(lock)
            return False
        self.compressor._running = self.running()
        if on_host:
            params = InitLoadBackParams(found.best_match_node, on_host, req=req)
            loaded, req.last_node = self.tree.init_load_back(params)
            assert loaded == 0 or loaded >= on_host, "all or nothing"
            lock = self._exchange(lock, req.last_node)
            req.prefix_len += loaded
            req.kv.cache_protected_len = req.prefix_len
            extend = min(extend if loaded else chunk, total - req.prefix_len)
            if not loaded and not self._has_room(req, extend, reserve):
                self.tree.unlock(lock)
                return False
        load = self.start_loading()
        if first:
            req.lock = lock
            prefix = self.tree.path_device_indices(req.last_node)[: req.prefix_len]
            self.rows.alloc([req])
            self.rows.write((req.kv.req_pool_idx, slice(0, req.prefix_len)), prefix.int())
        req.extend_end = req.prefilled = req.prefix_len + extend
        req.extend_batch_idx += 1
        self.compressor.make_room(self.tree, [req])
        slots = self._alloc(req, extend)
        assert slots is not None, "admission was promised more than packing wins"
        where = slice(req.prefix_len, req.extend_end)
        self.rows.write((req.kv.req_pool_idx, where), slots.int())
        req.kv.kv_allocated_len = req.kv.kv_committed_len = req.extend_end
        batch = SimpleNamespace(
            reqs=[req],
            tree_cache=self.tree,
            req_pool_indices=torch.tensor([req.kv.req_pool_idx]),
            prefix_lens=[req.prefix_len],
            extend_lens=[extend],
            forward_mode=ForwardMode.EXTEND,
            decoding_reqs=None,
            hicache_consumer_index=load,
        )
        self.compressor.allocate_columns(batch)
        self.compressor.run_forward(batch, lambda: self._forward(req, extend))
        if req.extend_end < total:
            common.checkpoint_kv_cache(req, self.tree)
            req.phase = Phase.CHUNKED
        else:
            req.phase = Phase.IN_FLIGHT
        return True

    def start_loading(self) -> int:
        """What the batch has to wait for, negative for nothing."""
        return -1

    def settle(self) -> None:
        """Wait for all that runs beside the scheduler."""

    def _has_room(self, req: FakeReq, n: int, reserve: bool) -> bool:
        """Whether a request may have its next n tokens, and what its prefill needs besides."""
        need = self._slots(req.prefix_len, req.prefix_len + n)
        need += self.compressor.slots_to_reserve(req, n) if reserve else 0
        self.pressure.recount()
        room = self.free_or_evictable() + self.pressure.promised(self.tree)
        return need <= room and bool(self.rows.free_slots)

    def _exchange(self, lock: Any, node: Node) -> Any:
        new = self.tree.lock(node)
        self.tree.unlock(lock)
        return new

    def running(self) -> list[FakeReq]:
        return [req for req in self.live if req.phase in (Phase.IN_FLIGHT, Phase.RUNNING)]

    def press(self, need: int) -> None:
        """Somebody needs so many slots; the forward that follows brings what was decided."""
        self.pressure.for_prefill(self.tree, need, self.running())
        self.pressure.launch()

    def _slots(self, length: int, longer: int) -> int:
        """Slots that a row of `length` tokens takes to grow."""
        return (-(-longer // self.page) + -length // self.page) * self.page

    def _alloc(self, req: FakeReq, n: int) -> torch.Tensor | None:
        """Of the next n tokens behind those that are computed (mem_cache/common.py)."""
        length = max(req.prefix_len, req.kv.kv_allocated_len)
        common.evict_from_tree_cache(self.tree, self._slots(length, length + n))
        slots: torch.Tensor | None
        if self.page == 1:
            slots = self.allocator.alloc(n)
        else:
            row = self.rows.req_to_token[req.kv.req_pool_idx]
            last = row[length - 1 : length] if length else torch.tensor([-1])
            before, after = torch.tensor([length]), torch.tensor([length + n])
            slots = self.allocator.alloc_extend(before, before, after, after, last.long(), n)
        return slots

    def _forward(self, req: FakeReq, extend: int) -> None:
        row = self.rows.req_to_token[req.kv.req_pool_idx]
        work = self.compressor.attention.work
        queries = work.queries
        if queries is not None:
            for layer in range(LAYERS):
                g = torch.Generator().manual_seed(req.rid * LAYERS + layer)
                queries.write(layer, torch.randn((extend, Q_HEADS, DIM), generator=g))
        record = self.compressor.records.get(req.kv.req_pool_idx)
        beside = record.intent if record is not None and record.reused else None
        for position in range(req.prefix_len, req.extend_end):
            tokens = tuple(req.ids[: position + 1])
            value = lossy(beside, tokens) if beside else truth(tokens)
            self._write(int(row[position]), value)
            if beside and tokens[-1] >= PAD:
                self.beside.append(value)
        for sums in work.sums:
            for layer in range(LAYERS):
                q = torch.ones((extend, Q_HEADS, DIM))[sums.source]
                sums.total.add(layer, q, self.pool.k_all[layer, sums.slots], sums.first, 1.0)

    def _write(self, slot: int, value: float) -> None:
        assert slot != 0
        self.pool.k_all[:, slot] = value
        self.pool.v_all[:, slot] = value

    def decode(self, req: FakeReq, *, mixed: bool = False) -> bool:
        """Launch one step; its slot is allocated, its token known only to the next `result`.

        mixed: in the batch of a prefill (schedule_batch.py, mix_with_running).
        """
        length = req.kv.kv_allocated_len
        self.pressure.for_decode(self.tree, self._slots(length, length + 1), self.running())
        self.pressure.launch()
        slots = self._alloc(req, 1)
        if slots is None:
            return False
        self.rows.write((req.kv.req_pool_idx, length), slots.int())
        req.kv.kv_allocated_len = req.kv.kv_committed_len = length + 1
        req.decode_batch_idx += 1
        if mixed:
            req.refresh_fill_ids()
            req.extend_end = length + 1
        record = self.compressor.records.get(req.kv.req_pool_idx)
        ids = tuple([*req.ids, 999][: length + 1])
        self._write(int(slots), lossy(record.intent, ids) if record else truth(ids))
        if len(req.ids) <= length:
            # The token that this step reads is sampled by the step whose result is still unknown.
            req.output_ids.append(999)
        return True

    def result(self, req: FakeReq) -> None:
        """The prefill's result reaches the scheduler."""
        common.checkpoint_kv_cache(req, self.tree)
        req.phase = Phase.RUNNING

    def finish(self, req: FakeReq, *, checkpoint: bool = True) -> None:
        req.finished_len = len(req.output_ids)
        common.release_kv_cache(req, self.tree, checkpoint=checkpoint)
        self.live.remove(req)

    def retract(self, req: FakeReq) -> None:
        common.release_kv_cache(req, self.tree, checkpoint=False)
        kv = req.kv
        kv.cache_protected_len = kv.cache_inserted_len = kv.kv_committed_len = 0
        req.lock = req.last_node = None
        req.prefix_len = req.extend_end = req.extend_batch_idx = 0
        req.retracted_stain = True
        req.decode_batch_idx = 0
        req.phase = Phase.WAITING

    def run(self, req: FakeReq, steps: int = 0) -> FakeReq:
        assert self.prefill(req)
        self.result(req)
        for _ in range(steps):
            assert self.decode(req)
        return req

    # What must hold at every moment.

    def nodes(self) -> Iterator[tuple[Node, tuple[int, ...]]]:
        """Each node with the tokens from the root to its end."""
        stack: list[tuple[Node, tuple[int, ...]]] = [(self.tree.root_node, ())]
        while stack:
            node, prefix = stack.pop()
            for child in node.children.values():
                tokens = (*prefix, *child.key.raw_token_ids())
                yield child, tokens
                stack.append((child, tokens))

    def owned(self, req: FakeReq) -> list[int]:
        """Slots that a request alone must give back."""
        kv = req.kv
        if not kv.holds_kv:
            return []
        slots = dict(enumerate(self.rows.req_to_token[kv.req_pool_idx].tolist()))
        record = self.compressor.records.get(kv.req_pool_idx)
        owned = self.compressor.surplus.get(kv.req_pool_idx, torch.empty(0)).tolist()
        gone: set[int] = set()
        if record is not None:
            slots |= dict(enumerate(record.originals.tolist()))
            owned += [] if record.shared else record.extra.tolist()
            if record.stage is Stage.RELEASED:
                gone = self.given_up(record.intent)
        positions = set(range(kv.cache_protected_len, kv.kv_allocated_len)) - gone
        return self.expand(owned + [slots[position] for position in positions])

    def given_up(self, intent: Intent) -> set[int]:
        """Positions of a packed request whose pages hold nothing that it needs."""
        needed = between_positions(intent.prompt).tolist() if not intent.reuses else []
        start = intent.prompt.start // self.page * self.page
        before = range(start if intent.reuses else intent.prompt.start)
        needed += [*before, *range(intent.prompt.end, intent.prompt.length + self.page)]
        pages = {position // self.page for position in needed}
        return {p for p in range(intent.prompt.end) if p // self.page not in pages}

    def expand(self, slots: list[int]) -> list[int]:
        """All slots of the pages of these."""
        pages = sorted({slot // self.page for slot in slots})
        return [page * self.page + i for page in pages for i in range(self.page)]

    def check(self) -> None:
        free = [
            page * self.page + i
            for page in self.allocator.get_all_free_pages().tolist()
            for i in range(self.page)
        ]
        cached = [slot for node, _ in self.nodes() if node.size for slot in node.value.tolist()]
        owned = [slot for req in self.live for slot in self.owned(req)]
        everything = sorted(free + cached + owned)
        assert everything == list(range(self.page, self.allocator.size + self.page)), (
            f"{len(free)} free + {len(cached)} cached + {len(owned)} owned"
        )
        assert len(cached) == self.tree.evictable_size() + self.tree.protected_size()
        for node, tokens in self.nodes():
            self._check_node(node, tokens)
        for req in self.live:
            if not req.kv.holds_kv:
                continue
            self._check_row(req)
            row = self.rows.req_to_token[req.kv.req_pool_idx, : req.kv.kv_allocated_len]
            assert not set(row.tolist()) & set(free), "a row names a slot that is free"
            # SGLang's busy check counts this much.
            stock = self._slots(0, req.kv.kv_allocated_len) - req.kv.cache_protected_len
            private = self.compressor.private_tokens(req.kv.req_pool_idx, stock)
            assert private == len(self.owned(req))
        rows = {req.kv.req_pool_idx for req in self.live if req.kv.holds_kv}
        assert set(self.compressor.records) <= rows
        assert set(self.compressor.surplus) <= rows
        assert len(self.rows.free_slots) == self.rows.size - len(rows)

    def _check_node(self, node: Node, tokens: tuple[int, ...]) -> None:
        if node.is_tombstone:
            return
        slots = node.value.tolist()
        first = len(tokens) - len(slots)
        positions = list(range(first, len(tokens)))
        beside = None
        if node.content is not None:
            intent, prompt = node.content.intent, node.content.intent.prompt
            m = intent.columns
            assert prompt.length - self.page < len(tokens) <= prompt.length
            assert first % self.page == 0
            # The pictures' last tokens share a page with the instruction.
            tokens = tuple([*tokens, *[0] * self.page])
            self._check_columns(prompt, slots[:m], tokens)
            tail = range(prompt.end // self.page * self.page, prompt.length)
            tail = tail[: len(slots) - intent.n_extra]
            positions = [*range(intent.replica_start, prompt.start)]
            positions += [*between_positions(prompt).tolist(), *tail]
            slots = slots[m : m + intent.n_copies] + slots[intent.n_extra :]
        elif node.replica is not None:
            assert node.replica.content is not None
            beside = node.replica.content.intent
        if in_conversation(node.replica):
            return
        for position, slot in zip(positions, slots, strict=True):
            prefix = tokens[: position + 1]
            # The end of an instruction that fills no page of its replica may be either.
            exact = beside is None or (
                position < beside.prompt.length and self._holds(slot, truth(prefix))
            )
            value = truth(prefix) if exact else lossy(beside, prefix)
            assert self._holds(slot, value), "the tree holds lossy or stale KV"

    def _check_row(self, req: FakeReq) -> None:
        row = self.rows.req_to_token[req.kv.req_pool_idx].tolist()
        record = self.compressor.records.get(req.kv.req_pool_idx)
        turns = in_conversation(req.last_node.replica) or (record is not None and record.segments)
        tokens = (*req.ids, 999, 999)
        places = {p: p for p in range(req.kv.kv_allocated_len)}
        lossy_from = len(tokens)
        if record is not None:
            prompt = record.intent.prompt
            assert record.budgets is not None
            gap_end = prompt.start + prompt.n_visual
            assert row[prompt.start : gap_end] == (
                record.columns.tolist() + [0] * (prompt.n_visual - record.intent.columns)
            )
            self._check_columns(prompt, record.columns.tolist(), tokens)
            for p in prompt.visual_positions().tolist():
                del places[p]
            for j, p in enumerate(between_positions(prompt).tolist()):
                places[p] = gap_end + j
            lossy_from = record.intent.replica_end if record.reused else req.prefilled
            if packs := state_of(req).packs:
                lossy_from = len(req.origin_input_ids) + packs[0].packed_at - 1
            if record.stage is Stage.PREFILLED:
                for p, slot in enumerate(record.originals.tolist() if not turns else []):
                    assert self._holds(slot, truth(tokens[: p + 1])), "lost before it is published"
        for position, place in places.items() if not turns else ():
            prefix = tokens[: position + 1]
            exact = record is None or position < lossy_from
            if (
                record is not None
                and record.reused
                and position in range(lossy_from, prompt.length)
            ):
                exact = self._holds(row[place], truth(prefix))
            value = truth(prefix) if exact else lossy(record.intent, prefix)
            assert self._holds(row[place], value), "a row names wrong KV"

    def _check_columns(
        self, prompt: VisualPrompt, columns: list[int], tokens: tuple[int, ...]
    ) -> None:
        """Packed cells are cells of the request's own pictures, whoever owns those now."""
        # Those of a later turn were computed beside the columns of the one before.
        visual = [truth(tokens[: p + 1]) for p in prompt.visual_positions().tolist()]
        visual += self.beside
        cells = self.pool.k_all[:, columns]
        assert torch.isin(cells, torch.tensor(visual)).all(), "a column was overwritten"

    def _holds(self, slot: int, value: float) -> bool:
        expected = torch.tensor(value, dtype=torch.float32)
        return bool((self.pool.k_all[:, slot] == expected).all())

    def cached_tokens(self, *kinds: Kind) -> int:
        return sum(node.size for node, _ in self.nodes() if node.kind in kinds)

    def hit(self, ids: list[int]) -> int:
        """Tokens of a plain request's prompt that are in the tree."""
        key = RadixKey(array("q", ids))
        return int(self.tree.match_prefix(MatchPrefixParams(key=key)).device_prefix_len)


@pytest.fixture(autouse=True)
def published_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """`release_kv_cache` asks SGLang's published configuration for two flags."""
    monkeypatch.setattr(common, "get_spec", lambda: SimpleNamespace(speculative_algorithm=None))
    monkeypatch.setattr(common, "get_serving", lambda: SimpleNamespace(strip_thinking_cache=False))


@pytest.fixture(autouse=True)
def short_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans_module, "INSTRUCTION_LIMIT", INSTRUCTION)


HEAD = [1, 2, 3, 4]
REUSE = {"reuse": "compressed"}
PRESSURE = {"when": "pressure"}
SESSION = {"reuse": "compressed", "when": "prefill", "session_columns": 6}
UNIFIED = {"ablation": {"audience": "all"}}
TEXT = (Kind.PROMPT, Kind.GENERATED)

with_reuse = pytest.mark.parametrize("config", [None, REUSE], ids=["exact", "compressed"])


def pictures(*sizes_and_ids: tuple[int, int], between: int = 0) -> tuple[list[int], Any]:
    """HEAD, pictures of (tokens, id) with text between them: ids and spans."""
    ids, spans = list(HEAD), []
    for place, (n, picture) in enumerate(sizes_and_ids):
        if place:
            ids += [20 + place] * between
        spans.append((len(ids), len(ids) + n))
        ids += [PAD + picture] * n
    return ids, spans


@with_reuse
@pytest.mark.parametrize("disable", [False, True])
def test_the_life_of_one_compressed_request(disable: bool, config: Any) -> None:
    world = World(64, disable=disable)
    ids, spans = pictures((10, 1), (5, 2), between=3)
    req = world.submit([*ids, 7, 8, 9], spans, config)
    assert world.prefill(req)
    world.check()
    # 25 of the prompt; 6 columns, and 3 copies for a replica, until the result is processed.
    assert world.allocator.available_size() == 64 - 25 - (9 if config else 6)
    record = world.compressor.records[req.kv.req_pool_idx]
    assert record.stage is Stage.PREFILLED
    world.decode(req)
    world.check()
    world.result(req)
    world.check()
    assert record.stage is Stage.RELEASED
    in_use = 4 + 3 + 3 + 1 + 6  # head, text between, instruction, generated, columns
    assert 64 - world.free_or_evictable() == in_use
    # The picture stays while nobody needs the memory; a replica has its own text between.
    evictable = 0 if disable else 18 if config else 15
    assert world.tree.evictable_size() == evictable
    world.tree.evict(EvictParams(num_tokens=1000))
    world.check()
    assert world.allocator.available_size() == 64 - in_use
    assert report(req)["slots_freed"] == 15 - 6
    world.finish(req)
    world.check()
    assert not world.compressor.records
    assert world.cached_tokens(Kind.VISUAL) == 0
    if disable:
        assert world.cached_tokens(*TEXT) == 0
    elif config:
        assert world.cached_tokens(Kind.PROMPT) == len(HEAD)
        assert world.cached_tokens(Kind.PACKED) == 6 + 3 + 3
        assert world.cached_tokens(Kind.GENERATED) == 1, "the answer, below the replica"
    else:
        assert world.cached_tokens(Kind.PROMPT) == len(HEAD) + 3 + 3
        assert world.cached_tokens(Kind.GENERATED) == 0, "the answer is not exact"


@pytest.mark.parametrize("policy", ["aircache", "h2o"])
@pytest.mark.parametrize("disable", [False, True])
def test_a_request_whose_text_is_evicted_holds_its_columns_alone(
    disable: bool, policy: str
) -> None:
    world = World(80, disable=disable)
    ids, spans = pictures((10, 1), (5, 2), between=3)
    req = world.submit([*ids, 7, 8, 9], spans, {"policy": policy, **UNIFIED})
    assert world.prefill(req)
    world.check()
    world.decode(req)
    world.result(req)
    world.check()
    assert report(req)["columns"] == 10, "0.4 of 25"
    assert 80 - world.free_or_evictable() == 10 + 1
    world.tree.evict(EvictParams(num_tokens=1000))
    world.check()
    assert world.allocator.available_size() == 80 - 10 - 1
    world.decode(req)
    world.finish(req)
    world.check()
    assert world.allocator.available_size() == 80


def test_the_next_question_hits_all_but_what_it_scores() -> None:
    world = World(100)
    ids, spans = pictures((10, 1))
    world.finish(world.run(world.submit([*ids, 7, 8, 9, 10], spans), steps=2))
    # One token, the same text, the same beginning, and the same with more to follow.
    for question, hit in (
        ([30], 0),
        ([7, 8, 9, 10], 1),
        ([7, 8, 40], 0),
        ([7, 8, 9, 10, 50, 51], 3),
        ([7, 8, 9, 10, 999, 50, 51, 52], 4),
    ):
        req = world.submit([*ids, *question], spans)
        assert world.prefill(req)
        assert req.prefix_len == len(ids) + hit, question
        world.check()
        world.result(req)
        world.decode(req)
        world.check()
        world.finish(req)
        world.check()


def test_an_uncompressed_request_shares_the_exact_prompt_and_publishes_its_answer() -> None:
    world = World(100)
    ids, spans = pictures((10, 1))
    turn = [*ids, 7, 8, 9]
    world.finish(world.run(world.submit(turn, spans), steps=2))
    assert world.hit([*turn, 999, 999]) == len(turn)
    keep_all = world.submit(turn, spans, {"retention": 1})
    assert world.prefill(keep_all)
    assert keep_all.prefix_len == len(turn) - 1
    world.result(keep_all)
    world.decode(keep_all)
    world.decode(keep_all)
    world.check()
    world.finish(keep_all)
    world.check()
    assert world.hit([*turn, 999, 999]) == len(turn) + 2
    # An answer in exact KV is a hit for a compressed request as well.
    again = world.submit([*turn, 999, 999, 5, 6, 7], spans)
    assert world.prefill(again)
    assert again.prefix_len == len(turn) + 2
    world.result(again)
    world.check()


@pytest.mark.parametrize("chunk", [100, 2])
@pytest.mark.parametrize("evicted", [False, True])
def test_a_follow_up_decodes_from_the_columns_of_the_turn_before(evicted: bool, chunk: int) -> None:
    world = World(100)
    ids, spans = pictures((10, 1), (5, 2), between=3)
    table = world.compressor.table
    first = world.run(world.submit([*ids, 7, 8, 9], spans, REUSE), steps=2)
    offsets = table.cell_offset[first.kv.req_pool_idx].tolist()
    turn = first.ids
    world.finish(first)
    if evicted:  # the pictures; the text between them is in the replica too
        world.tree.evict(EvictParams(num_tokens=15))
    # Another life on the same row of the table.
    world.finish(world.run(world.submit([40, 41], []), steps=1))
    free = world.free_or_evictable()
    second = world.submit([*turn, 30, 31, 32], spans, REUSE)
    while second.phase in (Phase.WAITING, Phase.CHUNKED):
        assert world.prefill(second, chunk)
        world.check()
    assert world.hit(ids) == (len(HEAD) if evicted else len(ids))
    row = second.kv.req_pool_idx
    record = world.compressor.records[row]
    assert record.reused
    assert report(second)["reused"]
    assert (int(table.gap_start[row]), int(table.gap_len[row])) == (len(HEAD), 15)
    assert table.cell_offset[row].tolist() == offsets
    # 3 new tokens; the head, the replica (6 + 3 + 3) and the answer of 2 are held.
    assert free - world.free_or_evictable() == 3 + len(HEAD) + 12 + 2
    world.result(second)
    world.decode(second)
    world.check()
    world.finish(second)
    world.check()
    assert world.free_or_evictable() == 100


@pytest.mark.parametrize("other", [{"retention": 0.6}, {"alpha": 0.5}, {"budget": "uniform"}])
def test_a_follow_up_with_other_settings_packs_its_own_replica(other: dict[str, Any]) -> None:
    world = World(100)
    ids, spans = pictures((10, 1))
    first = world.run(world.submit([*ids, 7, 8, 9], spans, REUSE), steps=2)
    turn = first.ids
    world.finish(first)
    for more, config, reused in (
        ([30], REUSE | other, False),
        ([30, 31], REUSE | other, True),
        ([32], REUSE, True),
    ):
        req = world.run(world.submit([*turn, *more], spans, config), steps=1)
        world.check()
        assert world.compressor.records[req.kv.req_pool_idx].reused == reused
        world.finish(req)
        world.check()


@pytest.mark.parametrize("shared", [1, 4], ids=["in no page", "a page"])
def test_another_question_is_scored_however_much_of_it_fills_pages(shared: int) -> None:
    """Two questions that begin alike: the rest of an instruction is in no page of a replica."""
    world = World(120, page=4)
    ids, spans = pictures((12, 1))
    begin = [7, 8, 9, 9][:shared]
    first, second = ([*ids, *begin, token] for token in (5, 6))
    for prompt, again in ((first, False), (second, False), (first, True), (second, True)):
        req = world.run(world.submit(prompt, spans, REUSE), steps=1)
        assert world.compressor.records[req.kv.req_pool_idx].reused == again
        world.check()
        world.finish(req)
        world.check()
    packed = [node for node, _ in world.nodes() if node.kind is Kind.PACKED]
    assert len(packed) == 2


def test_two_requests_that_prefilled_the_same_picture_publish_it_once() -> None:
    world = World(100)
    ids, spans = pictures((10, 1), (4, 2), between=2)
    first = world.submit([*ids, 7], spans)
    second = world.submit([*ids, 8], spans)
    assert world.prefill(first)
    assert world.prefill(second)
    assert second.prefix_len == 0
    world.check()
    world.result(first)
    world.check()
    free = world.allocator.available_size()
    world.result(second)
    world.check()
    assert world.allocator.available_size() == free + len(ids)
    assert world.cached_tokens(Kind.VISUAL) == 14
    for req in (first, second):
        world.decode(req)
        world.finish(req)
        world.check()


def test_the_least_recently_used_picture_goes_first_and_text_stays() -> None:
    world = World(200, pin_text=1)
    old_text = list(range(50, 80))
    world.finish(world.run(world.submit(old_text, [])))
    asked = []
    for picture in range(4):
        ids, spans = pictures((9, picture))
        asked.append(ids)
        for _ in range(2):
            world.finish(world.run(world.submit([*ids, 7], spans)))
    recent_text = list(range(80, 100))
    world.finish(world.run(world.submit(recent_text, [])))
    world.check()
    text = world.cached_tokens(*TEXT)
    assert text == len(old_text) + len(recent_text) + len(HEAD) + 4
    for gone, ids in enumerate(asked):
        assert world.hit([*ids, 7]) == len(ids) + 1
        for later in asked[gone + 1 :]:
            world.hit(later)
        world.tree.evict(EvictParams(num_tokens=1))
        world.check()
        assert world.hit(ids) == len(HEAD)
        assert [world.hit(later) for later in asked[gone + 1 :]] == [len(ids)] * (3 - gone)
    assert world.cached_tokens(*TEXT) == text
    world.tree.evict(EvictParams(num_tokens=1))
    assert world.hit(old_text) == 0
    assert world.cached_tokens(*TEXT) == text - len(old_text)
    world.check()


@with_reuse
@pytest.mark.parametrize("phase", ["in_flight", "decoding", "running"])
@pytest.mark.parametrize("disable", [False, True])
def test_retraction_frees_everything_and_the_second_life_compresses_again(
    phase: str, disable: bool, config: Any
) -> None:
    world = World(80, disable=disable)
    ids, spans = pictures((12, 1), (6, 2), between=2)
    req = world.submit([*ids, 7, 8], spans, config)
    assert world.prefill(req)
    if phase != "in_flight":
        world.decode(req)
    if phase == "running":
        world.result(req)
        world.decode(req)
    world.retract(req)
    n_said = len(req.output_ids)
    world.check()
    assert world.free_or_evictable() == 80
    assert not world.compressor.records
    world.run(req, steps=1)
    world.check()
    record = world.compressor.records[req.kv.req_pool_idx]
    assert record.stage is Stage.RELEASED
    # Its first life left a replica if its prefill had come to an end.
    assert record.reused == (phase == "running" and config is REUSE and not disable)
    if not record.reused:
        assert record.packed_at == n_said + 1
    world.finish(req)
    world.check()
    assert world.free_or_evictable() == 80


@pytest.mark.parametrize("config", [None, {"retention": 1.0}, REUSE], ids=str)
def test_a_mixed_step_before_the_result_of_the_prefill(config: Any) -> None:
    """It has counted a token by then that is not known yet, and the prompt is published alone."""
    world = World(64)
    ids, spans = pictures((10, 1))
    req = world.submit([*ids, 7, 8, 9], spans, config)
    assert world.prefill(req)
    req.output_ids, said = array("q"), req.output_ids
    assert world.decode(req, mixed=True)
    req.output_ids = said
    world.result(req)
    world.check()
    assert req.kv.cache_protected_len == len(req.origin_input_ids)


def test_hits_are_counted_once_a_prompt() -> None:
    """As SGLang's `cached_tokens`: neither later chunks nor the life after a retraction."""
    world = World(80)
    totals = world.compressor.metrics.totals
    ids, spans = pictures((12, 1))
    world.finish(world.run(world.submit([*ids, 7, 8, 9], spans)))
    assert totals["hit_tokens_exact"] == 0
    req = world.submit([*ids, 7, 8, 9], spans)
    while req.phase in (Phase.WAITING, Phase.CHUNKED):
        assert world.prefill(req, 2)
    world.result(req)
    assert totals["hit_tokens_exact"] == len(ids)
    world.retract(req)
    world.run(req)
    assert req.prefix_len and totals["hit_tokens_exact"] == len(ids)
    world.finish(req)


@with_reuse
@pytest.mark.parametrize("chunk", [1, 3, 7, 13])
@pytest.mark.parametrize("disable", [False, True])
def test_chunked_prefill(chunk: int, disable: bool, config: Any) -> None:
    world = World(80, disable=disable)
    ids, spans = pictures((12, 1), (6, 2), between=2)
    req = world.submit([*ids, 7, 8, 9, 10, 11], spans, config)
    while req.phase in (Phase.WAITING, Phase.CHUNKED):
        assert world.prefill(req, chunk)
        world.check()
    world.result(req)
    world.check()
    if not disable:
        assert world.hit([*ids, 7, 8]) == len(ids) + (0 if config else 2)
    world.decode(req)
    world.finish(req)
    world.check()
    assert world.free_or_evictable() == 80


@pytest.mark.parametrize("chunk", [2, 9, 18])
def test_an_abort_between_two_chunks(chunk: int) -> None:
    world = World(80)
    ids, spans = pictures((12, 1), (6, 2), between=2)
    req = world.submit([*ids, 7, 8, 9], spans)
    assert world.prefill(req, chunk)
    assert req.phase is Phase.CHUNKED
    world.finish(req)
    world.check()
    assert world.free_or_evictable() == 80
    world.tree.evict(EvictParams(num_tokens=1))
    assert world.hit(ids) == {2: 0, 9: len(HEAD), 18: len(HEAD) + 12}[chunk], "only its last node"


def test_without_room_for_the_columns_a_request_is_served_uncompressed() -> None:
    world = World(24)
    ids, spans = pictures((12, 1))
    req = world.submit([*ids, 7, 8], spans)
    # Intended, since the pool as a whole is large enough; but others hold what is left of it.
    world.compressor.pool = SimpleNamespace(page_size=1, size=1000, layer_num=LAYERS)  # type: ignore[assignment]
    taken = world.submit(list(range(60, 64)), [])
    world.run(taken)
    assert not world.prefill(req), "admission counts the columns"
    world.check()
    assert world.prefill(req, reserve=False)
    assert not world.compressor.records
    world.check()
    world.result(req)
    world.decode(req)
    world.check()
    world.finish(req)
    world.finish(taken)
    world.check()
    assert state_of(req).report is None


@with_reuse
@pytest.mark.parametrize("disable", [False, True])
@pytest.mark.parametrize(("mass", "m"), [(1e-9, 1), (0.2, None), (0.9999, 0)])
def test_a_promised_mass(mass: float, m: int | None, disable: bool, config: Any) -> None:
    """The most columns are reserved; what the pass does not need is free after its result."""
    world = World(100, disable=disable)
    ids, spans = pictures((12, 1), (8, 2), between=2)
    req = world.submit([*ids, 7, 8, 9], spans, {**(config or {}), "min_visual_mass": mass})
    copies = 2 if config else 0
    assert world.compressor.slots_to_reserve(req, None) == 10 + copies
    assert world.prefill(req)
    world.check()
    record = world.compressor.records.get(req.kv.req_pool_idx)
    kept = 0 if record is None else record.intent.columns
    surplus = world.compressor.surplus[req.kv.req_pool_idx].numel()
    assert surplus == 10 + copies - (kept + copies if kept else 0)
    assert (kept == m) if m is not None else 1 < kept < 10
    world.result(req)
    world.check()
    assert not world.compressor.surplus
    report = state_of(req).report
    if record is None:
        assert report is None
    else:
        assert report["columns"] == kept == round(20 * report["retention"]) or kept == 1
        assert report["visual_mass"] >= mass
        assert sum(report["layer_budgets"]) == LAYERS * kept
    world.decode(req)
    world.check()
    world.finish(req)
    world.check()
    assert world.free_or_evictable() == 100


@pytest.mark.parametrize("phase", ["finish", "retract"])
def test_surplus_is_given_back_without_a_result(phase: str) -> None:
    world = World(100)
    ids, spans = pictures((12, 1), (8, 2))
    req = world.submit([*ids, 7, 8], spans, {"min_visual_mass": 0.3})
    assert world.prefill(req)
    assert world.compressor.surplus
    if phase == "finish":
        world.finish(req, checkpoint=False)
    else:
        world.retract(req)
    assert not world.compressor.surplus
    world.check()


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_what_scores_visual_queries_computes_them_anew(chunk: int) -> None:
    ids, spans = pictures((12, 1), (6, 2), between=2)
    for config, limit in (
        ({"policy": "h2o"}, len(HEAD)),
        ({"window": "visual-4"}, len(ids) - 4),
        ({"window": "visual-8"}, len(ids) - 6 - 2 - 2),
        ({}, len(ids)),
    ):
        world = World(80)
        world.finish(world.run(world.submit([*ids, 7, 8, 9], spans)))
        req = world.submit([*ids, 7, 8, 9], spans, config)
        assert world.prefill(req, chunk)
        first = req.extend_end - min(chunk, len(ids) + 3 - limit)
        assert first == limit
        while req.phase is Phase.CHUNKED:
            assert world.prefill(req, chunk)
            world.check()
        world.result(req)
        world.check()
        assert report(req)["columns"] == 7
        world.finish(req)
        world.check()


def test_a_pool_that_can_never_hold_the_columns_leaves_the_request_alone() -> None:
    ids, spans = pictures((12, 1))
    for size, compressed in ((30, False), (40, True)):
        world = World(size)
        req = world.run(world.submit([*ids, 7, 8], spans))
        assert bool(world.compressor.records) == compressed
        world.check()
        world.finish(req)
        world.check()


@pytest.mark.parametrize("chunk", [100, 2])
def test_a_conversation_never_holds_more_columns_than_its_bound(chunk: int) -> None:
    world = World(200)
    ids, spans = pictures((10, 1))
    config = {**SESSION, "session_columns": 9}
    first = world.run(world.submit([*ids, 7, 8], spans, config), steps=2)
    assert report(first)["columns"] == 8, "the first rung of 0.8"
    turn = first.ids
    world.finish(first)
    seen = []
    for picture in range(2, 7):
        spans = [*spans, (len(turn), len(turn) + 5)]
        ids = [*turn, *[PAD + picture] * 5, 7, 8, 9]
        req = world.submit(ids, spans, config)
        while req.phase in (Phase.WAITING, Phase.CHUNKED):
            assert world.prefill(req, chunk)
            world.check()
        assert req.last_node.replica is not None, "the turn before was not extended"
        world.decode(req)
        world.check()
        world.result(req)
        world.check()
        told = report(req)
        assert told["columns"] == sum(s["columns"] for s in told["session"]) <= 9
        assert told["visual_tokens"] == 10 + 5 * (picture - 1)
        assert sum(told["layer_budgets"]) == LAYERS * told["columns"]
        seen.append([s["columns"] for s in told["session"]])
        world.decode(req)
        turn = req.ids
        world.finish(req)
        world.check()
    # 0.8, 0.6 and 0.4 of 10 and of 5 tokens; the oldest goes first, and at last to nothing.
    assert seen == [[4, 4], [0, 2, 4], [0, 2, 3, 4], [0, 2, 2, 4], [0, 2, 2, 4]]
    assert world.free_or_evictable() == 200
    world.tree.evict(EvictParams(num_tokens=1000))
    world.check()


@dataclasses.dataclass(frozen=True)
class Menu:
    """The prompts of the state machine: few, so that they meet in the tree."""

    heads = ([1, 2, 3, 4], [1], [])
    tails = ([7, 8], [7, 8, 9, 9, 9])
    layouts = (((6, 1),), ((3, 1), (4, 2)), ((4, 3), (4, 3), (2, 1)), ())
    between = (1, 0)
    configs = (
        *(None, {"retention": 1.0}, REUSE, {"retention": 0.6, **REUSE}),
        *({"policy": "h2o"}, {"window": "visual-2", **REUSE}),
        *({"min_visual_mass": 0.3, **REUSE}, {"min_visual_mass": 0.999}),
        *(UNIFIED, {"policy": "h2o", **UNIFIED}),
        *(PRESSURE, {"retention": 0.2, **PRESSURE}, {**PRESSURE, **REUSE}),
        *(SESSION, {**SESSION, "session_columns": 3}),
    )


def has(*phases: Phase) -> Any:
    """Precondition: a request is in one of these phases."""
    return lambda machine: any(req.phase in phases for req in machine.world.live)


def test_all_chunks_of_a_prompt_get_the_slots_that_it_was_admitted_for() -> None:
    """Once a chunk is there, the columns of a whole picture might not fit any more."""
    world = World(41, when="pressure")
    ids, spans = pictures((20, 100))
    whole = world.submit([*ids, *range(60, 63)], spans)
    text = world.submit(list(range(200, 220)), [])
    for req in (whole, text):
        req.sampling_params.max_new_tokens = 2
    world.run(whole)
    assert world.free_or_evictable() == 14
    for _ in range(3):
        assert world.prefill(text, 7)
        world.check()
    assert len(state_of(whole).packs) == 1


def test_room_for_columns_is_kept_from_every_beam() -> None:
    """Four beams of three tokens take what is free before the columns have had it."""
    world = World(41, when="pressure")
    ids, spans = pictures((20, 100))
    whole = world.submit([*ids, *range(60, 63)], spans)
    whole.sampling_params.max_new_tokens = 2
    world.run(whole)
    leader = SimpleNamespace(
        sampling_params=SimpleNamespace(max_new_tokens=3),
        output_ids=array("q"),
        beam_group=SimpleNamespace(beam_width=4),
        aircache=RequestState(),
    )
    for _ in range(3):
        assert world.pressure.for_decode(world.tree, 5, [whole, leader])
        world.pressure.launch()
        common.evict_from_tree_cache(world.tree, 5)
        assert world.allocator.alloc(5) is not None
        leader.output_ids.append(7)
    assert len(state_of(whole).packs) == 1


@pytest.mark.parametrize("retracted", [False, True])
def test_a_life_of_one_token_reports_itself(retracted: bool) -> None:
    """Its result finishes it, and it was never among those that could be packed."""
    world = World(120, when="pressure")
    ids, spans = pictures((20, 100))
    req = world.submit([*ids, *range(60, 63)], spans)
    if retracted:
        world.run(req, steps=2)
        world.press(world.free_or_evictable() + 1)
        assert report(req)["packs"]
        world.retract(req)
    assert world.prefill(req)
    world.finish(req)
    assert state_of(req).reason is Reason.NO_PRESSURE
    assert report(req)["rung"] is None and report(req)["columns"] == 0


@pytest.mark.parametrize("between", [0, 3])
def test_a_replica_is_filled_whatever_becomes_of_who_packed_it(between: int) -> None:
    """A request may be retracted between the decision and the forward that brings it."""
    world = World(120, when="pressure")
    ids, spans = pictures((8, 100), (8, 101), between=between)
    req = world.run(world.submit([*ids, *range(60, 63)], spans, REUSE), steps=2)
    world.pressure.for_prefill(world.tree, world.free_or_evictable() + 1, [])
    world.retract(req)
    assert world.cached_tokens(Kind.PACKED) > 0
    # Its row is another's by the time of that forward.
    other = world.run(world.submit([9, 9, 9], []))
    world.check()
    world.finish(other)
    assert world.prefill(req)
    record = world.compressor.records[req.kv.req_pool_idx]
    assert record.reused
    world.check()


def run_machine(machine: type[RuleBasedStateMachine], *, max_examples: int = 150) -> None:
    """Run a state machine on the same examples every time."""
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            # Shrinking a failure takes minutes; add HypothesisPhase.shrink to look for its cause.
            phases=[HypothesisPhase.generate],
        ),
    )


def test_a_pack_behind_the_last_token_is_not_reported() -> None:
    """With overlap a step behind the last token is decided before that token is known."""
    world = World(120, when="pressure")
    ids, spans = pictures((30, 1))
    req = world.run(world.submit([*ids, 7, 8, 9], spans), 2)
    world.press(world.free_or_evictable() + 1)
    packed_at = report(req)["packed_at"]
    del req.output_ids[packed_at:]
    world.finish(req)
    assert report(req)["packed_at"] is None
    assert state_of(req).reason is Reason.NO_PRESSURE


def test_nobody_is_admitted_beside_a_chunk_that_waits_for_its_columns() -> None:
    world = World(72)
    waits, other = (world.submit(list(range(n, n + 9)), []) for n in (10, 30))
    world.compressor.begin_batch(waits, [], lambda: None)
    assert not world.compressor.admits(other, [])
    assert world.compressor.admits(other, [waits])
    world.compressor.begin_batch(None, [], lambda: None)
    assert world.compressor.admits(other, [])


class Scheduler(RuleBasedStateMachine):
    """Requests in any order: chunked, overlapping, retracted, aborted, declined; evictions."""

    disable = False
    when = "prefill"
    page = 1

    @initialize(size=st.sampled_from([36, 60, 100]))
    def start(self, size: int) -> None:
        self.world = self.make_world(size)
        # What could be continued: conversation, pictures, configuration.
        self.past: list[tuple[list[int], Any, Any]] = []

    def make_world(self, size: int) -> World:
        return World(size, disable=self.disable, rows=4, when=self.when, page=self.page)

    def pick(self, data: st.DataObject, *phases: Phase) -> FakeReq:
        return data.draw(st.sampled_from([r for r in self.world.live if r.phase in phases]))

    def begin(self, req: FakeReq, chunk: int, whole: bool) -> None:
        """Its first chunk, or all of its prefill and a first token, if there is room."""
        world = self.world
        admitted = world.prefill(req, chunk)
        while whole and admitted and req.phase is Phase.CHUNKED:
            world.check()
            admitted = world.prefill(req, chunk)
        if whole and req.phase is Phase.IN_FLIGHT:
            world.check()
            world.result(req)
            world.check()
            world.decode(req)

    @precondition(lambda self: len(self.world.live) < 6)
    @rule(
        head=st.sampled_from(Menu.heads),
        layout=st.sampled_from(Menu.layouts),
        between=st.sampled_from(Menu.between),
        tail=st.sampled_from(Menu.tails),
        config=st.sampled_from(Menu.configs),
        chunk=st.sampled_from([100, 5, 9]),
        whole=st.booleans(),
    )
    def submit(
        self, head: Any, layout: Any, between: int, tail: Any, config: Any, chunk: int, whole: bool
    ) -> None:
        ids, spans = list(head), []
        for place, (n, picture) in enumerate(layout):
            ids += [20] * between if place else []
            spans.append((len(ids), len(ids) + n))
            ids += [PAD + picture] * n
        prompt = [*ids, *tail]
        self.past.append((prompt, spans, config))
        self.begin(self.world.submit(prompt, spans, config), chunk, whole)

    @precondition(lambda self: self.past and len(self.world.live) < 6)
    @rule(
        data=st.data(),
        tail=st.sampled_from([[], *Menu.tails]),
        chunk=st.sampled_from([100, 2]),
        whole=st.booleans(),
        other=st.booleans(),
        more=st.sampled_from([None, (3, 4), (5, 5)]),
    )
    def again(
        self, data: st.DataObject, tail: list[int], chunk: int, whole: bool, other: bool, more: Any
    ) -> None:
        """The same prompt, or the next turn of a conversation, perhaps with another picture."""
        ids, spans, config = data.draw(st.sampled_from(self.past))
        if other:
            config = data.draw(st.sampled_from(Menu.configs))
        if len(ids) < 30:
            if more is not None:
                n, picture = more
                spans = [*spans, (len(ids), len(ids) + n)]
                ids, tail = [*ids, *[PAD + picture] * n], tail or [7, 8]
            self.begin(self.world.submit([*ids, *tail], spans, config), chunk, whole)

    @precondition(has(Phase.WAITING, Phase.CHUNKED))
    @rule(data=st.data(), chunk=st.sampled_from([100, 2, 9]), reserve=st.booleans())
    def prefill(self, data: st.DataObject, chunk: int, reserve: bool) -> None:
        self.world.prefill(self.pick(data, Phase.WAITING, Phase.CHUNKED), chunk, reserve=reserve)

    @precondition(has(Phase.IN_FLIGHT, Phase.RUNNING))
    @rule(data=st.data(), mixed=st.booleans())
    def decode(self, data: st.DataObject, mixed: bool) -> None:
        req = self.pick(data, Phase.IN_FLIGHT, Phase.RUNNING)
        if len(req.output_ids) < 6:
            self.world.decode(req, mixed=mixed)

    @precondition(has(Phase.IN_FLIGHT))
    @rule(data=st.data())
    def result(self, data: st.DataObject) -> None:
        self.world.result(self.pick(data, Phase.IN_FLIGHT))

    @precondition(has(Phase.IN_FLIGHT, Phase.RUNNING, Phase.CHUNKED))
    @rule(data=st.data(), checkpoint=st.booleans())
    def finish(self, data: st.DataObject, checkpoint: bool) -> None:
        req = self.pick(data, Phase.IN_FLIGHT, Phase.RUNNING, Phase.CHUNKED)
        self.past.append((req.ids, req.spans, req.config))
        self.world.finish(req, checkpoint=checkpoint)

    @precondition(has(Phase.IN_FLIGHT, Phase.RUNNING))
    @rule(data=st.data())
    def retract(self, data: st.DataObject) -> None:
        self.world.retract(self.pick(data, Phase.IN_FLIGHT, Phase.RUNNING))

    @rule(n=st.integers(1, 20))
    def evict(self, n: int) -> None:
        evictable = self.world.tree.evictable_size()
        self.world.tree.evict(EvictParams(num_tokens=n))
        assert evictable - self.world.tree.evictable_size() >= min(n, evictable)

    @rule(need=st.integers(1, 40))
    def press(self, need: int) -> None:
        world = self.world
        free = world.free_or_evictable()
        world.pressure.recount()
        promised = world.pressure.promised(world.tree)
        world.press(need)
        assert world.free_or_evictable() >= min(need, free + promised)

    @precondition(lambda self: not any(req.kv.holds_kv for req in self.world.live))
    @rule()
    def flush(self) -> None:
        self.world.settle()
        self.world.tree.reset()
        self.world.rows.clear()
        self.world.allocator.clear()

    @invariant()
    def every_slot_has_one_owner(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        world = getattr(self, "world", None)
        if world is None:
            return
        for req in list(world.live):
            if req.kv.holds_kv:
                world.finish(req)
                world.check()
            else:
                world.live.remove(req)
        assert not world.compressor.records
        world.settle()
        world.tree.evict(EvictParams(num_tokens=1 << 20))
        world.check()
        assert world.allocator.available_size() == world.allocator.size


class SchedulerWithoutTree(Scheduler):
    disable = True


class Conversations(Scheduler):
    """Every turn may bring a picture, and all turns are bounded."""

    @initialize(size=st.sampled_from([60, 100]))
    def start(self, size: int) -> None:
        super().start(size)
        config = self.world.compressor.config
        self.world.compressor.config = dataclasses.replace(
            config, reuse="compressed", session_columns=6
        )


class SchedulerUnderPressure(Scheduler):
    when = "pressure"


class SchedulerUnderPressureWithoutTree(SchedulerUnderPressure):
    disable = True


class Pages(Scheduler):
    page = 4


class PagesWithoutTree(SchedulerWithoutTree):
    page = 4


class PagesUnderPressure(SchedulerUnderPressure):
    page = 4


class PagesUnderPressureWithoutTree(SchedulerUnderPressureWithoutTree):
    page = 4


@pytest.mark.parametrize(
    "machine",
    [
        *(Scheduler, SchedulerWithoutTree),
        *(SchedulerUnderPressure, SchedulerUnderPressureWithoutTree, Conversations),
        *(Pages, PagesWithoutTree, PagesUnderPressure, PagesUnderPressureWithoutTree),
    ],
)
def test_slots_are_conserved_in_any_order(machine: type[Scheduler]) -> None:
    run_machine(machine)
