# SPDX-License-Identifier: Apache-2.0
"""The pieces together: one `Compressor` a scheduler process, called from the hooks."""

from __future__ import annotations

import dataclasses
import time
import zlib
from array import array
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import MM_PAD_SHIFT_VALUE
from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS
from sglang.srt.mem_cache.common import evict_from_tree_cache
from sglang.srt.model_executor.runner_utils.capture_mode import get_capture_attention_variant
from sglang.srt.runtime_context import get_parallel

from aircache_sglang.config import MASS_LADDER, AirCacheConfig
from aircache_sglang.engine.backend import AttentionState, Decoder, Extender, adopt
from aircache_sglang.engine.heads import TensorParallelHeads
from aircache_sglang.engine.kv_pool import LayerContiguousKVPool
from aircache_sglang.engine.metrics import Metrics
from aircache_sglang.policy import columns
from aircache_sglang.runtime.attention_sum import AttentionSum, SumWork
from aircache_sglang.runtime.choice import policy_of
from aircache_sglang.runtime.compress import CompressionPass, Job, PassInputs, TorchPass
from aircache_sglang.runtime.decode import TorchDecoder
from aircache_sglang.runtime.extend import ExtendJob, TorchExtender
from aircache_sglang.runtime.gate import pays_off
from aircache_sglang.runtime.record import CompressionRecord, Intent, Replica, Stage
from aircache_sglang.runtime.spans import bare_spans, read_prompt
from aircache_sglang.runtime.stash import BatchStash, QueryStash
from aircache_sglang.runtime.table import CompressionTable
from aircache_sglang.runtime.transfer import to_device


@dataclasses.dataclass(slots=True)
class Collected:
    """What the policy needs of one request's prefill, while that runs.

    visual: the queries from the first visual token on that the policy looks at.
    """

    instruction: QueryStash
    visual: QueryStash | None = None
    attention: AttentionSum | None = None

    @classmethod
    def for_intent(cls, intent: Intent) -> Collected:
        policy, prompt = policy_of(intent.config), intent.prompt
        found = cls(QueryStash(prompt.instruction))
        if policy.visual_window:
            found.visual = QueryStash((intent.first_query, prompt.end))
        if policy.accumulates:
            found.attention = AttentionSum(prompt.start, prompt.length, prompt.visual_positions())
        return found

    def job(self, record: CompressionRecord, n_layers: int) -> Job:
        """The pass's work, once the prefill has ended."""
        job = Job(record, self.instruction.queries())
        if self.visual is not None:
            q, lo = self.visual.queries(), self.visual.lo
            spans = [(max(a, lo) - lo, b - lo) for a, b in record.intent.prompt.spans if b > lo]
            q_visual = torch.cat([q[:, a:b] for a, b in spans], dim=1)
            job = dataclasses.replace(job, q_visual=q_visual)
        if self.attention is not None:
            job = dataclasses.replace(job, accumulated=self.attention.stacked(n_layers))
        return job


