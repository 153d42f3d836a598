# SPDX-License-Identifier: Apache-2.0
"""The pieces together: one `Compressor` a scheduler process, called from the hooks."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import MM_PAD_SHIFT_VALUE
from sglang.srt.mem_cache.common import evict_from_tree_cache
from sglang.srt.model_executor.runner_utils.capture_mode import get_capture_attention_variant
from sglang.srt.runtime_context import get_disagg, get_exec, get_memory, get_parallel, get_spec

from aircache_sglang.config import AirCacheConfig
from aircache_sglang.engine.backend import AttentionState, Work
from aircache_sglang.engine.disaggregation import FREE, layout
from aircache_sglang.engine.heads import TensorParallelHeads
from aircache_sglang.engine.hybrid import adopt_attending, attending_pool
from aircache_sglang.engine.kv_pool import LayerContiguousKVPool
from aircache_sglang.engine.metrics import Metrics
from aircache_sglang.engine.model import attention_layers, attention_scale
from aircache_sglang.engine.pressure import Pressure
from aircache_sglang.engine.request import asked, state_of
from aircache_sglang.engine.shadow import ShadowReq, Shadows
from aircache_sglang.engine.shadow_metrics import ShadowMetrics
from aircache_sglang.engine.start import start
from aircache_sglang.runtime.attention import Decoder, Extender
from aircache_sglang.runtime.attention_sum import SumWork
from aircache_sglang.runtime.compress import CompressionPass, PassInputs, TorchPass
from aircache_sglang.runtime.decide import Intent, Reason, decide
from aircache_sglang.runtime.decode import TorchDecoder
from aircache_sglang.runtime.extend import ExtendJob, TorchExtender
from aircache_sglang.runtime.gate import CPU
from aircache_sglang.runtime.pages import page_ceil
from aircache_sglang.runtime.record import CompressionRecord, Stage
from aircache_sglang.runtime.session import Chain, chain, originals_of, pack_chain
from aircache_sglang.runtime.spans import Chunk
from aircache_sglang.runtime.stash import (
    QUERY_ROWS,
    BatchStash,
    Job,
    PrefillStash,
    query_rows,
)
from aircache_sglang.runtime.table import CompressionTable
from aircache_sglang.runtime.transfer import to_device
from aircache_sglang.runtime.warm_up import Kernels


class Compressor:
    """Owns the records, the table and the policy of one model runner.

    records: by row of `req_to_token`. surplus: slots by row that were reserved for columns and are
    not needed, until the tree frees them.
    arriving: by row, the requests of a decode server that are not in the table yet; None for one
    that is not packed.
    """

    # Whether videos of one batch are padded to the longest, and the padding encoded: SGLang's
    # Transformers fallback (models/transformers.py, _collect_mm_kwargs).
    _pads_videos = False
    # Not where layers with a recurrent state would need that at a replica's end.
    _keeps_replicas = True
    shadows: Shadows | None = None

    def __init__(self, config: AirCacheConfig, decode: str, model_runner: Any) -> None:
        """decode: `torch`, `triton` or `flashinfer` (a pass in Triton)."""
        batch_invariant = get_exec().deterministic.enable_deterministic_inference
        pool = attending_pool(model_runner.token_to_kv_pool)
        if not isinstance(pool, LayerContiguousKVPool):
            raise RuntimeError(
                f"--kv-policy {config.policy} needs its own KV pool, but SGLang built "
                f"{type(pool).__name__}; run `aircache doctor` and report the model"
            )
        self.config = config
        self.pool = pool
        self.records: dict[int, CompressionRecord] = {}
        self.arriving: dict[int, CompressionRecord | None] = {}
        self.surplus: dict[int, torch.Tensor] = {}
        self._made_room = False
        self._query_room = QUERY_ROWS
        self._chunked: Any | None = None
        self._running: Sequence[Any] = ()
        self._admitted: Sequence[Any] = ()
        self._launch: Callable[[], None] = lambda: None
        self.table = CompressionTable(model_runner.req_to_token_pool.req_to_token, pool.layer_num)
        self.metrics = Metrics.create(config.policy)
        self._pads_videos = hasattr(model_runner.model, "_collect_mm_kwargs")
        layers = attention_layers(model_runner.model)
        scale = attention_scale(layers, config.policy)
        heads = TensorParallelHeads(
            get_parallel().tp_group, model_runner.model_config.get_total_num_kv_heads()
        )
        heads.check_same((config, decode, pool.size))
        if config.shadow > 0:
            self.shadows = Shadows(config, heads, ShadowMetrics(self.metrics.labels))
        # `null`, `prefill` or `decode`, and what the servers of a pair have in common.
        self.mode = get_disagg().disaggregation_mode
        self.layout = layout(config, pool, model_runner.model_config.get_total_num_kv_heads())
        self.inputs = inputs = PassInputs(pool.k_all, pool.v_all, self.table, heads, scale)
        self._keeps_replicas = pool is model_runner.token_to_kv_pool
        self._has_tree = not get_memory().disable_radix_cache
        # torch_native has no mask for drafts (layers/attention/torch_native_backend.py).
        self._stock_verifies = "torch_native" not in (
            model_runner.prefill_attention_backend_str,
            model_runner.decode_attention_backend_str,
        )
        self.costs = CPU
        self.compress: CompressionPass
        decoder: Decoder
        extender: Extender
        if decode == "torch":
            self.compress = TorchPass(inputs)
            decoder = TorchDecoder(pool, self.table)
            extender = TorchExtender(pool, self.table)
        else:
            # Imported here: a CPU server needs no Triton, and most need no FlashInfer.
            from aircache_sglang.runtime.flashinfer_decode import FlashInferDecoder
            from aircache_sglang.runtime.kernel_decode import KernelDecoder
            from aircache_sglang.runtime.kernel_extend import KernelExtender
            from aircache_sglang.runtime.kernel_pass import KernelPass

            n_q, q_dtype = layers[0].tp_q_head_num, model_runner.dtype
            self.compress = KernelPass(inputs)
            if decode == "triton":
                decoder = KernelDecoder(pool, self.table, batch_invariant=batch_invariant)
            else:
                decoder = FlashInferDecoder(pool, self.table, n_q=n_q, q_dtype=q_dtype, scale=scale)
            extender = KernelExtender(pool, self.table)
            self.costs = start(
                Kernels(
                    *(self.compress, decoder, extender, pool, self.table),
                    *(n_q, q_dtype, scale),
                    n_drafts=get_spec().speculative_num_draft_tokens or 0,
                ),
                heads,
            )
        self.attention = AttentionState(
            *(pool, decoder, extender, get_capture_attention_variant),
            batch_invariant=batch_invariant,
        )
        adopt_attending(model_runner.attn_backend, self.attention)
        self.pressure = Pressure(inputs, self.records, self.metrics)

    # Admission, on the scheduler's side

    def intent(self, req: Any) -> Intent | None:
        """How a request is compressed, None for not at all; decided once a prompt."""
        state = state_of(req)
        if state.decided_for != len(req.origin_input_ids):
            decision, question = None, asked(req, has_tree=self._has_tree)
            if question is not None:
                room = self.pool.size - 2 * self.pool.page_size
                decision = decide(
                    *(question, self.config if self.shadows is None else self.shadows.config),
                    # On a decode server a packed request always has fewer slots than a whole one.
                    room=sys.maxsize if self.mode == "decode" else room,
                    pad_floor=MM_PAD_SHIFT_VALUE,
                    costs=FREE if self.mode == "prefill" else self.costs,
                    page_size=self.pool.page_size,
                    disaggregated=self.mode != "null",
                    keeps_replicas=self._keeps_replicas,
                )
            if isinstance(decision, Reason):
                self.decline(req, decision)
            else:
                state.decided(req, decision)
        return state.intent

    def decline(self, req: Any, reason: Reason) -> None:
        """Serve this life of a request uncompressed.

        Tensor-parallel ranks decline alike, since a rank alone would leave the others waiting in
        the pass. `decide` looks at a request, which the scheduler broadcasts, and at settings,
        which `check_same` has compared. Slots are missing on all ranks or on none: their pools are
        of one size, and the same requests were admitted, freed and evicted in the same order
        (engine/tree.py); SGLang's batches hang on the same. Masses are means over the ranks.
        """
        self.metrics.left_alone(reason)
        if self.shadows is not None:
            self.shadows.left_alone(req, reason)
        state = state_of(req)
        state.reason, state.stash = reason, None
        state.decided(req, None)

    def slots_to_reserve(self, req: Any, extend_input_len: int | None) -> int:
        """Slots that admission must hold back for the columns if this extend ends the prefill."""
        intent = self.intent(req)
        total = len(req.full_untruncated_fill_ids)
        if intent is None or (
            extend_input_len is not None and req.prefix_len + extend_input_len < total
        ):
            return 0
        if self.is_chained(req):
            return self._chain(req, intent).total + intent.n_copies
        return 0 if extends_replica(req) else intent.n_extra

    def is_chained(self, req: Any) -> bool:
        """Whether a request brings pictures behind the replica that it extends."""
        intent = self.intent(req)
        if intent is None or not extends_replica(req):
            return False
        return bool(req.last_node.replica.content.intent.prompt.end < intent.prompt.end)

    def _chain(self, req: Any, intent: Intent) -> Chain:
        return chain(req.last_node.replica.content, intent)

    def begin_batch(self, chunked: Any, running: Sequence[Any], launch: Callable[[], None]) -> None:
        """A prefill batch is put together.

        chunked: the request whose prefill goes on, or None; running: those that decode; launch:
        packs what was decided now, on the forward stream.
        """
        self._chunked, self._running, self._launch = chunked, running, launch
        self.pressure.recount()
        self._query_room = QUERY_ROWS - (0 if chunked is None else self._query_rows(chunked))

    def admits(self, req: Any, admitted: Sequence[Any]) -> bool:
        """Whether the queries of a request that was matched fit beside those of the batch so far.

        admitted: the requests of that batch, to which this one will be added. None is while the
        request whose prefill goes on is not among them (PrefillAdder.add_chunked_req).
        The rest waits for the next batch, in its turn. Alone every request fits.
        """
        self._admitted = admitted
        if self._chunked is not None and self._chunked not in admitted:
            return False
        if self._pads_videos and not same_frames(req, admitted):
            return False
        rows = self._query_rows(req)
        if rows > self._query_room:
            return False
        self._query_room -= rows
        return True

    def _query_rows(self, req: Any) -> int:
        intent = self._scored(req)
        return 0 if intent is None else query_rows(intent)

    def _scored(self, req: Any) -> Intent | None:
        """The intent of a request whose prefill ends with a pass: not of a turn without pictures
        that extends a replica."""
        return None if extends_replica(req) and not self.is_chained(req) else self.intent(req)

    def make_room(self, tree: Any, reqs: Sequence[Any]) -> None:
        """Have the slots that admission has promised to the requests of a prefill batch."""
        need = sum(
            page_ceil(len(req.full_untruncated_fill_ids), self.pool.page_size)
            - req.prefix_len
            + self.slots_to_reserve(req, None)
            for req in reqs
        )
        self.pressure.for_prefill(tree, need, [*self._running, *reqs])

    def make_room_for_load(self, tree: Any, req: Any) -> None:
        """As for the batch, while it is put together: a load takes its slots at once, and might
        leave none for the columns."""
        self.make_room(tree, [*self._admitted, req])

    def loading(self) -> None:
        """Loads, on their own stream, wait for what is on the forward stream by now."""
        self._launch()

    def allocate_columns(self, batch: Any) -> None:
        """Open a record, and allocate its slots, for each prefill that ends in this batch."""
        for req in batch.reqs:
            row, replica = req.kv.req_pool_idx, req.last_node.replica
            # Once a prompt, as SGLang counts `cached_tokens`: its first chunk before a retraction.
            first = req.extend_batch_idx == 1 and not req.retracted_stain
            if first and req.prefix_len and not isinstance(req, ShadowReq):
                self.metrics.hit(req.prefix_len, compressed=replica is not None)
            intent = self.intent(req)
            if replica is not None:
                if row not in self.records:
                    assert intent is not None, "a replica was matched for an uncompressed request"
                    record = CompressionRecord.of_replica(replica.content, row, own=intent)
                    self.records[row] = record
                    if not self.is_chained(req):
                        state_of(req).report = record.report()
                if not self.is_chained(req) or req.extend_end < len(req.full_untruncated_fill_ids):
                    continue
            if intent is None or req.extend_end < len(req.full_untruncated_fill_ids):
                continue
            if intent.rungs:
                originals = self._originals(row, intent, None)
                record = CompressionRecord(intent, row, originals, extra=originals[:0])
                self.pressure.open(req, record)
                continue
            link = self._chain(req, intent) if replica is not None else None
            if link is not None:
                intent = dataclasses.replace(intent, columns=link.total)
            evict_from_tree_cache(batch.tree_cache, intent.n_extra)
            extra = batch.tree_cache.token_to_kv_pool_allocator.alloc(intent.n_extra)
            if extra is None:
                self.decline(req, Reason.NO_FREE_SLOTS)
                continue
            # Of the answer, what an earlier life of a retracted request has said.
            n_said = len(req.full_untruncated_fill_ids) - intent.prompt.length
            record = CompressionRecord(
                intent=intent,
                row=row,
                originals=self._originals(row, intent, link),
                # A view would keep the allocator's whole list of free slots alive.
                extra=extra.to(torch.int64, copy=True),
                exact_tail=n_said > 0,
                packed_at=n_said + 1,
            )
            if link is None:
                assert row not in self.records, f"row {row} is still compressed"
                self.records[row] = record
            else:
                state_of(req).next_turn = (record, link)

    def _originals(self, row: int, intent: Intent, link: Chain | None) -> torch.Tensor:
        entries = self.table.req_to_token[row]
        if link is not None:
            return originals_of(link.base, intent, entries)
        return entries[: intent.prompt.end].to(torch.int64, copy=True)

    # One forward, on the forward stream

    def run_forward(self, batch: Any, forward: Callable[[], Any]) -> Any:
        """Run one forward; around a prefill, stash queries and then compress what it ended."""
        if batch is None or batch.forward_mode.is_idle():
            return forward()
        self.pressure.launch()
        if batch.forward_mode.is_target_verify():
            with self.attention.during(self._verify_work(batch)):
                return forward()
        if not batch.forward_mode.is_extend():
            with self.attention.during(self._decode_work(batch)):
                return forward()
        work = self._prefill_work(batch)
        if work.is_more and batch.hicache_consumer_index >= 0:
            # Stock attention waits layer by layer, where it reads a layer; we read them directly.
            self.pool.wait_for_load(batch.hicache_consumer_index)
        with self.attention.during(work):
            result = forward()
        self._compress(batch.reqs)
        return result

    def _decode_work(self, batch: Any) -> Work:
        """The records of a decode step, one a row; none if nothing is compressed.

        Behind the requests' rows stand those of beams (beam_search/batch_tail.py). No prefill of
        their own has cleared what an earlier request left of them in the table.
        """
        if self.arriving:
            self._enter_arrived([req.kv.req_pool_idx for req in batch.reqs])
        records = [self.records.get(req.kv.req_pool_idx) for req in batch.reqs]
        beams = batch.req_pool_indices[len(records) :]
        if len(beams):
            self.table.clear(beams)
        if not any(records):
            return Work()
        return Work(records=[*records, *[None] * len(beams)])

    def _enter_arrived(self, rows: list[int]) -> None:
        """Enter the requests of a decode server's batch that no prefill here has entered."""
        device = self.pool.k_all.device
        arrived = {row: self.arriving.pop(row) for row in rows if row in self.arriving}
        if arrived:
            self.table.clear(to_device(arrived, device, torch.int64))
        for record in filter(None, arrived.values()):
            self._enter(record)

    def _enter(self, record: CompressionRecord) -> None:
        """Write a record's budgets, which are on the host, into the table."""
        assert record.budgets is not None, "what is entered has its budgets"
        prompt, device = record.intent.prompt, self.pool.k_all.device
        budgets = to_device(record.budgets.tolist(), device, torch.int64)
        self.table.set(record.row, prompt.start, prompt.n_visual, budgets)

    def _verify_work(self, batch: Any) -> Work:
        """The records of a step that verifies drafts, one a row.

        Not ours where nothing is compressed, unless the stock backend cannot verify.
        """
        records = [self.records.get(req.kv.req_pool_idx) for req in batch.reqs]
        if self._stock_verifies and not any(records):
            return Work()
        return Work(records=records, verifies=True)

    def _prefill_work(self, batch: Any) -> Work:
        """What a prefill keeps, adds up and extends; what extends a replica is not scored.

        With --enable-mixed-chunk the requests that decode stand behind those of the prefill
        (schedule_batch.py, mix_with_running): to a packed one its new token is an extension.
        """
        n_decoding = len(batch.decoding_reqs or ())
        decoding = {id(req) for req in batch.decoding_reqs or ()}
        self.table.clear(batch.req_pool_indices[: len(batch.reqs) - n_decoding])
        queries = BatchStash(self.pool.layer_num)
        sums: list[SumWork] = []
        extends: list[ExtendJob] = []
        for req, chunk in chunks(batch):
            row = req.kv.req_pool_idx
            record = self.records.get(row)
            if id(req) in decoding:
                if record is not None:
                    extends.append(ExtendJob(record, chunk.start, chunk.end, chunk.rows))
                continue
            intent = self._scored(req)
            if record is not None and record.reused:
                self._enter_replica(record, chunk)
                extends.append(ExtendJob(record, chunk.start, chunk.end, chunk.rows))
            if intent is not None:
                state = state_of(req)
                if state.stash is None:
                    state.stash = PrefillStash(intent)
                part = state.stash.claim(chunk, self.table.req_to_token[row], queries)
                if part is not None:
                    sums.append(part)
        return Work(
            queries=queries if len(queries) else None,
            sums=sums,
            extends=extends,
            extends_all=len(extends) == len(batch.reqs),
            packs=any(
                self._unpacked(req) or self._unranked(req) or state_of(req).next_turn
                for req in batch.reqs
            ),
        )

    def _unpacked(self, req: Any) -> CompressionRecord | None:
        """The record of a request whose prefill ends in the batch that is about to run, or ran."""
        record = self.records.get(req.kv.req_pool_idx)
        return record if record is not None and record.budgets is None else None

    def _unranked(self, req: Any) -> CompressionRecord | None:
        """The record of a request whose prefill ends so, and which may be packed later."""
        whole = state_of(req).whole
        return whole if whole is not None and whole.ladder is None else None

    def _enter_replica(self, record: CompressionRecord, chunk: Chunk) -> None:
        assert chunk.start >= record.intent.prompt.end, "a replica is extended behind its pictures"
        self._enter(record)

    def _compress(self, reqs: list[Any]) -> None:
        """Run the pass for the requests whose prefill has just been launched to its end."""
        started = time.perf_counter()
        now: list[Job] = []
        later: list[Job] = []
        owners: list[Any] = []
        for req in reqs:
            state, packed = state_of(req), self._unpacked(req)
            record = packed or self._unranked(req)
            if state.next_turn is not None:
                assert state.stash is not None, "a turn was chained without its queries"
                record, link = state.next_turn
                pack_chain(self.inputs, state.stash.job(record), link)
                self.records[record.row] = record
                state.stash = state.next_turn = None
            elif record is not None:
                assert state.stash is not None, "a record was opened without a prefill"
                job, state.stash = state.stash.job(record), None
                if packed is None:
                    later.append(job)
                else:
                    now.append(job)
                    owners.append(req)
            elif state.stash is not None:
                state.stash.detach()
        if not now and not later:
            return
        if now:
            self.compress(now)
        if later:
            self.compress.rank(later)
        seconds = (time.perf_counter() - started) / (len(now) + len(later))
        for job in (*now, *later):
            job.record.seconds = seconds
        for req, job in zip(owners, now, strict=True):
            self._take_surplus(req, job.record)

    def _take_surplus(self, req: Any, record: CompressionRecord) -> None:
        """Note what a pass did not need; a request that keeps its picture is as if uncompressed."""
        if record.surplus is not None:
            self.surplus[record.row], record.surplus = record.surplus, None
        if record.budgets is None:
            del self.records[record.row]
            self.decline(req, Reason.MASS_NOT_REACHED)

    # The rest of a request's life, as the tree and SGLang's checks see it

    def private_tokens(self, row: int, stock: int) -> int:
        """Slots that the request of a row owns outside the tree; stock: without compression."""
        record, surplus = self.records.get(row), self.surplus.get(row)
        private = stock if record is None else record.private_tokens(stock)
        return private if surplus is None else private + surplus.numel()

    def released(self, req: Any, record: CompressionRecord) -> None:
        """The prefill's result is known and the visual slots are given back: report."""
        state_of(req).report = record.report()
        self._made_room = True
        record.selected = None  # kept by the replica, if there is one
        self.metrics.compressed(record)

    def keeps_whole(self, req: Any) -> bool:
        """Whether a request was not packed when its prefill ended, and has not been since."""
        return state_of(req).whole is not None and req.kv.req_pool_idx not in self.records

    def prefilled(self, req: Any) -> None:
        """The result of a prefill, or of one of its chunks, has been processed."""
        if self.pressure.enlist(req):
            # What can be packed is room for others.
            self._made_room = True

    def unlocked(self) -> None:
        """Slots of the tree that a copy to or from host memory held may be evicted again."""
        self._made_room = True

    def made_room(self) -> bool:
        """Whether visual slots have been given back since this was last asked."""
        made, self._made_room = self._made_room, False
        return made

    def forget(self, req: Any) -> CompressionRecord | None:
        """Drop the state of a request whose row is being freed."""
        packs = state_of(req).packs
        self.pressure.forget(req)
        state_of(req).restart()
        record = self.records.pop(req.kv.req_pool_idx, None)
        if record is None or record.budgets is None:
            if req.finished():
                state_of(req).captured = None
            return record
        if self.shadows is not None:
            self.shadows.collect(req, record, packs)
        if record.stage is Stage.RELEASED and not record.reused:
            self.metrics.finished(record)
        return record


def extends_replica(req: Any) -> bool:
    """Whether the match of a request ends on, or below, a replica."""
    return req.last_node is not None and req.last_node.replica is not None


def same_frames(req: Any, others: Sequence[Any]) -> bool:
    """Whether a request's videos have as many frames as those of others, where both have any."""
    ours, theirs = frames_of(req), set().union(*map(frames_of, others))
    return not ours or not theirs or ours == theirs


def frames_of(req: Any) -> set[int]:
    """Frames of each of a request's videos; of those that are [videos, frames, C, H, W]."""
    items = req.multimodal_inputs.mm_items if req.multimodal_inputs else ()
    features = [item.feature for item in items if item.is_video()]
    return {len(f[0]) for f in features if isinstance(f, torch.Tensor) and f.dim() == 5}


def chunks(batch: Any) -> Iterator[tuple[Any, Chunk]]:
    """Each request of a prefill batch, and what is computed of it."""
    first_row = 0
    for req, begin, length in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True):
        yield req, Chunk(begin, begin + length, first_row)
        first_row += length
