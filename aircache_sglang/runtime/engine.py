# SPDX-License-Identifier: Apache-2.0
"""The pieces together: one `Compressor` a scheduler process, called from the hooks."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Hashable
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import MM_PAD_SHIFT_VALUE
from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS
from sglang.srt.mem_cache.common import evict_from_tree_cache
from sglang.srt.runtime_context import get_parallel

from aircache_sglang.config import AirCacheConfig
from aircache_sglang.policy import Policy, columns, get_policy
from aircache_sglang.runtime.attention import AttentionState, adopt
from aircache_sglang.runtime.compress import compress
from aircache_sglang.runtime.heads import TensorParallelHeads
from aircache_sglang.runtime.kv_pool import LayerContiguousKVPool
from aircache_sglang.runtime.metrics import Metrics
from aircache_sglang.runtime.record import CompressionRecord, Intent, Replica, Stage
from aircache_sglang.runtime.spans import read_prompt
from aircache_sglang.runtime.stash import QueryStash, StashWork
from aircache_sglang.runtime.table import CompressionTable


class Compressor:
    """Owns the records, the table and the policy of one model runner.

    Attributes that it sets on SGLang's requests: `aircache_intent` (the decision), `aircache_stash`
    (queries while the prefill runs), `aircache_info` (the report).
    """

    def __init__(self, policy: str, config: AirCacheConfig, model_runner: Any) -> None:
        pool = model_runner.token_to_kv_pool
        if not isinstance(pool, LayerContiguousKVPool):
            raise RuntimeError(
                f"--kv-policy {policy} needs its own KV pool, but SGLang built "
                f"{type(pool).__name__}; run `aircache doctor` and report the model"
            )
        self.policy_name = policy
        self.config = config
        self.pool = pool
        self.req_to_token: torch.Tensor = model_runner.req_to_token_pool.req_to_token
        self.records: dict[int, CompressionRecord] = {}
        self.table = CompressionTable(
            self.req_to_token.shape[0], pool.layer_num, self.req_to_token.device
        )
        self.heads = TensorParallelHeads(
            get_parallel().tp_group, model_runner.model_config.get_total_num_kv_heads()
        )
        self.metrics = Metrics.create(policy)
        self.attention = AttentionState(pool, self.table, self.records)
        adopt(model_runner.attn_backend, self.attention)
        self.scale = attention_scale(model_runner.model)

    def intent(self, req: Any) -> Intent | None:
        """Decide, once a prompt, whether and how to compress it; from host knowledge alone."""
        known = getattr(req, "aircache_intent", None)
        # An abort replaces the prompt by a stub (schedule_batch.py, set_finish_with_abort).
        if known is None or known[0] != len(req.origin_input_ids):
            decision = self._decide(req)
            if isinstance(decision, str):
                self.metrics.left_alone(decision)
                decision = None
            known = req.aircache_intent = (len(req.origin_input_ids), decision)
        intent: Intent | None = known[1]
        return intent

    def _decide(self, req: Any) -> Intent | str | None:
        """An intent, a reason to leave a request with pictures alone, or None without pictures."""
        if req.multimodal_inputs is None:
            return None
        prompt = read_prompt(
            req.origin_input_ids, req.multimodal_inputs.mm_items, MM_PAD_SHIFT_VALUE
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
        m = columns(config.retention, prompt.n_visual)
        if prompt.n_visual < config.min_visual_tokens:
            return "few_visual_tokens"
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
        intent = Intent(config, prompt, m)
        # A request that only fits an empty pool without its columns would wait for ever.
        peak = prompt.length + min(params.max_new_tokens, CLIP_MAX_NEW_TOKENS) + intent.n_extra
        if peak + 2 * self.pool.page_size >= self.pool.size:
            return "pool_too_small"
        return intent

    def variant(self, intent: Intent) -> tuple[Hashable, ...]:
        """What a replica must have been packed with to be extended."""
        return (self.policy_name, *intent.config.variant())

    def decline(self, req: Any, reason: str) -> None:
        """Serve this life of a request uncompressed after all."""
        self.metrics.left_alone(reason)
        req.aircache_intent = (len(req.origin_input_ids), None)

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
            # Once for each life of a request: its first chunk.
            if req.extend_batch_idx == 1 and req.prefix_len:
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
                extra=extra.to(torch.int64),
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
            order=replica.order if own.config.return_selection else None,
        )
        self.records[record.row] = record
        req.aircache_info = record.report(self.policy_name)

    def run_forward(self, batch: Any, forward: Callable[[], Any]) -> Any:
        """Run one forward; around a prefill, stash queries and then compress what it ended."""
        if batch is None or not batch.forward_mode.is_extend():
            return forward()
        self.table.clear(batch.req_pool_indices)
        for req in batch.reqs:
            record = self.records.get(req.kv.req_pool_idx)
            if record is not None and record.reused:
                assert record.budgets is not None, "a replica has its budgets"
                prompt = record.intent.prompt
                self.table.set(record.row, prompt.start, prompt.n_visual, record.budgets)
        self.attention.stash_work = self._stash_work(batch)
        try:
            result = forward()
        finally:
            self.attention.stash_work = ()
        for req in batch.reqs:
            record = self.records.get(req.kv.req_pool_idx)
            if record is not None and record.budgets is None:
                self._compress(req, record)
        return result

    def _stash_work(self, batch: Any) -> list[StashWork]:
        works: list[StashWork] = []
        first_row = 0
        for req, prefix_len, extend_len in zip(
            batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True
        ):
            intent = self.intent(req)
            # What extends a replica is not scored.
            if intent is not None and req.last_node.replica is None:
                stash = getattr(req, "aircache_stash", None)
                if stash is None:
                    stash = req.aircache_stash = QueryStash(intent.prompt.instruction)
                work = stash.claim(prefix_len, prefix_len + extend_len, first_row)
                if work is not None:
                    works.append(work)
            first_row += extend_len
        return works

    def _compress(self, req: Any, record: CompressionRecord) -> None:
        started = time.perf_counter()
        stash: QueryStash = req.aircache_stash
        compress(
            record,
            policy_of(self.policy_name, record.intent.config),
            stash.stacked(self.pool.layer_num),
            self.pool.k_all,
            self.pool.v_all,
            self.req_to_token,
            self.table,
            self.heads,
            self.scale,
        )
        req.aircache_stash = None
        record.seconds = time.perf_counter() - started

    def released(self, req: Any, record: CompressionRecord) -> None:
        """The prefill's result is known and the visual slots are given back: report."""
        req.aircache_info = record.report(self.policy_name)
        record.order = None  # kept by the replica, if there is one
        self.metrics.compressed(record)

    def forget(self, req: Any) -> CompressionRecord | None:
        """Drop the state of a request whose row is being freed; a retracted one starts anew."""
        req.aircache_intent = req.aircache_stash = None
        record = self.records.pop(req.kv.req_pool_idx, None)
        if record is not None and record.stage is Stage.RELEASED and not record.reused:
            self.metrics.finished(record)
        return record


def policy_of(name: str, config: AirCacheConfig) -> Policy:
    """The policy object that a request's configuration asks for."""
    window, alpha = config.scoring_window()
    return get_policy(name, alpha=alpha, elite=config.elite, budget=config.budget, window=window)


def attention_scale(model: torch.nn.Module) -> float:
    """The softmax scale that all attention layers of the language model share."""
    from sglang.srt.layers.radix_attention import RadixAttention

    scales = {m.scaling for m in model.modules() if isinstance(m, RadixAttention)}
    if len(scales) != 1:
        raise RuntimeError(
            f"--kv-policy aircache needs one softmax scale in all layers, found {sorted(scales)}"
        )
    return float(scales.pop())
