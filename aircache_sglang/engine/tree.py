# SPDX-License-Identifier: Apache-2.0
"""A radix tree whose nodes know what they hold: text, visual KV, or a packed replica.

Inserts are cut where the kind of token changes, so that a node is of one kind, and stays so when it
is split. A visual node may be evicted from the middle of the tree: it becomes a tombstone, without
slots but with its children, until the next prefill of the same picture refills it. A match runs
through full KV and stops at a tombstone. Packed replicas hang below the text they follow under a
key of their own, out of reach of a match by tokens.

With pages of several tokens everything is cut at their boundaries: a page is visual if all its
tokens are, prompt if all of them are of a prompt, and text that shares a page with a picture keeps
that page.

Nothing here knows requests; that is radix_cache.py.
"""

from __future__ import annotations

import dataclasses
import enum
import heapq
import math
import sys
import time
from collections.abc import Hashable, Iterator
from typing import Any, Protocol

import torch
from sglang.srt.managers.schedule_batch import MM_PAD_SHIFT_VALUE
from sglang.srt.mem_cache.base_prefix_cache import (
    DecLockRefParams,
    DecLockRefResult,
    EvictParams,
    EvictResult,
    IncLockRefResult,
    InsertParams,
    InsertResult,
    MatchPrefixParams,
    MatchResult,
    TreeLock,
)
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey, TreeNode
from sglang.srt.mem_cache.utils import split_node_hash_value

from aircache_sglang.runtime.pages import page_floor
from aircache_sglang.runtime.record import Replica


class Kind(enum.Enum):
    """What a node holds.

    VISUAL: full KV of multimodal placeholders. PROMPT, GENERATED: text that some prompt held, or
    that only a model has said. PACKED: a compressed replica of a visual region and the instruction
    that it was scored with.
    """

    VISUAL = "visual"
    PROMPT = "prompt"
    GENERATED = "generated"
    PACKED = "packed"


class Observer(Protocol):
    """Counts what happens in the tree (engine/metrics.py)."""

    def evicted(self, kind: str, slots: int) -> None:
        """A node of this kind has lost its slots."""

    def refilled(self, slots: int) -> None:
        """A tombstone has got slots again."""


class Node(TreeNode):
    """A node of one kind.

    replica: the packed node at or above this one, None in the exact namespace.
    content: what a packed node holds; None for the others.
    place: the node's key among its parent's children.
    end: tokens from the root to the node's last.
    packed: packed children, by variant and first token.
    read_by: the replica that a picture's full KV was read for, while nobody else has read it.
    below_picture: a visual node stands above it, and a match reaches it only through that one.
    host_value: where its copy in host memory is, int64 [tokens]; None without (host_tier.py).
    transfer: which copy between device and host the node is part of right now.
    state: of a hybrid model, where the recurrent state after the node's last token is, int64 [1];
        None without. state_locks: who reads it (stateful_cache.py).
    occupied: there are slots in it or below it; n_occupied: children of which that is true.
    """

    def __init__(self, kind: Kind, priority: int = 0) -> None:
        super().__init__(priority=priority)
        self.children: dict[Hashable, Node] = {}
        self.kind = kind
        self.replica: Node | None = None
        self.content: Replica | None = None
        self.place: Hashable = None
        self.end = 0
        self.packed: dict[Hashable, list[Node]] = {}
        self.read_by: Node | None = None
        self.below_picture = False
        self.host_value: torch.Tensor | None = None
        self.transfer: int | None = None
        self.state: torch.Tensor | None = None
        self.state_locks = 0
        self.occupied = False
        self.n_occupied = 0

    @property
    def size(self) -> int:
        """Slots held; 0 for a tombstone."""
        return 0 if self.value is None else len(self.value)

    @property
    def is_tombstone(self) -> bool:
        return self.value is None

    @property
    def is_lossy(self) -> bool:
        """Whether the node's KV was computed beside compressed KV, or is compressed."""
        return self.replica is not None

    @property
    def is_spare(self) -> bool:
        """Whether a replica in the tree serves all that this full KV has served so far."""
        return self.read_by is not None and not self.read_by.is_tombstone

    @property
    def yields(self) -> bool:
        """Whether the node goes before any pinned text.

        Visual KV, all that is lossy, and text about a picture that one request alone has held.
        """
        alone = self.below_picture and self.hit_count <= 1
        return self.kind is Kind.VISUAL or self.is_lossy or alone

    @property
    def label(self) -> str:
        """The kind, as metrics and the dump name it."""
        return "lossy" if self.is_lossy and self.kind is not Kind.PACKED else self.kind.value

    @property
    def name(self) -> str:
        """Which picture a visual node begins with, or which variant a replica is; else empty."""
        if self.content is not None:
            return "/".join(str(part) for part in self.content.variant)
        # A picture's placeholders are four values in turn, drawn from its hash; a chunk may have
        # cut it anywhere.
        return f"{min(self.key.token_ids[:4]):x}" if self.kind is Kind.VISUAL else ""

    def describe(self, depth: int, now: float) -> dict[str, Any]:
        """The node as JSON; now: seconds of the clock of `last_access_time`."""
        return {
            "depth": depth,
            "kind": self.label,
            "name": self.name,
            "tokens": len(self.key),
            "slots": self.size,
            "columns": 0 if self.content is None else self.content.intent.columns,
            "tombstone": self.is_tombstone,
            "host_slots": 0 if self.host_value is None else len(self.host_value),
            "state": self.state is not None,
            "locks": self.lock_ref,
            "idle_seconds": round(now - self.last_access_time, 3),
        }

    def row_slots(self) -> torch.Tensor:
        """The node's entries in a request's row, int64 [tokens]."""
        return self.value if self.content is None else self.content.row_slots(self.value)


