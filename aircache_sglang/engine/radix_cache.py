# SPDX-License-Identifier: Apache-2.0
"""The radix cache of a compressing server: what requests publish, hold and extend.

Exact KV is shared as in stock SGLang. A compressed request publishes its whole prompt, computed
beside the full picture, and from then on holds the text of it alone. What it generates is not
exact and stays private. With compressed sharing it publishes its prompt up to the last picture, and
hands its columns and its instruction to the tree as a replica, which it holds; what it generates
goes below the replica when it is finished, and the next turn extends both.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams, MatchResult
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from aircache_sglang.engine.request import bare_spans_of
from aircache_sglang.engine.tree import Node, Observer, Published, SpanTree, limited_key
from aircache_sglang.runtime.decide import Intent
from aircache_sglang.runtime.pages import page_floor, without
from aircache_sglang.runtime.record import CompressionRecord, Stage
from aircache_sglang.runtime.table import gap_end

BACKEND_NAME = "aircache"


class Requests(Protocol):
    """What the tree asks about requests (engine/compressor.py)."""

    records: dict[int, CompressionRecord]
    # Slots by row that were reserved and turned out not to be needed.
    surplus: dict[int, torch.Tensor]

    def intent(self, req: Any) -> Intent | None:
        """How the request will be, or was, compressed; None for the others."""

    def released(self, req: Any, record: CompressionRecord) -> None:
        """The visual slots of a compressed request have been given back."""

    def is_chained(self, req: Any) -> bool:
        """Whether a request brings pictures behind the replica that it extends."""

    def keeps_whole(self, req: Any) -> bool:
        """Whether a request was not packed when its prefill ended, and has not been since."""

    def prefilled(self, req: Any) -> None:
        """The result of a prefill, or of one of its chunks, has been processed."""

    def make_room_for_load(self, tree: SpanTree, req: Any) -> None:
        """A request that is being admitted has slots loaded from host memory."""

    def loading(self) -> None:
        """From now on loads write into slots that were free."""

    def unlocked(self) -> None:
        """Slots of the tree that a copy to or from host memory held may be evicted again."""

    def forget(self, req: Any) -> CompressionRecord | None:
        """Drop the state of a request whose row is being freed."""


class AirCacheRadixCache(SpanTree):
    """The tree, as SGLang's scheduler uses it."""

    def __init__(
        self, params: CacheInitParams, requests: Requests, text_share: float, observer: Observer
    ) -> None:
        super().__init__(params, text_share, observer)
        self.requests = requests

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """Extend a replica if there is one, or else run through full KV up to the instruction."""
        if params.req is None or self.disable:
            return super().match_prefix(params)
        key, intent = self._padded(params.req, params.key), self.requests.intent(params.req)
        if intent is None:
            return super().match_prefix(MatchPrefixParams(key=key))
        prompt, limited = intent.prompt, limited_key(key, intent.match_limit)
        if intent.reuses:
            found = self.match_packed(
                key,
                intent.replica_start,
                intent.config.variant(),
                prompt.end,
                with_selection=intent.config.return_selection,
            )
            if found is None and intent.config.session_columns is not None:
                # The turn before, behind which this one brings further pictures.
                found = self.match_packed(
                    limited,
                    intent.replica_start,
                    intent.config.variant(),
                    prompt.spans[0][1],
                    with_selection=intent.config.return_selection,
                )
            if found is not None:
                return found
        return super().match_prefix(MatchPrefixParams(key=limited))

    def checkpoint(self, req: Any, *, up_to: int) -> None:
        """Publish what may be shared of a running or finished request."""
        # A mixed step may have counted a token that is not known yet (ScheduleBatch,
        # mix_with_running).
        up_to = min(up_to, len(req.full_untruncated_fill_ids))
        self._free_surplus(req)
        record = self.requests.records.get(req.kv.req_pool_idx)
        if record is not None and record.stage is Stage.PREFILLED:
            if self.disable:
                self._free_visual(record)
            elif self.requests.is_chained(req):
                self._publish_chain(req, record)
            elif record.intent.reuses:
                self._publish_replica(req, record)
            else:
                self._publish_prompt(req, record)
            self.requests.released(req, record)
        if self.disable:
            self.requests.prefilled(req)
            return
        replica = req.last_node.replica
        if replica is not None:
            intent = self.requests.intent(req)
            if intent is not None and self.requests.is_chained(req):
                # The instruction will be the next replica's.
                up_to = min(up_to, intent.published)
            if record is None or not record.exact_tail:
                self._publish(req, up_to, below=replica)
        elif record is None:
            intent = self.requests.intent(req)
            exact = self.requests.keeps_whole(req) and req.finished()
            if intent is not None and not exact:
                # A chunk of a prefill that will be compressed, or what may be packed later.
                up_to = min(up_to, intent.published)
            self._publish(req, up_to)
        self.requests.prefilled(req)

    def chunk_end(self, req: Any) -> int | None:
        """Where a prefill ends a chunk for the tree's sake: with KV alone nowhere."""
        return None

    def give_up_picture(self, req: Any, record: CompressionRecord) -> None:
        """A request that had its picture whole is packed: its slots are free, or yield."""
        if self.disable:
            self._free_visual(record)
        elif record.intent.reuses:
            self._publish_replica(req, record)
        else:
            record.release()
            self._hold(req, req.last_node, req.kv.cache_protected_len, text_only=True)

    def _free_surplus(self, req: Any) -> None:
        surplus = self.requests.surplus.pop(req.kv.req_pool_idx, None)
        if surplus is not None:
            self.token_to_kv_pool_allocator.free_segment(surplus, start_pos=0)

    def _publish(self, req: Any, up_to: int, below: Node | None = None) -> None:
        """Insert the whole pages of [0, up_to) of a request's row, point the row at the tree's
        slots and hold them."""
        kv, up_to = req.kv, page_floor(up_to, self.page_size)
        row = self.req_to_token_pool.req_to_token[kv.req_pool_idx]
        node = self._insert(req, row[:up_to].to(torch.int64, copy=True), below).node
        self._repoint(kv, self.path_device_indices(node), [(kv.cache_protected_len, up_to)])
        self._hold(req, node, up_to, text_only=False)

    def _insert(self, req: Any, slots: torch.Tensor, below: Node | None = None) -> Published:
        """Publish the first tokens of a request in `slots`, whole pages, and free those that were
        duplicates."""
        length = len(slots)
        done = self.publish(
            self._key(req, length),
            slots,
            prompt_len=len(req.origin_input_ids),
            priority=req.priority or 0,
            inserted_len=req.kv.cache_inserted_len,
            below=below,
        )
        req.kv.cache_inserted_len = max(req.kv.cache_inserted_len, length)
        for start, end in done.duplicates:
            start = max(start, req.kv.cache_protected_len)
            self.token_to_kv_pool_allocator.free_segment(slots[start:end], start_pos=start)
        return done

    def _publish_prompt(self, req: Any, record: CompressionRecord) -> None:
        """Give the exact prompt to the tree and hold its text; the picture may yield.

        Of a unified prompt nothing is held: all that the request reads of it is in its columns.
        """
        kv, prompt, published = req.kv, record.intent.prompt, record.intent.published
        slots = self._prompt_slots(req, record, prompt.length)
        node = self._insert(req, slots[:published]).node
        path = torch.cat([self.path_device_indices(node), slots[published:]])
        start = min(kv.cache_protected_len, prompt.start)
        self._repoint(kv, path, [(start, prompt.start)])
        # Behind the gap stand the text between pictures, in order, and the instruction.
        behind = torch.cat([prompt.between_of(path), path[prompt.end :]]).to(torch.int32)
        self.req_to_token_pool.write(
            (kv.req_pool_idx, slice(gap_end(prompt), prompt.length)), behind
        )
        record.release()
        held = self.root_node if prompt.is_unified else node
        self._hold(req, held, published, text_only=True)

    def _publish_replica(self, req: Any, record: CompressionRecord) -> None:
        """Give the exact prompt up to the instruction to the tree, and columns and instruction.

        If there is such a replica already, or the instruction ends before the page in which it
        begins does, ours stays private.
        """
        kv, first = req.kv, record.intent.replica_start
        exact = self._insert(req, record.originals[: record.intent.published]).node
        head, length = self._follow(self.root_node, self._key(req, first), 0)
        assert length == first, "the head was just inserted"
        start = min(kv.cache_protected_len, first)
        self._repoint(kv, self.path_device_indices(head), [(start, first)])
        node = self._add_replica(req, record, head)
        if node is not None:
            self.mark_spare(exact, node)

    def _publish_chain(self, req: Any, record: CompressionRecord) -> None:
        """Give the tree the columns, texts and instruction of a conversation with new pictures.

        Nothing of them is exact: they were computed beside the older pictures' columns, and are
        given back but for what an earlier chunk has published below the older replica.
        """
        replica = req.last_node.replica
        self.token_to_kv_pool_allocator.free(record.originals[req.kv.cache_protected_len :])
        self._add_replica(req, record, replica.parent)

    def _add_replica(self, req: Any, record: CompressionRecord, head: Node) -> Node | None:
        """Hang what a request has packed below `head`, and hold it there; None if it is there, or
        cannot be."""
        intent, node = record.intent, None
        start, end = intent.replica_start, intent.replica_end
        if end >= intent.prompt.end:
            slots = self._prompt_slots(req, record, end)
            rest = self._key(req, intent.prompt.length).token_ids[end:]
            text = slots[page_floor(intent.prompt.end, self.page_size) :]
            replica = record.replica(text, tuple(rest))
            node = self.add_packed(head, self._key(req, end), start, replica)
        if node is None:
            record.release(freed=intent.n_given_up)
            self._hold(req, head, start, text_only=False)
        else:
            record.release(shared=True)
            self._hold(req, node, end, text_only=False)
        return node

    def _free_visual(self, record: CompressionRecord) -> None:
        """Without a tree: give the visual slots back, and all that was copied."""
        self._free_positions(record.originals, 0, record.intent.given_up)
        record.release(freed=record.intent.n_given_up)

    def _free_positions(
        self, slots: torch.Tensor, first: int, ranges: Iterable[tuple[int, int]]
    ) -> None:
        """Free ascending ranges of positions, each from a page boundary on; slots: from `first`."""
        self.token_to_kv_pool_allocator.free_segments(
            [(slots[start - first : end - first], start) for start, end in ranges]
        )

    def _prompt_slots(self, req: Any, record: CompressionRecord, length: int) -> torch.Tensor:
        """The slots of the first tokens of a packed request's prompt, int64 [length]."""
        row = self.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
        tail = row[record.intent.prompt.end : length].to(torch.int64)
        return torch.cat([record.originals, tail])

    def _key(self, req: Any, length: int) -> RadixKey:
        ids = req.full_untruncated_fill_ids[:length]
        return self._padded(req, RadixKey(ids, req.extra_key, cache_salt=req.cache_salt))

    def _padded(self, req: Any, key: RadixKey) -> RadixKey:
        """A key in which the tokens of every picture are its own."""
        spans = bare_spans_of(req)
        if not spans:
            return key
        ids = key.token_ids[:]
        for start, placeholders in spans:
            if start < len(ids):
                end = min(start + len(placeholders), len(ids))
                ids[start:end] = array("q", placeholders[: end - start])
        return RadixKey(
            ids,
            key.extra_key,
            is_bigram=key.is_bigram,
            limit=key.limit,
            cache_salt=key.cache_salt,
        )

    def _repoint(self, kv: Any, path: torch.Tensor, ranges: list[tuple[int, int]]) -> None:
        for start, end in ranges:
            if start < end:
                self.req_to_token_pool.write(
                    (kv.req_pool_idx, slice(start, end)), path[start:end].to(torch.int32)
                )

    def _hold(self, req: Any, node: Node, length: int, *, text_only: bool) -> None:
        """Exchange the request's lock for one on `node`; the tree owns [0, length) of its row."""
        lock = self.lock_text(node) if text_only else self.lock(node)
        self.unlock(req.lock)
        req.lock, req.last_node = lock, node
        req.kv.cache_protected_len = length

    def free_kv_row(self, kv: Any, ranges: list[tuple[int, int]]) -> None:
        """Free row ranges, without what the compression has already given back."""
        record = self.requests.records.get(kv.req_pool_idx)
        if record is None:
            super().free_kv_row(kv, ranges)
            return
        row = self.req_to_token_pool.req_to_token[kv.req_pool_idx]
        gone = record.intent.given_up if record.stage is Stage.RELEASED else ()
        for start, end in ranges:
            # The row is rewritten up to the end of the prompt's pictures.
            slots = record.originals[start:end]
            slots = torch.cat([slots, row[start + len(slots) : end].to(torch.int64)])
            self._free_positions(slots, start, without(start, end, gone))

    def on_release(self, req: Any, *, checkpointed: bool) -> None:
        super().on_release(req, checkpointed=checkpointed)
        self._free_surplus(req)
        record = self.requests.forget(req)
        if record is not None and not record.shared:
            self.token_to_kv_pool_allocator.free_segment(record.extra, start_pos=0)