class Compressor:
    """Owns the records, the table and the policy of one model runner.

    Attributes that it sets on SGLang's requests: `aircache_intent` (the decision), `aircache_stash`
    (what is collected while the prefill runs), `aircache_info` (the report), `aircache_reason`
    (why it was left alone), `aircache_bare_spans`.
    """

    def __init__(self, config: AirCacheConfig, decode: str, model_runner: Any) -> None:
        """decode: `torch`, `triton` or `flashinfer` (a pass in Triton)."""
        pool = model_runner.token_to_kv_pool
        if not isinstance(pool, LayerContiguousKVPool):
            raise RuntimeError(
                f"--kv-policy {config.policy} needs its own KV pool, but SGLang built "
                f"{type(pool).__name__}; run `aircache doctor` and report the model"
            )
        self.config = config
        self.pool = pool
        self.req_to_token: torch.Tensor = model_runner.req_to_token_pool.req_to_token
        self.records: dict[int, CompressionRecord] = {}
        # Slots by row that were reserved for columns and are not needed, until the tree frees them.
        self.surplus: dict[int, torch.Tensor] = {}
        self._made_room = False
        self.table = CompressionTable(self.req_to_token, pool.layer_num)
        heads = TensorParallelHeads(
            get_parallel().tp_group, model_runner.model_config.get_total_num_kv_heads()
        )
        model = model_runner.model
        self.metrics = Metrics.create(config.policy)
        layers = attention_layers(model)
        scale = attention_scale(layers)
        cells = PassInputs(pool.k_all, pool.v_all, self.table, heads, scale)
        self.compress: CompressionPass
        decoder: Decoder
        extender: Extender
        if decode == "torch":
            self.compress = TorchPass(cells)
            decoder = TorchDecoder(pool, self.table)
            extender = TorchExtender(pool, self.table)
        else:
            # Imported here: a CPU server needs no Triton, and most need no FlashInfer.
            from aircache_sglang.runtime.flashinfer_decode import FlashInferDecoder
            from aircache_sglang.runtime.kernel_decode import KernelDecoder
            from aircache_sglang.runtime.kernel_extend import KernelExtender
            from aircache_sglang.runtime.kernel_pass import KernelPass

            self.compress = KernelPass(cells)
            if decode == "triton":
                decoder = KernelDecoder(pool, self.table)
            else:
                decoder = FlashInferDecoder(
                    pool,
                    self.table,
                    n_q=layers[0].tp_q_head_num,
                    q_dtype=model_runner.dtype,
                    scale=scale,
                )
            extender = KernelExtender(pool, self.table)
        self.attention = AttentionState(pool, decoder, extender, get_capture_attention_variant)
        adopt(model_runner.attn_backend, self.attention)

    def intent(self, req: Any) -> Intent | None:
        """Decide, once a prompt, whether and how to compress it; from host knowledge alone."""
        known = getattr(req, "aircache_intent", None)
        # An abort replaces the prompt by a stub (schedule_batch.py, set_finish_with_abort).
        if known is None or known[0] != len(req.origin_input_ids):
            decision = self._decide(req)
            if isinstance(decision, str):
                self._left_alone(req, decision)
                decision = None
            known = req.aircache_intent = (len(req.origin_input_ids), decision)
        intent: Intent | None = known[1]
        return intent

    def _decide(self, req: Any) -> Intent | str | None:
        """An intent, a reason to leave a request with pictures alone, or None without pictures."""
        if req.multimodal_inputs is None:
            return None
        inputs = req.multimodal_inputs
        bare_ids = {inputs.im_token_id, inputs.video_token_id} - {None}
        prompt = read_prompt(
            req.origin_input_ids,
            inputs.mm_items,
            MM_PAD_SHIFT_VALUE,
            bare_ids=bare_ids,
            expected=None if inputs.image_pad_len is None else sum(inputs.image_pad_len),
        )
        if prompt is None or isinstance(prompt, str):
            return prompt
        params = req.sampling_params
        try:
            config = self.config.with_overrides(params.custom_params)
        except ValueError:
            # The tokenizer manager answers these with HTTP 400; one that came another way must not
            # end the scheduler.
            return "bad_overrides"
        if config.policy == "none":
            return "policy_none"
        if prompt.n_visual < config.min_visual_tokens:
            return "few_visual_tokens"
        if config.ablation.audience == "all":
            prompt = prompt.unified()
        retention = config.retention if config.min_visual_mass is None else MASS_LADDER[-1]
        m = columns(retention, prompt.n_visual)
        if m >= prompt.n_visual:
            return "keeps_all"
        if params.max_new_tokens <= 1:
            return "no_decode"
        if (
            req.input_embeds is not None
            or req.positional_embed_overrides is not None
            or req.skip_radix_cache_insert
            or req.beam_group is not None
        ):
            return "unsupported_request"
        salt = zlib.crc32(array("q", req.origin_input_ids).tobytes())
        intent = Intent(config, prompt, m, salt=salt)
        # A request that only fits an empty pool without its columns would wait for ever.
        peak = prompt.length + min(params.max_new_tokens, CLIP_MAX_NEW_TOKENS) + intent.n_extra
        if peak + 2 * self.pool.page_size >= self.pool.size:
            return "pool_too_small"
        # A replica serves later turns too, whose answers nobody knows.
        if (
            config.gate == "auto"
            and not intent.reuses
            and not pays_off(prompt.n_visual, m, intent.n_queries, params.max_new_tokens)
        ):
            return "no_gain"
        return intent

    def bare_spans(self, req: Any) -> list[tuple[int, list[int]]]:
        """Placeholders that a key of the tree needs in place of the prompt's own tokens."""
        known: list[tuple[int, list[int]]] | None = getattr(req, "aircache_bare_spans", None)
        if known is None:
            inputs = req.multimodal_inputs
            known = []
            if inputs is not None:
                known = bare_spans(req.origin_input_ids, inputs.mm_items, MM_PAD_SHIFT_VALUE)
            # SGLang drops the inputs of a finished request.
            req.aircache_bare_spans = known
        return known

    def decline(self, req: Any, reason: str) -> None:
        """Serve this life of a request uncompressed after all."""
        self._left_alone(req, reason)
        req.aircache_intent = (len(req.origin_input_ids), None)

    def _left_alone(self, req: Any, reason: str) -> None:
        self.metrics.left_alone(reason)
        req.aircache_reason = reason

    def slots_to_reserve(self, req: Any, extend_input_len: int | None) -> int:
        """Slots that admission must hold back for the columns if this extend ends the prefill."""
        intent = self.intent(req)
        total = len(req.full_untruncated_fill_ids)
        extends = req.last_node is not None and req.last_node.replica is not None
        if (
            intent is None
            or extends
            or (extend_input_len is not None and req.prefix_len + extend_input_len < total)
        ):
            return 0
        return intent.n_extra

    def allocate_columns(self, batch: Any) -> None:
        """Open a record, and allocate its slots, for each prefill that ends in this batch."""
        for req in batch.reqs:
            row, replica = req.kv.req_pool_idx, req.last_node.replica
            # Once a prompt, as SGLang counts `cached_tokens`: its first chunk before a retraction.
            if req.extend_batch_idx == 1 and req.prefix_len and not req.retracted_stain:
                self.metrics.hit(req.prefix_len, compressed=replica is not None)
            if replica is not None:
                if row not in self.records:
                    self._extend_replica(req, replica.content)
                continue
            intent = self.intent(req)
            if intent is None or req.extend_end < len(req.full_untruncated_fill_ids):
                continue
            allocator = batch.tree_cache.token_to_kv_pool_allocator
            evict_from_tree_cache(batch.tree_cache, intent.n_extra)
            extra = allocator.alloc(intent.n_extra)
            if extra is None:
                self.decline(req, "no_free_slots")
                continue
            assert row not in self.records, f"row {row} is still compressed"
            self.records[row] = CompressionRecord(
                intent=intent,
                row=row,
                originals=self.req_to_token[row, : intent.prompt.end].to(torch.int64, copy=True),
                # A view would keep the allocator's whole list of free slots alive.
                extra=extra.to(torch.int64, copy=True),
                exact_tail=len(req.full_untruncated_fill_ids) > intent.prompt.length,
            )

    def _extend_replica(self, req: Any, replica: Replica) -> None:
        """Open a record of a request whose prefix runs through a replica that the tree owns."""
        own = self.intent(req)
        assert own is not None, "a replica was matched for a request that is not compressed"
        intent = dataclasses.replace(replica.intent, config=own.config)
        record = CompressionRecord(
            intent=intent,
            row=req.kv.req_pool_idx,
            originals=replica.slots[:0],
            extra=replica.slots[: intent.n_extra],
            stage=Stage.RELEASED,
            shared=True,
            reused=True,
            budgets=replica.budgets,
            mass=replica.mass,
            selected=replica.selected if own.config.return_selection else None,
        )
        self.records[record.row] = record
        req.aircache_info = record.report()

    def run_forward(self, batch: Any, forward: Callable[[], Any]) -> Any:
        """Run one forward; around a prefill, stash queries and then compress what it ended."""
        if batch is None or batch.forward_mode.is_idle():
            return forward()
        if not batch.forward_mode.is_extend():
            self.attention.records = self._decoded(batch)
            return forward()
        self.attention.records = ()
        self.table.clear(batch.req_pool_indices)
        self.attention.extends = self._extends(batch)
        if self.attention.extends:
            self.attention.extender.plan(self.attention.extends)
        self.attention.queries, self.attention.sum_work = self._collect(batch)
        try:
            result = forward()
        finally:
            self.attention.queries = None
            self.attention.sum_work = self.attention.extends = ()
        self._compress(batch.reqs)
        return result

    def _decoded(self, batch: Any) -> list[CompressionRecord | None]:
        """What a decode step reads, one a row; empty if nothing is compressed.

        Behind the requests' rows stand those of beams (beam_search/batch_tail.py). No prefill of
        their own has cleared what an earlier request left of them in the table.
        """
        records = [self.records.get(req.kv.req_pool_idx) for req in batch.reqs]
        if not any(records):
            return []
        beams = batch.req_pool_indices[len(records) :]
        if len(beams):
            self.table.clear(beams)
        return [*records, *[None] * len(beams)]

    def _extends(self, batch: Any) -> list[ExtendJob]:
        """The requests that extend a replica, entered in the table."""
        extends: list[ExtendJob] = []
        first_row = 0
        for req, prefix_len, extend_len in zip(
            batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True
        ):
            record = self.records.get(req.kv.req_pool_idx)
            if record is not None and record.reused:
                assert record.budgets is not None, "a replica has its budgets"
                prompt = record.intent.prompt
                assert prefix_len >= prompt.length, "a replica is extended behind its instruction"
                budgets = to_device(record.budgets.tolist(), self.pool.k_all.device, torch.int64)
                self.table.set(record.row, prompt.start, prompt.n_visual, budgets)
                source = slice(first_row, first_row + extend_len)
                extends.append(ExtendJob(record, prefix_len, prefix_len + extend_len, source))
            first_row += extend_len
        return extends

    def _collect(self, batch: Any) -> tuple[BatchStash | None, list[SumWork]]:
        """What is to be kept, and to be summed, of this forward."""
        queries = BatchStash(self.pool.layer_num)
        sums: list[SumWork] = []
        first_row = 0
        for req, prefix_len, extend_len in zip(
            batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True
        ):
            intent = self.intent(req)
            # What extends a replica is not scored.
            if intent is not None and req.last_node.replica is None:
                found = getattr(req, "aircache_stash", None)
                if found is None:
                    found = req.aircache_stash = Collected.for_intent(intent)
                computed = (prefix_len, prefix_len + extend_len, first_row)
                for stash in (found.instruction, found.visual):
                    if stash is not None:
                        stash.claim(*computed, queries)
                if found.attention is not None:
                    row = self.req_to_token[req.kv.req_pool_idx]
                    part = found.attention.claim(*computed, row)
                    if part is not None:
                        sums.append(part)
            first_row += extend_len
        return queries if len(queries) else None, sums

    def _compress(self, reqs: list[Any]) -> None:
        jobs: list[Job] = []
        started = time.perf_counter()
        for req in reqs:
            record = self.records.get(req.kv.req_pool_idx)
            if record is not None and record.budgets is None:
                found: Collected = req.aircache_stash
                jobs.append(found.job(record, self.pool.layer_num))
                req.aircache_stash = None
        if jobs:
            self.compress(jobs)
            for job in jobs:
                job.record.seconds = (time.perf_counter() - started) / len(jobs)
            for req in reqs:
                self._take_surplus(req)

    def _take_surplus(self, req: Any) -> None:
        """Note what a pass did not need; a request that keeps its picture is as if uncompressed."""
        row = req.kv.req_pool_idx
        record = self.records.get(row)
        if record is None or record.surplus is None:
            return
        self.surplus[row], record.surplus = record.surplus, None
        if record.budgets is None:
            del self.records[row]
            self.decline(req, "mass_not_reached")

    def private_tokens(self, row: int, stock: int) -> int:
        """Slots that the request of a row owns outside the tree; stock: without compression."""
        record, surplus = self.records.get(row), self.surplus.get(row)
        private = stock if record is None else record.private_tokens(stock)
        return private if surplus is None else private + surplus.numel()

    def released(self, req: Any, record: CompressionRecord) -> None:
        """The prefill's result is known and the visual slots are given back: report."""
        req.aircache_info = record.report()
        self._made_room = True
        record.selected = None  # kept by the replica, if there is one
        self.metrics.compressed(record)

    def made_room(self) -> bool:
        """Whether visual slots have been given back since this was last asked."""
        made, self._made_room = self._made_room, False
        return made

    def forget(self, req: Any) -> CompressionRecord | None:
        """Drop the state of a request whose row is being freed; a retracted one starts anew."""
        req.aircache_intent = req.aircache_stash = None
        record = self.records.pop(req.kv.req_pool_idx, None)
        if record is not None and record.stage is Stage.RELEASED and not record.reused:
            self.metrics.finished(record)
        return record