class TextLock(TreeLock):
    """A lock that holds the text of a path and lets the visual nodes between yield."""


@dataclasses.dataclass(frozen=True, slots=True)
class Published:
    """What an insert did.

    node: where it ended. duplicates: half-open ranges of the key that the tree held already; the
    slots offered for them stay with the caller. All else was adopted.
    """

    node: Node
    duplicates: list[tuple[int, int]]


class SpanTree(RadixCache):
    """SGLang's Python radix cache (mem_cache/radix_cache.py) with kinds, tombstones and replicas.

    evictable + protected = the slots that the tree owns; a tombstone counts 0.

    Tensor-parallel ranks each have a tree, and must evict the same nodes, or their prefix hits and
    with them their batches differ. They do: all of them are told the same in the same order, and
    what goes next follows from that order alone (`_tick`, `_Heaps`).
    text_bound: slots of unlocked pinned text up to which visual KV is evicted before text.
    """

    root_node: Node

    def __init__(self, params: CacheInitParams, text_share: float, observer: Observer) -> None:
        self.observer = observer
        self._now = 0.0
        super().__init__(params)
        self.text_bound = text_share * self.token_to_kv_pool_allocator.size

    def reset(self) -> None:
        super().reset()
        root = Node(Kind.PROMPT, priority=-sys.maxsize)
        root.key, root.value, root.hash_value = self.root_node.key, [], []
        root.lock_ref = 1
        self.root_node = root
        self._empty_match_result = self._found(root, 0)
        # Slots of unlocked text that does not yield.
        self.unlocked_text = 0

    # Matching

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """The longest prefix whose full KV is there; ends at the first tombstone."""
        if self.disable or len(params.key) == 0:
            return self._empty_match_result
        return self._match(params.key)

    def _match(self, key: RadixKey) -> MatchResult:
        return self._found(*self._follow(self.root_node, key, 0))

    def touch_prefix(self, key: RadixKey) -> None:
        if not self.disable and len(key):
            self._match(key)

    def match_packed(
        self, key: RadixKey, start: int, variant: Hashable, min_end: int, *, with_selection: bool
    ) -> MatchResult | None:
        """The longest match that runs through a packed replica of the tokens from `start` on.

        Of two that reach as far, the one with more of its text computed beside the full picture.

        start: on a page boundary. min_end: the replica has to reach this position.
        with_selection: and know its selection.
        """
        if self.disable or start + self.page_size > len(key):
            return None
        head, length = self._follow(self.root_node, limited_key(key, start), 0)
        if length < start:
            return None
        best, furthest = None, (0, 0)
        for node in head.packed.get((variant, key.child_key_at(start, self.page_size)), ()):
            size = len(node.key)
            assert node.content is not None
            if (
                start + size >= min_end
                and not (with_selection and node.content.selected is None)
                and node.key.match_at(key, start) == size
                and node.content.is_followed_by(key.token_ids, start + size)
            ):
                below = sum(matched for _, matched in self._walk(node, key, start + size))
                if (size + below, size) > furthest:
                    best, furthest = node, (size + below, size)
        if best is None:
            return None
        return self._found(*self._follow(best, key, start + len(best.key)))

    def _follow(
        self, node: Node, key: RadixKey, offset: int, *, host: bool = False
    ) -> tuple[Node, int]:
        """Walk from `node` along key[offset:] through nodes with slots: (last node, length).

        host: and through nodes with a copy in host memory.
        """
        now = self._tick()
        node.last_access_time = now
        for child, matched in self._walk(node, key, offset, host=host):
            child.last_access_time = now
            child.read_by = None
            offset += matched
            if matched < len(child.key):
                return self._split_node(child.key, child, matched), offset
            node = child
        return node, offset

    def _walk(
        self, node: Node, key: RadixKey, offset: int, *, host: bool = False
    ) -> Iterator[tuple[Node, int]]:
        """The nodes with slots below `node` along key[offset:], and how much of each matches."""
        while offset + self.page_size <= len(key):
            child = node.children.get(key.child_key_at(offset, self.page_size))
            if child is None:
                return
            if child.is_tombstone and not (host and child.host_value is not None):
                return
            matched = child.key.match_at(key, offset, self.page_size)
            yield child, matched
            if matched < len(child.key):
                return
            node, offset = child, offset + matched

    @staticmethod
    def _found(node: Node, length: int) -> MatchResult:
        return MatchResult(
            device_prefix_len=length,
            last_device_node=node,
            last_host_node=node,
            best_match_node=node,
        )

    # Inserting

    def insert(self, params: InsertParams) -> InsertResult:
        """SGLang's interface to `publish`, for a key that is all prompt."""
        if self.disable:
            return InsertResult(prefix_len=0)
        key, value = params.key.page_aligned(self.page_size), params.value
        if value is None:
            value = torch.tensor(list(key), dtype=torch.int64)
        done = self.publish(
            key,
            value[: len(key)],
            prompt_len=len(key),
            priority=params.priority or 0,
            inserted_len=params.inserted_len,
        )
        known = done.duplicates[-1][1] if done.duplicates else 0
        return InsertResult(prefix_len=known, last_device_node=done.node)

    def publish(
        self,
        key: RadixKey,
        slots: torch.Tensor,
        *,
        prompt_len: int,
        priority: int = 0,
        inserted_len: int = 0,
        below: Node | None = None,
    ) -> Published:
        """Insert a key of whole pages whose token i has the slot slots[i], int64 [len(key)].

        Tombstones on the way are refilled with the offered slots. Tokens from `prompt_len` on were
        generated; a node of generated text that this prompt runs through is promoted to PROMPT.
        With `below` insertion starts where that node ends.
        """
        node, now = below or self.root_node, self._tick()
        offset = node.end
        page, prompt_len = self.page_size, page_floor(prompt_len, self.page_size)
        node.last_access_time = now
        duplicates: list[tuple[int, int]] = []
        counted: list[Node] = []

        def visited(visit: Node, end: int) -> None:
            visit.priority = max(visit.priority, priority)
            # Nodes that this request inserted before were counted then.
            if end > inserted_len:
                self._count(visit, -1)
                self._inc_hit_count(visit)
                self._count(visit, 1)
                counted.append(visit)

        while offset < len(key):
            child = node.children.get(key.child_key_at(offset, page))
            if child is None:
                break
            child.last_access_time = now
            end = offset + child.key.match_at(key, offset, page)
            if child.kind is Kind.GENERATED and offset < prompt_len < end:
                end = prompt_len
            if end - offset < len(child.key):
                child = self._split_node(child.key, child, end - offset)
            if child.kind is Kind.GENERATED and end <= prompt_len:
                child.kind = Kind.PROMPT
            if child.is_tombstone:
                self._refill(child, slots[offset:end])
            elif duplicates and duplicates[-1][1] == offset:
                duplicates[-1] = (duplicates[-1][0], end)
            else:
                duplicates.append((offset, end))
            visited(child, end)
            node, offset = child, end
        while offset < len(key):
            kind, end = _segment(key, offset, prompt_len, page)
            child = Node(kind, priority)
            child.key, child.value = key[offset:end], slots[offset:end].clone()
            self._attach(node, child, key.child_key_at(offset, page))
            visited(child, end)
            node, offset = child, end
        self._published(counted)
        return Published(node, duplicates)

    def _published(self, nodes: list[Node]) -> None:
        """One more request has published these nodes, of one path and all with slots."""

    def add_packed(self, head: Node, key: RadixKey, start: int, replica: Replica) -> Node | None:
        """Hang a replica of key[start:] below `head`, which ends at `start`.

        The tree then owns the replica's slots. None if the same replica is there already, and
        knows its selection if the new one does.
        """
        index = (replica.variant, key.child_key_at(start, self.page_size))
        siblings = head.packed.setdefault(index, [])
        for other in siblings:
            assert other.content is not None
            same = len(other.key) == len(key) - start == other.key.match_at(key, start)
            same = same and other.content.rest == replica.rest
            if same and (replica.selected is None or other.content.selected is not None):
                return None
        node = Node(Kind.PACKED)
        node.key, node.value, node.content = key[start:], replica.slots, replica
        node.replica = node
        siblings.append(node)
        self._tick()
        self._attach(head, node, ("packed", node.id))
        return node

    def mark_spare(self, node: Node, replica: Node) -> None:
        """Let pictures on the path to `node` go before their replica, unless others read them."""
        while node is not self.root_node:
            alone = node.kind is Kind.VISUAL and node.hit_count <= 1
            node.read_by = replica if alone else None
            node = node.parent

    def _tick(self) -> float:
        """The time of an access, later than the last one whatever the clock's resolution."""
        self._now = max(time.monotonic(), math.nextafter(self._now, math.inf))
        return self._now

    def _attach(self, parent: Node, child: Node, place: Hashable) -> None:
        child.parent, child.place = parent, place
        child.creation_time = child.last_access_time = self._now
        child.end = parent.end + len(child.key)
        if child.replica is None:
            child.replica = parent.replica
        child.below_picture = parent.below_picture or parent.kind is Kind.VISUAL
        parent.children[place] = child
        self._count(child, 1)
        self._update_leaf_status(parent)
        self._update_leaf_status(child)
        if not child.is_lossy:
            self.kv_events.record_store(child)

    def _refill(self, node: Node, slots: torch.Tensor) -> None:
        node.value = slots.clone()
        self._count(node, 1)
        self._update_leaf_status(node)
        self.kv_events.record_store(node)
        self.observer.refilled(node.size)

    def _split_node(self, key: RadixKey, child: Node, split_len: int) -> Node:
        """Cut a node in two of its kind and lock count; returns the upper half."""
        assert child.kind is not Kind.PACKED, "a replica is whole"
        upper = Node(child.kind, child.priority)
        upper.hit_count, upper.lock_ref = child.hit_count, child.lock_ref
        upper.last_access_time = child.last_access_time
        upper.creation_time = child.creation_time
        upper.read_by, upper.below_picture = child.read_by, child.below_picture
        upper.parent, upper.place, upper.replica = child.parent, child.place, child.replica
        upper.occupied, upper.n_occupied = child.occupied, int(child.occupied)
        upper.end = child.end - len(child.key) + split_len
        upper.key, child.key = child.key[:split_len], child.key[split_len:]
        if child.value is not None:
            upper.value = child.value[:split_len].clone()
            child.value = child.value[split_len:].clone()
        # One hash a page, where they were computed.
        for name in ("hash_value", "event_hash_value"):
            halves = split_node_hash_value(getattr(child, name), split_len, self.page_size)
            setattr(upper, name, halves[0])
            setattr(child, name, halves[1])
        upper.parent.children[upper.place] = upper
        child.parent, child.place = upper, child.key.child_key(self.page_size)
        upper.children[child.place] = child
        self._update_leaf_status(upper)
        self._update_leaf_status(child)
        return upper

    # Locks

    def inc_lock_ref(self, node: Node) -> IncLockRefResult:
        return IncLockRefResult(delta=self._lock_path(node, 1, text_only=False))

    def dec_lock_ref(self, node: Node, params: DecLockRefParams | None = None) -> DecLockRefResult:
        return DecLockRefResult(delta=self._lock_path(node, -1, text_only=False))

    def lock_text(self, node: Node) -> TextLock:
        """Hold the text on the path to `node`; `unlock` releases it.

        Release meets the same nodes: kinds do not change between text and visual, and both halves
        of a split node keep its kind and count.
        """
        self._lock_path(node, 1, text_only=True)
        return TextLock(node, DecLockRefParams())

    def unlock(self, lock: TreeLock | None) -> None:
        if isinstance(lock, TextLock):
            self._lock_path(lock.node, -1, text_only=True)
        else:
            super().unlock(lock)

    def _lock_path(self, node: Node, step: int, *, text_only: bool) -> int:
        """Change the lock counts from `node` to the root; returns the change of evictable."""
        before = self.evictable_size_
        while not self.disable and node is not self.root_node:
            if not (text_only and node.kind is Kind.VISUAL):
                self._change_lock(node, step)
            node = node.parent
        return int(self.evictable_size_ - before)

    def _change_lock(self, node: Node, step: int) -> None:
        assert node.value is not None, "a tombstone cannot be locked"
        self._count(node, -1)
        node.lock_ref += step
        assert node.lock_ref >= 0, "released more often than locked"
        self._count(node, 1)
        self._update_leaf_status(node)

    # Evicting

    def evict(self, params: EvictParams) -> EvictResult:
        """Free at least `num_tokens` slots, if that many are evictable.

        Pictures that only served to pack a replica go first, then all else that yields, by SGLang's
        strategy, then generated text, then prompts, leaves before what they follow. While pinned
        text is above its bound, SGLang's strategy decides alone.
        """
        if self.disable:
            return EvictResult()
        started = time.perf_counter()
        heaps = _Heaps(self.eviction_strategy)
        for node in self.evictable_leaves:
            heaps.push(node)
        freed = 0
        while freed < params.num_tokens:
            candidate = heaps.pop(by_kind=self.unlocked_text <= self.text_bound)
            if candidate is None:
                break
            freed += candidate.size
            leaf = self._evict_node(candidate)
            # A visual node was a candidate before it was a leaf.
            if leaf in self.evictable_leaves and leaf.kind is not Kind.VISUAL:
                heaps.push(leaf)
        self.update_eviction_metrics(freed, started)
        return EvictResult(num_tokens_evicted=freed)

    def _evict_node(self, node: Node) -> Node:
        """Free a node's slots; returns the first node above it that has some."""
        assert node.value is not None and node.lock_ref == 0
        self.token_to_kv_pool_allocator.free_segment(node.value, start_pos=0)
        self.observer.evicted(node.label, node.size)
        self._count(node, -1)
        if not node.is_lossy:
            self.kv_events.record_remove(node)
        node.value = None
        self._update_leaf_status(node)
        return self._prune(node)

    def _prune(self, node: Node) -> Node:
        """Remove a tombstone that nothing follows, and those above it that this leaves so; returns
        the first node above with slots."""
        while node is not self.root_node and node.is_tombstone:
            parent: Node = node.parent
            if not node.children and node.host_value is None:
                self._detach(node)
            node = parent
        return node

    def _detach(self, node: Node) -> None:
        parent: Node = node.parent
        del parent.children[node.place]
        if node.content is not None:
            index = (node.content.variant, node.key.child_key(self.page_size))
            parent.packed[index].remove(node)
            if not parent.packed[index]:
                del parent.packed[index]

    def _update_leaf_status(self, node: Node) -> None:
        """A node may be evicted if nobody holds it and it is visual or no slots follow it."""
        if node.size and not node.lock_ref and (node.kind is Kind.VISUAL or not node.n_occupied):
            self.evictable_leaves.add(node)
        else:
            self.evictable_leaves.discard(node)
        occupied = bool(node.size or node.n_occupied)
        if occupied != node.occupied and node is not self.root_node:
            node.occupied = occupied
            node.parent.n_occupied += 1 if occupied else -1
            self._update_leaf_status(node.parent)

    def _count(self, node: Node, sign: int) -> None:
        slots = sign * node.size
        if node.lock_ref:
            self.protected_size_ += slots
        else:
            self.evictable_size_ += slots
            if not node.yields:
                self.unlocked_text += slots

    # Reading

    def nodes(self) -> Iterator[tuple[Node, int]]:
        """Every node below the root with its depth, parents first."""
        stack: list[tuple[Node, int]] = [(child, 0) for child in self.root_node.children.values()]
        while stack:
            node, depth = stack.pop()
            yield node, depth
            stack.extend((child, depth + 1) for child in reversed(node.children.values()))

    def describe(self, limit: int = 1000) -> dict[str, Any]:
        """The tree as JSON, at most `limit` nodes (docs/radix-cache.md lists the fields)."""
        now, listed, total = time.monotonic(), [], 0
        for node, depth in self.nodes():
            total += 1
            if total <= limit:
                listed.append(node.describe(depth, now))
        allocator = self.token_to_kv_pool_allocator
        free = allocator.available_size()
        owned = self.evictable_size_ + self.protected_size_
        return {
            "pool": {
                "size": allocator.size,
                "free": free,
                "evictable": self.evictable_size_,
                "protected": self.protected_size_,
                "private": allocator.size - free - owned,
                "unlocked_text": self.unlocked_text,
                "text_bound": int(self.text_bound),
            },
            "nodes": listed,
            "nodes_left_out": total - len(listed),
        }

    def path_device_indices(self, node: Node) -> torch.Tensor:
        """The row of a request whose prefix ends at `node`, int64 [tokens]."""
        parts = []
        while node is not self.root_node:
            assert node.value is not None, "the path runs through a tombstone"
            parts.append(node.row_slots())
            node = node.parent
        return torch.cat(parts[::-1]) if parts else self._empty_device_indices

    def all_values_flatten(self) -> torch.Tensor:
        values = [node.value for node, _ in self.nodes() if node.value is not None]
        return torch.cat(values) if values else self._empty_device_indices

    def total_size(self) -> int:
        return sum(node.size for node, _ in self.nodes())

    def pretty_print(self) -> None:
        for node, depth in self.nodes():
            print("  " * depth, node.label, len(node.key), f"slots={node.size} r={node.lock_ref}")
        print(f"#tokens: {self.total_size()}")


