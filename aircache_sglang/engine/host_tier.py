# SPDX-License-Identifier: Apache-2.0
"""The radix cache with a second tier in host memory (SGLang's HiCache).

Decides which nodes are copied to host memory, brought back, and dropped there; SGLang's own
HiCacheController and host pool copy (managers/cache_controller.py, mem_cache/pool_host). Exact KV
alone goes there: what is compressed, or was computed beside compressed KV, never does. A node whose
slots are evicted keeps its place while it has a copy. A match ends where full KV does, and says how
much more of the path is in host memory; admission then asks to have it back (schedule_policy.py,
PrefillAdder.add_one_req). What the copies wait for, and what waits for them, is the controller's.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import threading
from typing import Any

import torch
from sglang.srt.disaggregation.kv_events import StorageMedium
from sglang.srt.managers.cache_controller import HiCacheController
from sglang.srt.mem_cache.base_prefix_cache import InitLoadBackParams, MatchResult, TreeLock
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import evict_from_tree_cache
from sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler import build_kv_host_pool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.runtime_context import get_memory

from aircache_sglang.engine.radix_cache import AirCacheRadixCache, Requests
from aircache_sglang.engine.tree import Node, Observer

WRITE_BACK = "write_back"
# Requests that must have published a node before it is copied (unified_radix_cache.py,
# init_hicache); with write_back it is copied when it is evicted.
_WRITE_AFTER = {"write_through": 1, "write_through_selective": 2}


@dataclasses.dataclass(frozen=True, slots=True)
class Transfer:
    """A copy that may not be done: its nodes, of one path, and the lock that keeps their slots."""

    nodes: list[Node]
    lock: TreeLock


def make_controller(params: CacheInitParams) -> HiCacheController:
    """SGLang's controller over a host pool, as its published HiCache settings size and lay it."""
    memory, page_size = get_memory(), params.page_size
    allocator = params.token_to_kv_pool_allocator
    return HiCacheController(
        allocator,
        build_kv_host_pool(kv_pool=allocator.get_kvcache(), page_size=page_size, use_mla=False),
        page_size,
        params.tp_cache_group,
        load_cache_event=threading.Event(),
        write_policy=memory.hicache_write_policy,
        io_backend=memory.hicache_io_backend,
    )


