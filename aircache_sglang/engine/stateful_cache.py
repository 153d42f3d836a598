# SPDX-License-Identifier: Apache-2.0
"""The radix cache of a hybrid model, whose recurrent layers go on from a state and not from KV.

A node may know the state after exactly the tokens up to its end, in a slot of SGLang's state pool
(mem_cache/memory_pool.py, MambaPool). A match ends at such a node, and the request goes on from a
copy. SGLang's own is a component of its unified tree (mem_cache/unified_cache/components/mamba.py),
of which this follows the strategy `no_buffer`: the only state of a request is the one where its
forwards have ended, so that a prefill ends a chunk where a state will be wanted.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    EvictResult,
    MatchPrefixParams,
    MatchResult,
    TreeLock,
)
from sglang.srt.mem_cache.radix_cache import RadixKey

from aircache_sglang.engine.radix_cache import AirCacheRadixCache
from aircache_sglang.engine.request import state_of
from aircache_sglang.engine.tree import Node

# Tokens of full KV without a state that are worth a forward of their own, the second time.
BRANCH = 64


class StateLock(TreeLock):
    """A lock that holds the state at its node's end too."""


class StatefulCache(AirCacheRadixCache):
    """Our tree, with states, each on a path that has all its slots.

    States go when they were not used for the longest time, and with the KV at or above their
    node's end. One that is being copied is locked: from the match to the end of the first chunk.
    """

    def reset(self) -> None:
        super().reset()
        # The nodes that have a state, the least recently used first.
        self._stated: OrderedDict[Node, None] = OrderedDict()
        self._n_locked_states = 0

    def supports_mamba(self) -> bool:
        """Whether models with recurrent states may be served (mem_cache/registry.py)."""
        return True

    def full_evictable_size(self) -> int:
        """Slots of KV, as against states (managers/scheduler_components/pool_stats_observer.py)."""
        return self.evictable_size_

    def full_protected_size(self) -> int:
        return self.protected_size_

    def mamba_evictable_size(self) -> int:
        """States that the tree could give up."""
        return len(self._stated) - self._n_locked_states

    def mamba_protected_size(self) -> int:
        """States that are being copied."""
        return self._n_locked_states

    def all_mamba_values_flatten(self) -> torch.Tensor:
        """Slots of the states in the tree, int64 [n]."""
        states = [node.state for node in self._stated if node.state is not None]
        return torch.cat(states) if states else self._empty_device_indices

    # Matching

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """Full KV up to a state; with `cow_mamba` the request gets a copy of that, once its batch
        runs (model_executor/model_runner.py)."""
        self._reach = 0
        found = super().match_prefix(params)
        if params.req is None or not params.cow_mamba or self.disable:
            return found
        state_of(params.req).branch = self._reach
        return self._start_from(found, params.req.kv)

    def _match(self, key: RadixKey) -> MatchResult:
        node, self._reach = self._follow(self.root_node, key, 0)
        while node is not self.root_node and node.state is None:
            node = node.parent
        if node.state is not None:
            self._stated.move_to_end(node)
        return self._found(node, node.end)

    def _start_from(self, found: MatchResult, kv: Any) -> MatchResult:
        node = found.last_device_node
        kv.mamba_cow_src_index = node.state
        if node.state is None:
            # A session's request keeps its slot where it was matched before, and not admitted.
            kv.mamba_needs_clear = kv.holds_mamba
            return found
        if not kv.holds_mamba:
            lock = self.lock(node)
            slot = self._alloc_state()
            self.unlock(lock)
            if slot is None:
                kv.mamba_cow_src_index = None
                return self._empty_match_result
            kv.mamba_pool_idx = slot[0]
        kv.mamba_needs_clear = False
        return found

    def chunk_end(self, req: Any) -> int | None:
        """Where a prefill that goes on from `prefix_len` ends a chunk, for a state to stand there.

        That is where full KV went on when the request was matched, and where the last picture ends,
        as the next question on it begins there, or where queries are wanted before.
        """
        if self.disable or req.skip_radix_cache_insert:
            return None
        ends = []
        branch = state_of(req).branch
        if branch >= req.prefix_len + BRANCH:
            ends.append(branch)
        intent = self.requests.intent(req)
        if intent is not None:
            ends.append(min(intent.prompt.end, intent.match_limit))
        return min((end for end in ends if end > req.prefix_len), default=None)

    # Publishing

    def checkpoint(self, req: Any, *, up_to: int) -> None:
        """Publish KV, and the state where a request stands if its KV is published up to there."""
        super().checkpoint(req, up_to=up_to)
        node = req.last_node
        if self.disable or not up_to == req.kv.kv_committed_len == node.end or up_to == 0:
            return
        if node.state is not None:
            self._stated.move_to_end(node)
        elif not req.finished():
            if req.decode_batch_idx:
                # A step of its answer in the batch of a prefill, as the next one will be.
                return
            # What follows is computed in the request's own.
            self._give(node, self._copy(req.kv.mamba_pool_idx.unsqueeze(0)))
        else:
            self._give(node, req.kv.mamba_pool_idx.unsqueeze(0).clone())
            req.kv.mamba_pool_idx = None

    def on_release(self, req: Any, *, checkpointed: bool) -> None:
        super().on_release(req, checkpointed=checkpointed)
        if req.kv.holds_mamba:
            self.req_to_token_pool.free_mamba_cache(req)

    def _copy(self, source: torch.Tensor) -> torch.Tensor | None:
        slot = self._alloc_state()
        if slot is not None:
            pool = self.req_to_token_pool
            pool.mamba_pool.copy_from(
                pool.translate_mamba_indices(source), pool.translate_mamba_indices(slot)
            )
        return slot

    def _alloc_state(self) -> torch.Tensor | None:
        """int64 [1], a slot of the pool; None if all states are locked or with requests."""
        allocator = self.req_to_token_pool.mamba_allocator
        slot = allocator.alloc(1)
        if slot is None:
            self.evict(EvictParams(num_tokens=0, mamba_num=1))
            slot = allocator.alloc(1)
        # A view would keep the allocator's whole list of free slots alive.
        return None if slot is None else slot.clone()

    def _give(self, node: Node, state: torch.Tensor | None) -> None:
        if state is not None:
            node.state = state
            self._stated[node] = None
            self._n_locked_states += bool(node.state_locks)

    # Locks

    def lock(self, node: Node) -> StateLock:
        """Hold the path to `node` and the state at its end, as a request does that will copy it."""
        self._lock_state(node, 1)
        held = super().lock(node)
        return StateLock(held.node, held.receipt)

    def unlock(self, lock: TreeLock | None) -> None:
        super().unlock(lock)
        if isinstance(lock, StateLock):
            self._lock_state(lock.node, -1)

    def _hold(self, req: Any, node: Node, length: int, *, text_only: bool) -> None:
        """What a request has computed itself goes on in its own state, and holds none."""
        super()._hold(req, node, length, text_only=text_only)
        if isinstance(req.lock, StateLock):
            self._lock_state(node, -1)
            req.lock = TreeLock(node, req.lock.receipt)

    def _lock_state(self, node: Node, step: int) -> None:
        before = bool(node.state_locks)
        node.state_locks += step
        assert node.state_locks >= 0, "released more often than locked"
        if node.state is not None:
            self._n_locked_states += bool(node.state_locks) - before

    # Evicting

    def evict(self, params: EvictParams) -> EvictResult:
        """As without states, and then at least `mamba_num` of them, if that many are unlocked."""
        before, n_tokens = len(self._stated), 0
        if params.num_tokens > 0:
            n_tokens = super().evict(params).num_tokens_evicted
        while before - len(self._stated) < params.mamba_num:
            node = next((node for node in self._stated if not node.state_locks), None)
            if node is None:
                break
            self._drop(node)
        return EvictResult(
            num_tokens_evicted=n_tokens, mamba_num_evicted=before - len(self._stated)
        )

    def _evict_node(self, node: Node) -> Node:
        """No match reaches a state at or below a tombstone."""
        below = [node]
        while below:
            last = below.pop()
            below.extend(last.children.values())
            if last.state is not None:
                self._drop(last)
        return super()._evict_node(node)

    def _drop(self, node: Node) -> None:
        assert node.state is not None and not node.state_locks, "a state that is being copied"
        self.req_to_token_pool.mamba_allocator.free(node.state)
        node.state = None
        del self._stated[node]

    # Reading

    def sanity_check(self) -> None:
        """Asked for while the scheduler is idle, with SGLANG_ENABLE_TREE_CACHE_SANITY_CHECK
        (managers/scheduler_components/invariant_checker.py)."""
        found, below = [], [self.root_node]
        while below:
            node = below.pop()
            # No match gets below a tombstone.
            below.extend(child for child in node.children.values() if not child.is_tombstone)
            if node.state is not None:
                found.append(node)
        assert set(found) == set(self._stated), "a state that no match reaches, or none knows"
        locked = sum(bool(node.state_locks) for node in found)
        assert locked == self._n_locked_states, "states that are locked were miscounted"

    def describe(self, limit: int = 1000) -> dict[str, Any]:
        """As without states, with how many there are."""
        dump = super().describe(limit)
        pool = self.req_to_token_pool
        dump["pool"] |= {
            "states_size": pool.mamba_pool.size,
            "states_free": pool.mamba_allocator.available_size(),
            "states": len(self._stated),
        }
        return dump
