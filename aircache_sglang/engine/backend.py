# SPDX-License-Identifier: Apache-2.0
"""SGLang's own attention backend, which also stashes queries and decodes packed cells.

Imports no SGLang before it is called by it: a machine with torch and triton alone can test it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from aircache_sglang.runtime.attention import Decoder, Extender
from aircache_sglang.runtime.attention_sum import SumWork
from aircache_sglang.runtime.drafts import Drafts, tree_of
from aircache_sglang.runtime.extend import ExtendJob
from aircache_sglang.runtime.kv_planes import KVPlanes
from aircache_sglang.runtime.record import CompressionRecord
from aircache_sglang.runtime.stash import BatchStash
from aircache_sglang.runtime.transfer import to_device

# Two variants of every decode CUDA graph: SGLang's own, and one for batches with packed cells.
PLAIN, COMPRESSED = "plain", "aircache"


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """What one forward does besides SGLang's own.

    records: of a decode or verify step's rows, None for the uncompressed; empty if all are.
    verifies: drafts are verified, and the attention of all of them is ours; records: one a row.
    queries: what keeps queries of a prefill, if it keeps any.
    sums: queries whose attention to the picture is added up.
    extends: the requests of a prefill that extend a replica; extends_all: there are no others.
    packs: the pass follows the forward.
    """

    records: Sequence[CompressionRecord | None] = ()
    queries: BatchStash | None = None
    sums: Sequence[SumWork] = ()
    extends: Sequence[ExtendJob] = ()
    extends_all: bool = False
    packs: bool = False
    verifies: bool = False

    @property
    def is_more(self) -> bool:
        """Whether a prefill or a verify step does more than SGLang's own."""
        return bool(self.queries or self.sums or self.extends or self.packs or self.verifies)