class _Heaps:
    """The candidates of one eviction, by class."""

    def __init__(self, strategy: Any) -> None:
        self._strategy = strategy
        self._yielding: list[tuple[Any, ...]] = []
        self._generated: list[tuple[Any, ...]] = []
        self._prompts: list[tuple[Any, ...]] = []

    def push(self, node: Node) -> None:
        if node.yields:
            heap = self._yielding
        else:
            heap = self._prompts if node.kind is Kind.PROMPT else self._generated
        priority = (not node.is_spare, self._strategy.get_priority(node))
        # A request's nodes were used at one time, and without the upper ones no match gets lower.
        heapq.heappush(heap, (priority, -node.end, node.id, node))

    def pop(self, *, by_kind: bool) -> Node | None:
        """The next to go: of the first class that is not empty, or of all three."""
        heaps = [heap for heap in (self._yielding, self._generated, self._prompts) if heap]
        if not heaps:
            return None
        return heapq.heappop(heaps[0] if by_kind else min(heaps, key=lambda heap: heap[0]))[-1]


def _segment(key: RadixKey, offset: int, prompt_len: int, page_size: int) -> tuple[Kind, int]:
    """The kind of the page at `offset`, and where that kind ends."""
    ids, length = key.token_ids, len(key)

    def is_visual(at: int) -> bool:
        return all(token >= MM_PAD_SHIFT_VALUE for token in ids[at : at + page_size])

    visual = is_visual(offset)
    generated = not visual and offset >= prompt_len
    if not visual and not generated:
        length = min(length, prompt_len)
    end = offset + page_size
    while end < length and is_visual(end) == visual:
        end += page_size
    if visual:
        return Kind.VISUAL, end
    return (Kind.GENERATED if generated else Kind.PROMPT), end


def limited_key(key: RadixKey, limit: int) -> RadixKey:
    """The first `limit` tokens of a key, without a copy."""
    return RadixKey(
        key.token_ids,
        key.extra_key,
        is_bigram=key.is_bigram,
        limit=min(limit, len(key)),
        cache_salt=key.cache_salt,
    )