class TieredRadixCache(AirCacheRadixCache):
    """The tree of a server with `--enable-hierarchical-cache`.

    A node is in one transfer at a time. While it is, its slots are locked, and its copy is not
    dropped. The ranks of a tensor-parallel server copy, drop and acknowledge alike: they are told
    the same in the same order, and agree on how many copies are done.
    """

    # What SGLang's scheduler reads off a tree with a host tier.
    enable_storage = False
    cache_controller: HiCacheController

    def __init__(
        self,
        params: CacheInitParams,
        requests: Requests,
        text_share: float,
        observer: Observer,
        controller: HiCacheController,
    ) -> None:
        self.cache_controller = controller
        self.token_to_kv_pool_host = controller.mem_pool_host
        self.ongoing_write_through: dict[int, Transfer] = {}
        self.ongoing_load_back: dict[int, Transfer] = {}
        # Nodes with a copy, in the order in which they got it.
        self.backed: dict[Node, None] = {}
        self._group = params.tp_cache_group
        self._numbers = itertools.count()
        self._writes_back = controller.write_policy == WRITE_BACK
        super().__init__(params, requests, text_share, observer)

    def reset(self) -> None:
        super().reset()
        self.ongoing_write_through.clear()
        self.ongoing_load_back.clear()
        self.backed.clear()
        self.cache_controller.reset()
        self.token_to_kv_pool_host.clear()

    # Matching

    def _match(self, key: RadixKey) -> MatchResult:
        """Full KV, and behind it what host memory holds, with the full KV in between."""
        found = super()._match(key)
        first = found.last_device_node
        last, _ = self._follow(first, key, found.device_prefix_len, host=True)
        lost = sum(len(node.key) for node in self._path(last, first) if node.is_tombstone)
        return found._replace(last_host_node=last, best_match_node=last, host_hit_length=lost)

    @staticmethod
    def _path(node: Node, above: Node) -> list[Node]:
        """The nodes from below `above` to `node`."""
        path = []
        while node is not above:
            path.append(node)
            node = node.parent
        return path[::-1]

    # Copying to host memory

    def _published(self, nodes: list[Node]) -> None:
        if self._writes_back:
            return
        enough = _WRITE_AFTER[self.cache_controller.write_policy]
        new = [node for node in nodes if self._may_be_copied(node) and node.hit_count >= enough]
        if new:
            number = self._copy(new)
            if number is not None:
                self.ongoing_write_through[number] = Transfer(new, self.lock(new[-1]))

    @staticmethod
    def _may_be_copied(node: Node) -> bool:
        return not node.is_lossy and node.host_value is None

    def _copy(self, nodes: list[Node]) -> int | None:
        """Begin to copy nodes with slots to host memory; the transfer, None without room."""
        slots = torch.cat([node.value for node in nodes])
        if not self._make_host_room(len(slots)):
            return None
        number = next(self._numbers)
        places = self.cache_controller.write(slots, node_id=number)
        assert places is not None, "host memory has just been made"
        for node, part in zip(nodes, places.split([node.size for node in nodes]), strict=True):
            node.host_value, node.transfer = part.clone(), number
            self.backed[node] = None
        return number

    def _evict_node(self, node: Node) -> Node:
        if self._writes_back and self._may_be_copied(node) and self._copy([node]) is not None:
            # Its slots are somebody else's next.
            for ack in self._acknowledged(self.cache_controller.ack_write_queue, None):
                self._count_write(ack)
            self._copied(node)
        return super()._evict_node(node)

    def _copied(self, node: Node) -> None:
        node.transfer = None
        self.kv_events.record_store(node, medium=StorageMedium.CPU)

    # Dropping copies

    def _make_host_room(self, need: int) -> bool:
        """Drop copies until `need` slots of host memory are free; whether they are.

        With write_back those of nodes that have slots go first, since they would be copied again;
        else last. Then by SGLang's strategy, and what is deepest of a path.
        """
        pool = self.token_to_kv_pool_host
        if need > pool.logical_size:
            return False
        if need <= pool.available_size():
            return True
        heap = [
            (
                node.is_tombstone == self._writes_back,
                self.eviction_strategy.get_priority(node),
                *(-node.end, node.id, node),
            )
            for node in self.backed
            if node.transfer is None
        ]
        heapq.heapify(heap)
        while heap and need > pool.available_size():
            self._drop_copy(heapq.heappop(heap)[-1])
        return bool(need <= pool.available_size())

    def _drop_copy(self, node: Node) -> None:
        self.kv_events.record_remove(node, medium=StorageMedium.CPU)
        self.cache_controller.evict_host(node.host_value)
        node.host_value = None
        del self.backed[node]
        if node.is_tombstone:
            self._prune(node)

    def _split_node(self, key: RadixKey, child: Node, split_len: int) -> Node:
        upper = super()._split_node(key, child, split_len)
        if child.host_value is not None:
            places = child.host_value
            upper.host_value = places[:split_len].clone()
            child.host_value = places[split_len:].clone()
            self.backed[upper] = None
        if child.transfer is not None:
            upper.transfer = child.transfer
            ongoing = self.ongoing_write_through.get(child.transfer)
            (ongoing or self.ongoing_load_back[child.transfer]).nodes.append(upper)
        return upper

    # Bringing back

    def init_load_back(self, params: InitLoadBackParams) -> tuple[int, Node]:
        """Begin to load what a match found in host memory: how far the prefix grows, to which node.

        All of it or nothing: (0, the node it ended at) where the slots cannot be had.
        """
        first, last = params.req.last_node, params.best_match_node
        path = self._path(last, first)
        lost = [node for node in path if node.is_tombstone]
        number = next(self._numbers)
        # Eviction must neither take the slots in between nor, with write_back, the copies.
        locked = [node for node in path if not node.is_tombstone]
        for node in locked:
            self._change_lock(node, 1)
        for node in lost:
            node.transfer = number
        # Later, packing would find no room for its columns.
        self.requests.make_room_for_load(self, params.req)
        need = sum(len(node.key) for node in lost)
        evict_from_tree_cache(self, need)
        copies = [node.host_value for node in lost if node.host_value is not None]
        assert len(copies) == len(lost), "a match runs through copies"
        slots = self.cache_controller.load(torch.cat(copies), node_id=number)
        for node in locked:
            self._change_lock(node, -1)
        if slots is None:
            for node in lost:
                node.transfer = None
            return 0, first
        for node, part in zip(lost, slots.split([len(node.key) for node in lost]), strict=True):
            self._refill(node, part)
        self.ongoing_load_back[number] = Transfer(lost, self.lock(last))
        return sum(len(node.key) for node in path), last

    def ready_to_load_host_cache(self) -> int:
        """Begin what was asked for; which of the controller's events the next forward waits for."""
        self.requests.loading()
        return int(self.cache_controller.start_loading())

    # What is done

    def check_hicache_events(self) -> None:
        """Unlock what has been copied; the scheduler asks before each batch."""
        queues = self.cache_controller.ack_write_queue, self.cache_controller.ack_load_queue
        n_written, n_loaded = self._agreed([_count_done(queue) for queue in queues])
        for ack in self._acknowledged(queues[0], n_written):
            self._count_write(ack)
            for number in ack.node_ids:
                transfer = self.ongoing_write_through.pop(number)
                for node in transfer.nodes:
                    self._copied(node)
                self.unlock(transfer.lock)
        for ack in self._acknowledged(queues[1], n_loaded):
            self._count_load(ack)
            for number in ack.node_ids:
                transfer = self.ongoing_load_back.pop(number)
                for node in transfer.nodes:
                    node.transfer = None
                self.unlock(transfer.lock)
        if n_written or n_loaded:
            self.requests.unlocked()

    def _agreed(self, counts: list[int]) -> list[int]:
        """The least counts of all tensor-parallel ranks."""
        if self._group is None or torch.distributed.get_world_size(group=self._group) == 1:
            return counts
        least = torch.tensor(counts, dtype=torch.int64)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group=self._group)
        return [int(count) for count in least]

    @staticmethod
    def _acknowledged(queue: list[Any], n: int | None) -> list[Any]:
        """Take the first `n` of a queue, None for all, each once it is done."""
        done = queue[:n]
        del queue[:n]
        for ack in done:
            ack.finish_event.synchronize()
        return done

    def _count_write(self, ack: Any) -> None:
        if self.metrics_collector is not None:
            for pool, tokens in ack.num_tokens_by_pool.items():
                self.metrics_collector.increment_backup_num_tokens(num_tokens=tokens, pool=pool)
            self.metrics_collector.increment_backup_num_bytes(ack.num_bytes)
            if ack.timing_enabled:
                self.metrics_collector.observe_backup_duration(_seconds(ack))

    def _count_load(self, ack: Any) -> None:
        if self.metrics_collector is not None:
            for pool, tokens in ack.num_tokens_by_pool.items():
                self.metrics_collector.increment_load_back_num_tokens(num_tokens=tokens, pool=pool)
            self.metrics_collector.increment_load_back_num_bytes(ack.num_bytes)
            if ack.timing_enabled:
                self.metrics_collector.observe_load_back_duration(_seconds(ack))

    # The rest of what SGLang asks of such a tree

    def describe(self, limit: int = 1000) -> dict[str, Any]:
        pool = self.token_to_kv_pool_host
        host = {"host_size": pool.logical_size, "host_free": pool.available_size()}
        dump = super().describe(limit)
        return dump | {"pool": dump["pool"] | host}

    def clear_storage_backend(self) -> bool:
        """There is none."""
        return False

    def release_host_resources(self) -> None:
        self.token_to_kv_pool_host.destroy()


def _count_done(queue: list[Any]) -> int:
    return len(list(itertools.takewhile(lambda ack: ack.finish_event.query(), queue)))


def _seconds(ack: Any) -> float:
    return float(ack.start_event.elapsed_time(ack.finish_event)) / 1000