class AttentionState:
    """What the backend shares with the compressor: the work of the forward that runs."""

    def __init__(
        self,
        pool: KVPlanes,
        decoder: Decoder,
        extender: Extender,
        capture_variant: Callable[[], str | None],
        *,
        batch_invariant: bool = False,
    ) -> None:
        """capture_variant: the label of the CUDA graph that is being captured, None outside a
        capture (model_executor/runner_utils/capture_mode.py, get_capture_attention_variant).
        batch_invariant: all decode is ours, so that a packed neighbour changes nobody's kernel.
        """
        self.pool, self.decoder, self.extender = pool, decoder, extender
        self.batch_invariant = batch_invariant
        self._capture_variant = capture_variant
        # bool [B, n, n], which graphs that verify drafts read; B is the largest captured batch.
        self._trees: torch.Tensor | None = None
        self.work = Work()
        self._shortened: tuple[Any, Any] | None = None

    @contextlib.contextmanager
    def during(self, work: Work) -> Iterator[None]:
        """Do `work` in the forward that runs inside."""
        self.work = work
        try:
            if work.extends:
                self.extender.plan(work.extends)
            yield
        finally:
            self.work, self._shortened = Work(), None

    def stash(self, q: torch.Tensor, layer: Any) -> None:
        """Keep the queries that the work names; q: [tokens, H_q * D], after RoPE."""
        if self.work.queries is not None:
            heads = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
            self.work.queries.write(self.pool.plane(layer), heads)

    def sum(self, q: torch.Tensor, layer: Any) -> None:
        """Add up attention, once this layer's keys are in the pool; q: [tokens, H_q * D]."""
        if self.work.sums:
            heads = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
            index = self.pool.plane(layer)
            for part in self.work.sums:
                keys = self.pool.k_all[index].index_select(0, part.slots)
                part.total.add(index, heads[part.source], keys, part.first, layer.scaling)

    def stock_batch(self, forward_batch: Any) -> Any:
        """A batch as stock attention sees it: what extends a replica begins with its new tokens.

        Their rows are overwritten, so the tokens before them need not be read; the others' lengths
        are their own.
        """
        if not self.work.extends:
            return forward_batch
        if self._shortened is None or self._shortened[0] is not forward_batch:
            self._shortened = (forward_batch, without_prefixes(forward_batch, self.work.extends))
        return self._shortened[1]

    def extend(self, q: torch.Tensor, out: torch.Tensor, layer: Any) -> None:
        """Overwrite the rows of `out` [tokens, H_q * D] that extend a replica."""
        if self.work.extends:
            heads = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
            results = out.view(-1, layer.tp_q_head_num, layer.v_head_dim)
            self.extender.attend(heads, results, layer)

    def extend_all(
        self, q: torch.Tensor, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool
    ) -> torch.Tensor:
        """A layer where all requests extend a replica; q: [tokens, H_q * D], returns the same."""
        self.stash(q, layer)
        self.write(k, v, layer, forward_batch, save_kv_cache)
        out = q.new_empty(len(q), layer.tp_q_head_num * layer.v_head_dim)
        self.extend(q, out, layer)
        return out

    def verify(
        self, q: torch.Tensor, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool
    ) -> torch.Tensor:
        """Write the drafts' cells and attend; q: [bs * n, H_q * D], returns the same."""
        self.write(k, v, layer, forward_batch, save_kv_cache)
        heads = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = torch.empty_like(heads)
        self.extender.attend(heads, out, layer)
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    def write(self, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool) -> None:
        """Store the new tokens' KV, unless the model has done so (fused with RoPE)."""
        if save_kv_cache and k is not None:
            self.pool.write(layer, forward_batch.out_cache_loc, k, v)

    def decodes(self) -> bool:
        """Whether this decode step, or the graph that is being captured, is ours."""
        variant = self._capture_variant()
        if variant is not None:
            return variant == COMPRESSED
        return self.batch_invariant or bool(self.work.records)

    def verifies(self, mode: Any) -> bool:
        """Whether this is a step that verifies drafts, or the capture of one, that is ours."""
        variant = self._capture_variant()
        ours = self.work.verifies if variant is None else variant == COMPRESSED
        return ours and bool(mode.is_target_verify())

    def stage_trees(self, forward_batch: Any, *, in_capture: bool) -> None:
        """Outside a graph of ours, before it is captured or replayed: the trees that it reads.

        Large batches are captured first, so that all graphs read one buffer. What a replay pads a
        batch with keeps trees of earlier steps; its results are read by nobody.
        """
        n = forward_batch.spec_info.draft_token_num
        if in_capture:
            if self._trees is None:
                chain = forward_batch.seq_lens.new_ones((n, n), dtype=torch.bool).tril()
                self._trees = chain.repeat(forward_batch.batch_size, 1, 1)
            assert forward_batch.batch_size <= len(self._trees), "a larger batch came later"
            return
        assert self._trees is not None, "a replay without a capture"
        drafts = len(self.work.records)
        mask, lens = forward_batch.spec_info.custom_mask, forward_batch.seq_lens[:drafts]
        self._trees[:drafts] = tree_of(mask, lens, n)

    def plan_in_graph(self, forward_batch: Any) -> None:
        """Inside a graph of ours: what it reads, all of it on the device."""
        assert self._trees is not None, "a capture whose trees were not staged"
        batch = forward_batch.batch_size
        trees = self._trees[:batch]
        lens = forward_batch.seq_lens + trees.shape[1]
        drafts = Drafts([None] * batch, forward_batch.req_pool_indices, lens, trees)
        self.extender.plan_drafts(drafts)

    def decode(
        self, q: torch.Tensor, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool
    ) -> torch.Tensor:
        """Write the new token's cell and attend; q: [bs, H_q * D], returns [bs, H_q * D]."""
        self.write(k, v, layer, forward_batch, save_kv_cache)
        heads = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = self.decoder.attend(heads, layer, forward_batch)
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)


def without_prefixes(forward_batch: Any, jobs: Sequence[ExtendJob]) -> Any:
    """A copy of a prefill batch in which the requests of `jobs` have nothing before their new
    tokens (model_executor/forward_batch_info.py, ForwardBatch)."""
    batch = copy.copy(forward_batch)
    lengths, prefixes = batch.extend_seq_lens_cpu, list(batch.extend_prefix_lens_cpu)
    first_rows = list(itertools.accumulate(lengths, initial=0))
    members = [first_rows.index(job.source.start) for job in jobs]
    dropped = sum(prefixes[i] for i in members)
    for i in members:
        prefixes[i] = 0
    ends = [prefix + length for prefix, length in zip(prefixes, lengths, strict=True)]
    device = batch.seq_lens.device
    batch.extend_prefix_lens_cpu = prefixes
    batch.extend_prefix_lens = to_device(prefixes, device, batch.extend_prefix_lens.dtype)
    batch.seq_lens = to_device(ends, device, batch.seq_lens.dtype)
    if batch.seq_lens_cpu is not None:
        batch.seq_lens_cpu = torch.tensor(ends, dtype=batch.seq_lens_cpu.dtype)
    if batch.seq_lens_sum is not None:
        batch.seq_lens_sum -= dropped
    return batch


class DecodeGraphVariants:
    """Chooses the decode graph of a batch (layers/attention/graph_variants.py)."""

    # The stock graph last, so that nothing is captured between its metadata and its first replay.
    capture_labels = (COMPRESSED, PLAIN)

    def __init__(self, state: AttentionState) -> None:
        self._state = state

    def select(self, forward_batch: Any) -> str:
        """From host knowledge alone, so that a replay waits for nothing."""
        return COMPRESSED if self._state.decodes() else PLAIN