def attention_layers(model: torch.nn.Module) -> list[Any]:
    """The RadixAttention modules of the language model."""
    from sglang.srt.layers.radix_attention import RadixAttention

    # SGLang's Transformers fallback keeps its layers in a plain dictionary.
    aside = getattr(model, "attention_instances", {}).values()
    return [m for m in (*model.modules(), *aside) if isinstance(m, RadixAttention)]


def attention_scale(layers: list[Any]) -> float:
    """The softmax scale that all attention layers share.

    Raises RuntimeError for layers that the compression pass would score, or decode, wrongly.
    """
    from sglang.srt.layers.radix_attention import AttentionType

    scales = {layer.scaling for layer in layers}
    if len(scales) != 1:
        raise RuntimeError(
            f"--kv-policy aircache needs one softmax scale in all layers, found {sorted(scales)}"
        )
    for layer in layers:
        factors = {getattr(layer, name, None) for name in ("k_scale_float", "v_scale_float")}
        if not factors <= {None, 1.0}:
            raise RuntimeError(
                "--kv-policy aircache needs a checkpoint without scale factors for KV, and layer "
                f"{layer.layer_id} has {sorted(factors, key=str)}; serve it without --kv-policy"
            )
        windowed = layer.sliding_window_size is not None and layer.sliding_window_size > -1
        if windowed or layer.logit_cap or layer.attn_type != AttentionType.DECODER:
            raise RuntimeError(
                "--kv-policy aircache needs causal attention over the whole context, without a "
                f"window or a logit cap; layer {layer.layer_id} has another"
            )
    return float(scales.pop())
