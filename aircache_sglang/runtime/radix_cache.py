# SPDX-License-Identifier: Apache-2.0
"""The radix cache of a compressing server, stage 1: shared text stays, visual spans go first.

Exact KV alone enters the tree. A compressed request publishes the head of its prompt, which it
holds locked, and below it the visual span as an unlocked leaf: full KV, a hit for the next question
on the same picture while memory lasts, and the first to be evicted. The instruction stays private,
as its queries are needed anew each time, and so does what is generated, which is not exact.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
from sglang.srt.managers.schedule_batch import MM_PAD_SHIFT_VALUE
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams, MatchResult
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey, TreeNode

from aircache_sglang.runtime.record import CompressionRecord, Intent, Stage

BACKEND_NAME = "aircache"
VISUAL, TEXT = 0, 1


class Requests(Protocol):
    """What the tree asks about requests (runtime/engine.py)."""

    records: dict[int, CompressionRecord]

    def intent(self, req: Any) -> Intent | None:
        """How the request will be, or was, compressed; None for the others."""

    def released(self, req: Any, record: CompressionRecord) -> None:
        """The visual slots of a compressed request have been given back."""

    def forget(self, req: Any) -> CompressionRecord | None:
        """Drop the state of a request whose row is being freed."""


class VisualFirst:
    """Eviction order: visual nodes before text, and SGLang's own strategy within each kind."""

    def __init__(self, strategy: Any) -> None:
        self._strategy = strategy

    def get_priority(self, node: TreeNode) -> tuple[int, Any]:
        return node_kind(node), self._strategy.get_priority(node)


def node_kind(node: TreeNode) -> int:
    """VISUAL if a token of the node is a multimodal placeholder; kept on the node once known."""
    kind: int | None = getattr(node, "aircache_kind", None)
    if kind is None:
        ids = node.key.raw_token_ids()
        kind = VISUAL if len(ids) and max(ids) >= MM_PAD_SHIFT_VALUE else TEXT
        node.aircache_kind = kind
    return kind


class AirCacheRadixCache(RadixCache):
    """SGLang's Python radix cache (mem_cache/radix_cache.py) that knows compressed requests."""

    def __init__(self, params: CacheInitParams, requests: Requests) -> None:
        super().__init__(params)
        self.requests = requests
        self.eviction_strategy: Any = VisualFirst(self.eviction_strategy)

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """Stop a hit before the instruction of a request that is to be compressed.

        A matched token is not computed again, so its query would be lost; the instruction is scored
        anew in every request.
        """
        intent = self.requests.intent(params.req) if params.req is not None else None
        if intent is not None and len(params.key) > intent.prompt.end:
            key = RadixKey(
                params.key.token_ids,
                params.key.extra_key,
                is_bigram=params.key.is_bigram,
                limit=intent.prompt.end,
                cache_salt=params.key.cache_salt,
            )
            params = dataclasses.replace(params, key=key)
        return super().match_prefix(params)

    def checkpoint(self, req: Any, *, up_to: int) -> None:
        """Publish what may be shared of a running or finished request."""
        record = self.requests.records.get(req.kv.req_pool_idx)
        if record is not None:
            if record.stage is Stage.PREFILLED:
                self._release_visual(req, record)
            return
        intent = self.requests.intent(req)
        if intent is None:
            super().checkpoint(req, up_to=up_to)
            return
        # A chunk of a prefill that will be compressed: the instruction never enters the tree.
        end = min(up_to, intent.prompt.end)
        super().checkpoint(req, up_to=end)
        if not self.disable:
            self._split_at(req, min(end, intent.prompt.start))

    def _split_at(self, req: Any, length: int) -> None:
        """Put a node boundary at `length` tokens of a published prompt."""
        if length:
            key = self._key(req, length)
            values = torch.empty(length, dtype=torch.int64, device=self.device)
            self.insert(InsertParams(key=key, value=values, inserted_len=length))

    def _key(self, req: Any, length: int) -> RadixKey:
        ids = req.full_untruncated_fill_ids[:length]
        return RadixKey(ids, req.extra_key, cache_salt=req.cache_salt)

    def _release_visual(self, req: Any, record: CompressionRecord) -> None:
        """Give the visual slots back: to the tree as an unlocked leaf, or else to the pool."""
        prompt, kv = record.intent.prompt, req.kv
        if self.disable:
            self.token_to_kv_pool_allocator.free(record.originals[prompt.start :])
        else:
            protected = kv.cache_protected_len
            result = self.insert(
                InsertParams(
                    key=self._key(req, prompt.end),
                    value=record.originals,
                    inserted_len=kv.cache_inserted_len,
                    priority=req.priority or 0,
                )
            )
            kv.cache_inserted_len = max(kv.cache_inserted_len, prompt.end)
            # Another request published the same tokens first: its slots stay, ours are spare.
            self.token_to_kv_pool_allocator.free(record.originals[protected : result.prefix_len])
            self._split_at(req, prompt.start)
            head = self.root_node
            if prompt.start:
                match = super().match_prefix(MatchPrefixParams(key=self._key(req, prompt.start)))
                head = match.last_device_node
                assert match.device_prefix_len == prompt.start, "the head was just inserted"
            if protected < prompt.start:
                self.req_to_token_pool.write(
                    (kv.req_pool_idx, slice(protected, prompt.start)),
                    self.path_device_indices(head)[protected:],
                )
            kv.cache_protected_len = prompt.start
            lock = self.lock(head)
            self.unlock(req.lock)
            req.lock, req.last_node = lock, head
        record.stage = Stage.RELEASED
        self.requests.released(req, record)

    def free_kv_row(self, kv: Any, ranges: list[tuple[int, int]]) -> None:
        """Free row ranges, without what the compression has already given back."""
        record = self.requests.records.get(kv.req_pool_idx)
        if record is None:
            super().free_kv_row(kv, ranges)
            return
        prompt = record.intent.prompt
        row = self.req_to_token_pool.req_to_token[kv.req_pool_idx]
        # Below `own_end` the request still owns its original slots; the row there is rewritten.
        own_end = prompt.start if record.stage is Stage.RELEASED else prompt.end
        for start, end in ranges:
            self.token_to_kv_pool_allocator.free(record.originals[start : min(end, own_end)])
            self.token_to_kv_pool_allocator.free(row[max(start, prompt.end) : end])

    def on_release(self, req: Any, *, checkpointed: bool) -> None:
        super().on_release(req, checkpointed=checkpointed)
        record = self.requests.forget(req)
        if record is not None:
            self.token_to_kv_pool_allocator.free(record.extra)

    def _split_node(self, key: RadixKey, child: TreeNode, split_len: int) -> TreeNode:
        upper: TreeNode = super()._split_node(key, child, split_len)
        child.aircache_kind = None
        return upper