@functools.cache
def compressing(stock: type) -> type:
    """The subclass of an attention backend that stashes queries and decodes compressed requests.

    Prefill is stock but for requests that extend a replica, and it does not run where there are no
    others. So is the decode of a batch with nothing compressed in it, and the verification of its
    drafts where the stock backend can verify.
    """

    class CompressingBackend(stock):
        aircache: AttentionState

        def init_forward_metadata(self, forward_batch: Any) -> None:
            """Eager; the stock attention, and so its plan, is not needed where all is ours."""
            state, decodes = self.aircache, forward_batch.forward_mode.is_decode()
            if decodes and state.decodes():
                state.decoder.plan(forward_batch, state.work.records)
            elif state.verifies(forward_batch.forward_mode):
                state.extender.plan_drafts(Drafts.of(forward_batch, state.work.records))
            elif decodes or not state.work.extends_all:
                super().init_forward_metadata(state.stock_batch(forward_batch))

        def init_forward_metadata_out_graph(
            self, forward_batch: Any, in_capture: bool = False
        ) -> None:
            """Before a decode graph is captured or replayed; ours reads the runner's buffers.

            The stock method must not run while our variant is captured: FlashInfer's makes new
            wrappers in each capture, and those of the stock graph of that batch size would be
            freed (layers/attention/flashinfer_backend.py, _prepare_cuda_graph_metadata).
            """
            state, mode = self.aircache, forward_batch.forward_mode
            if state.verifies(mode):
                state.stage_trees(forward_batch, in_capture=in_capture)
            elif not (mode.is_decode() and state.decodes()):
                super().init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)

        def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
            """The part of it that a graph repeats."""
            if self.aircache.verifies(forward_batch.forward_mode):
                self.aircache.plan_in_graph(forward_batch)
            else:
                super().init_forward_metadata_in_graph(forward_batch)

        def forward(
            self,
            q: Any,
            k: Any,
            v: Any,
            layer: Any,
            forward_batch: Any,
            save_kv_cache: bool = True,
            **kwargs: Any,
        ) -> Any:
            state = self.aircache
            decodes = forward_batch.forward_mode.is_decode()
            if decodes and state.decodes():
                return state.decode(q, k, v, layer, forward_batch, save_kv_cache)
            if state.verifies(forward_batch.forward_mode):
                return state.verify(q, k, v, layer, forward_batch, save_kv_cache)
            if not decodes:
                if state.work.extends_all:
                    return state.extend_all(q, k, v, layer, forward_batch, save_kv_cache)
                state.stash(q, layer)
                forward_batch = state.stock_batch(forward_batch)
            out = super().forward(
                q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **kwargs
            )
            if not decodes:
                state.sum(q, layer)
                state.extend(q, out, layer)
            return out

        def can_run_prefill_cuda_graph(self, forward_batch: Any) -> bool:
            """Graphs run no Python: a prefill or a verify step with work of ours is eager."""
            stock_rule = getattr(super(), "can_run_prefill_cuda_graph", None)
            if self.aircache.work.is_more:
                return False
            return stock_rule is None or bool(stock_rule(forward_batch))

        def shared_read_ends(self, fm: Any) -> Any:
            """Our decode and our drafts read the live row and table in every layer; all else is
            stock."""
            from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds

            state = self.aircache
            if (fm.is_decode() and state.decodes()) or state.verifies(fm):
                return SharedReadEnds.POST_REPLAY
            return super().shared_read_ends(fm)

        def resolve_prefill_shared_read_ends(self, forward_batch: Any, **kwargs: Any) -> Any:
            """When the scheduler may overwrite what a prefill, or an eager verify step, reads; with
            work of ours, behind it.

            Every layer of ours reads live rows, and the pass behind the forward reads and rewrites
            them. UNKNOWN publishes no event, so that the schedule stream waits for all that
            `forward_batch_generation` has launched (managers/scheduler.py, _apply_war_barrier).
            """
            from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds

            if self.aircache.work.is_more:
                return SharedReadEnds.UNKNOWN
            return super().resolve_prefill_shared_read_ends(forward_batch, **kwargs)

    CompressingBackend.__name__ = CompressingBackend.__qualname__ = f"AirCache{stock.__name__}"
    return CompressingBackend


def adopt(backend: Any, state: AttentionState) -> None:
    """Make a constructed backend of SGLang's a compressing one.

    The object stays what it was, with all its state and an instance of its own class: a wrapper
    would have to forward every attribute that SGLang reads off a backend.
    """
    stock: type = type(backend)
    backend.__class__ = compressing(stock)
    backend.aircache = state
