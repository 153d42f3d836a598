# SPDX-License-Identifier: Apache-2.0
"""`--aircache-shadow`: a share of the compressed answers, computed a second time on the full KV.

While an answer is generated the top log-probabilities of its model are kept as they are before
temperature, penalties and grammars. When it has ended it waits, with its pictures, until nothing
else is to be done; then prompt and answer are prefilled as one request of our own, whose input
log-probabilities are those of the full KV along the same answer.

All that is decided follows from the scheduler's state, so that tensor-parallel ranks agree.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import logging
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.disaggregation.utils import prepare_abort
from sglang.srt.managers.mm_utils import extend_mrope_positions_for_retracted_request
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req
from sglang.srt.mem_cache.common import release_kv_cache
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils import flatten_nested_list

from aircache_sglang.config import MASS_LADDER, REQUEST_KEY, AirCacheConfig
from aircache_sglang.engine.heads import TensorParallelHeads
from aircache_sglang.engine.request import state_of
from aircache_sglang.engine.shadow_metrics import ShadowMetrics
from aircache_sglang.runtime.agreement import Comparison, Tally
from aircache_sglang.runtime.decide import Reason
from aircache_sglang.runtime.guard import RUNGS, Guard
from aircache_sglang.runtime.pages import page_ceil
from aircache_sglang.runtime.record import CompressionRecord
from aircache_sglang.runtime.transfer import to_device

logger = logging.getLogger(__name__)

# Log-probabilities of a token that are compared, and tokens of an answer.
TOP = 20
ANSWER_TOKENS = 256
# Answers that wait for an idle moment, and the bytes of their pictures; the oldest go first.
MOST_WAITING = 32
MOST_BYTES = 256 << 20
MOST_WORST = 10
_OTHER = "other"

# The top log-probabilities of one token, float32 [TOP], and their ids, int64 [TOP].
Row = tuple[torch.Tensor, torch.Tensor]


@dataclasses.dataclass(slots=True)
class Captured:
    """What is kept of an answer that is being generated.

    items: the prompt's pictures, of which SGLang's own lose their pixels before the request's KV is
    released (batch_result_processor.py); epoch: of the weights; rows: by index in the answer.
    """

    items: list[Any]
    epoch: int
    rows: dict[int, Row] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True)
class Sample:
    """A finished answer that waits for its comparison.

    input_ids: prompt and answer; indices: in the answer, of the tokens to compare, ascending;
    rows: what the compressed KV gave for them; complete: whether all pictures are still here;
    media_end: one past the last token of a picture or a sound; config: how it was compressed.
    """

    rid: str
    config: AirCacheConfig
    retention: float
    input_ids: Any
    n_prompt: int
    indices: list[int]
    rows: list[Row]
    inputs: Any
    media_end: int
    complete: bool
    n_bytes: int
    extra_key: str | None
    cache_salt: str | None


class ShadowReq(Req):
    """The request of our own; it never streams, and nothing of it enters the radix tree."""

    sample: Sample


class Shadows:
    """What one scheduler process samples, keeps, runs and has found."""

    def __init__(
        self, config: AirCacheConfig, heads: TensorParallelHeads, metrics: ShadowMetrics
    ) -> None:
        self._share = config.shadow
        self._heads = heads
        self._metrics = metrics
        self._waiting: collections.deque[Sample] = collections.deque()
        self._bytes = 0
        self._current: ShadowReq | None = None
        self._n_started = 0
        self._epoch = 0
        self._tallies: dict[tuple[str, str], Tally] = {}
        self._dropped: collections.Counter[str] = collections.Counter()
        self._worst: list[dict[str, Any]] = []
        # Labels of a metric, of which clients must not make any number.
        shares = {*MASS_LADDER, *RUNGS, *config.ladder(), *config.rungs}
        self._retentions = {str(share) for share in shares}
        self.config = config
        self._guard = None
        if config.guard is not None:
            self._guard = Guard(config.guard, config.retention)
            metrics.guarded(config.retention, None)

    # While an answer is generated

    def is_sampled(self, req: Any) -> bool:
        """Whether a request belongs to the share; a hash, the same on every rank."""
        return zlib.crc32(str(req.rid).encode()) < self._share * (1 << 32)

    def capture(self, batch: Any, logits: torch.Tensor) -> None:
        """Keep what the compressed KV says of the next token of each sampled request.

        logits: [rows, vocabulary] of the forward, the requests' first, as the model gave them.
        """
        chosen: list[tuple[int, dict[int, Row], int]] = []
        lengths: list[int] | None = None
        for row, req in enumerate(batch.reqs):
            state = state_of(req)
            if state.intent is None or req.lora_id is not None or not self.is_sampled(req):
                continue
            lengths = batch.seq_lens_cpu.tolist() if lengths is None else lengths
            index = lengths[row] - len(req.origin_input_ids)
            # Below 0: a chunk that does not end the prompt.
            if 0 <= index < ANSWER_TOKENS:
                if state.captured is None:
                    items = list(map(copy.copy, req.multimodal_inputs.mm_items))
                    state.captured = Captured(items, self._epoch)
                chosen.append((row, state.captured.rows, index))
        if chosen:
            rows = to_device((row for row, _, _ in chosen), logits.device, torch.int64)
            drawn = logits[rows].float()
            top = drawn.topk(min(TOP, logits.shape[1]))
            values = top.values - drawn.logsumexp(dim=-1, keepdim=True)
            for i, (_, captured, index) in enumerate(chosen):
                captured[index] = (values[i], top.indices[i])

    def left_alone(self, req: Any, reason: Reason) -> None:
        """A request is served whole; at retention 1 the guard counts those that it would have."""
        if self._guard is None or self._guard.retention < 1 or reason is not Reason.KEEPS_ALL:
            return
        if REQUEST_KEY not in (req.sampling_params.custom_params or {}) and self.is_sampled(req):
            self._moved(self._guard.left_whole())

    def collect(
        self, req: Any, record: CompressionRecord, packs: Sequence[CompressionRecord]
    ) -> None:
        """A packed request gives its row back; a sampled one that has its answer is kept.

        packs: of a request that was packed under pressure, in order.
        """
        if not req.finished():
            return
        state = state_of(req)
        captured, state.captured = state.captured, None
        if isinstance(req.finished_reason, FINISH_ABORT) or not self.is_sampled(req):
            return
        if req.lora_id is not None:
            # Its adapter might be gone by then.
            self._drop("adapter")
            return
        if captured is not None and captured.epoch != self._epoch:
            self._drop("weights_changed")
            return
        answer = req.output_ids_through_stop[:ANSWER_TOKENS]
        first = 0 if record.reused else min(r.packed_at for r in (record, *packs))
        indices = [i for i in range(first, len(answer)) if captured and i in captured.rows]
        if not indices:
            # Nothing of it was drawn from packed cells.
            return
        assert captured is not None, "there are indices"
        # A copy, since models keep fields of their own on them (models/llava.py).
        inputs, items = copy.copy(req.multimodal_inputs), captured.items
        prompt = req.origin_input_ids
        ids = prompt + answer[: indices[-1] + 1]
        positions = inputs.mrope_positions
        if positions is not None:
            more = len(ids) - positions.shape[1]
            positions = extend_mrope_positions_for_retracted_request(positions, more)
        inputs.mm_items, inputs.mrope_positions = items, positions
        inputs.mrope_position_delta_repeated_cache = None
        complete = all(map(_is_here, items))
        if not complete:
            for item in items:
                item.feature = None
        intent = record.intent
        self._keep(
            Sample(
                rid=str(req.rid),
                config=dataclasses.replace(intent.config, return_selection=False),
                retention=intent.retention or intent.config.retention,
                input_ids=ids,
                n_prompt=len(prompt),
                indices=indices,
                rows=[captured.rows[i] for i in indices],
                inputs=inputs,
                media_end=max(
                    intent.prompt.end, *(end + 1 for item in items for _, end in item.offsets or ())
                ),
                complete=complete,
                n_bytes=sum(map(_bytes_of, items)),
                extra_key=req.extra_key,
                cache_salt=req.cache_salt,
            )
        )

    def _keep(self, sample: Sample) -> None:
        self._waiting.append(sample)
        self._bytes += sample.n_bytes
        while len(self._waiting) > MOST_WAITING or self._bytes > MOST_BYTES:
            self._next()
            self._drop("queue_full")

    def _next(self) -> Sample:
        sample = self._waiting.popleft()
        self._bytes -= sample.n_bytes
        return sample

    # In an idle moment

    def start(self, scheduler: Any) -> None:
        """Queue one comparison if the server has nothing else to do."""
        if self._current is not None or not self._waiting or not scheduler.is_fully_idle():
            return
        weights = scheduler.weight_updater
        if weights.offload_tags or weights._session is not None:
            # They are not there, or between old and new.
            self.forget_weights()
            return
        if scheduler.flush_wrapper._pending is not None:
            return  # it waits for an idle moment, too
        while self._waiting and self._current is None:
            sample = self._next()
            req = self._request(sample, scheduler)
            obstacle = self._obstacle(req, scheduler)
            if obstacle is None:
                self._current = req
                scheduler._add_request_to_queue(req)
            else:
                self._drop(obstacle)

    def _request(self, sample: Sample, scheduler: Any) -> ShadowReq:
        """A prefill of prompt and answer, and of one token more, which SGLang insists on."""
        params = SamplingParams(max_new_tokens=1, temperature=0.0)
        params.normalize(None)
        self._n_started += 1
        req = ShadowReq(
            *(f"aircache-shadow-{self._n_started}", "", sample.input_ids, params),
            return_logprob=True,
            top_logprobs_num=TOP,
            eos_token_ids=scheduler.model_config.hf_eos_token_id,
            vocab_size=scheduler.model_config.vocab_size,
            extra_key=sample.extra_key,
            cache_salt=sample.cache_salt,
        )
        req.sample = sample
        req.tokenizer = scheduler.tokenizer
        req.multimodal_inputs = sample.inputs
        req.skip_radix_cache_insert = True
        # The first of them is not given (logprob_result_processor.py).
        req.logprob_start_len = sample.n_prompt + sample.indices[0] - 1
        state_of(req).decided(req, None)
        return req

    def _obstacle(self, req: ShadowReq, scheduler: Any) -> str | None:
        """Why it cannot run now: it evicts nothing, and computes no picture that is gone."""
        if len(req.origin_input_ids) >= scheduler.max_req_len:
            return "too_long"
        # Admission takes the copy of a recurrent state; one that is dropped here takes none.
        req.init_next_round_input(scheduler.tree_cache, cow_mamba=False)
        if req.prefix_len < req.sample.media_end and not req.sample.complete:
            return "no_pictures"
        page_size = scheduler.page_size
        need = page_ceil(len(req.origin_input_ids) + 1, page_size) + page_size - req.prefix_len
        if need > scheduler.token_to_kv_pool_allocator.available_size():
            return "no_room"
        return None

    def admitted(self, scheduler: Any) -> None:
        """The scheduler has looked at its queue: what it has not taken does not stay there."""
        if self._current is not None and self._current in scheduler.waiting_queue:
            scheduler.waiting_queue.remove(self._current)
            self._end("no_room")

    def yield_to_requests(self, scheduler: Any) -> None:
        """Something has come for the scheduler, which finds nothing of ours in flight.

        A chunk that was launched is waited for, as any forward is; if it was the last the
        comparison is made.
        """
        req, last = self._current, scheduler.last_batch
        if req is not None and scheduler.enable_overlap and scheduler.result_queue:
            scheduler.process_batch_result(*scheduler.result_queue.popleft())
        # One that has ended leaves its batch, too: by it the server would not be idle.
        if req is not None or (last is not None and is_shadow(last)):
            scheduler.last_batch = scheduler.cur_batch_for_debug = None
        if req is None or self._current is None:
            return
        # As Scheduler.process_pending_chunked_abort, without an output.
        prepare_abort(req, "a request came")
        scheduler._release_aborted_request(req)
        release_kv_cache(req, scheduler.tree_cache, checkpoint=False)
        scheduler.chunked_req = None
        self._end("request_came")

    def forget_weights(self) -> None:
        """They change: what they have said is not compared with what the next ones say."""
        self._epoch += 1
        self.drop_all("weights_changed")

    def drop_all(self, cause: str) -> None:
        """Forget what waits: its KV, its weights or its clients are gone."""
        while self._waiting:
            self._next()
            self._drop(cause)

    def _end(self, cause: str) -> None:
        self._current = None
        self._drop(cause)

    def _drop(self, cause: str) -> None:
        self._dropped[cause] += 1
        self._metrics.dropped(cause)

    # The comparison

    def finished(self, req: ShadowReq) -> None:
        """SGLang would stream a shadow's output now."""
        if req is not self._current:
            return
        if isinstance(req.finished_reason, FINISH_ABORT):
            self._end("failed")
            return
        self._current = None
        sample = req.sample
        ids, values = req.logprob.input_top_logprobs_idx, req.logprob.input_top_logprobs_val
        at = [1 + i - sample.indices[0] for i in sample.indices]
        full = [dict(zip(ids[j], values[j], strict=True)) for j in at]
        logprobs = torch.stack([row[0] for row in sample.rows]).tolist()
        tokens = torch.stack([row[1] for row in sample.rows]).tolist()
        packed = [dict(zip(t, p, strict=True)) for t, p in zip(tokens, logprobs, strict=True)]
        one, bounds = Comparison.of(full, packed, sample.indices)
        self._count(sample, self._on_all_ranks(one, sample.rows[0][0].device), bounds)

    def _on_all_ranks(self, one: Comparison, device: torch.device) -> Comparison:
        """The same numbers on every rank, whatever each has rounded: the guard decides by them."""
        if self._heads.ranks == 1:
            return one
        numbers = torch.tensor([one.tokens, one.differing, one.kl], device=device)
        tokens, differing, kl = self._heads.mean(numbers).tolist()
        return dataclasses.replace(one, tokens=tokens, differing=differing, kl=kl)

    def _count(self, sample: Sample, one: Comparison, bounds: Sequence[float]) -> None:
        policy, retention = sample.config.policy, str(sample.retention)
        if retention not in self._retentions:
            retention = _OTHER
        self._tallies.setdefault((policy, retention), Tally()).add(one)
        self._metrics.compared(policy, retention, one, bounds)
        row = {"rid": sample.rid, "policy": policy, "retention": sample.retention}
        row |= {"tokens": one.tokens, "differing": one.differing}
        row |= {"mean_kl": one.kl / one.tokens, "first_difference": one.first}
        self._worst.append(row)
        self._worst.sort(key=lambda r: (-r["differing"] / r["tokens"], -r["mean_kl"]))
        del self._worst[MOST_WORST:]
        if self._guard is not None and sample.config == self.config:
            self._moved(self._guard.compared(one))

    def _moved(self, direction: str | None) -> None:
        """The guard has moved the retention that requests have which name none."""
        if direction is None:
            return
        assert self._guard is not None, "nobody else moves it"
        before, now = self.config.retention, self._guard.retention
        self.config = dataclasses.replace(self.config, retention=now)
        self._metrics.guarded(now, direction)
        logger.warning(
            "aircache: the guard has %s the retention, %s to %s.", direction, before, now
        )

    def describe(self) -> dict[str, Any]:
        """What `aircache audit` reads (aircache_sglang/audit.py)."""
        guard = self._guard
        return {
            "share": self._share,
            "waiting": len(self._waiting) + (self._current is not None),
            "waiting_bytes": self._bytes,
            "dropped": dict(self._dropped),
            "tallies": [
                {"policy": policy, "retention": retention, **dataclasses.asdict(tally)}
                for (policy, retention), tally in sorted(self._tallies.items())
            ],
            "worst": list(self._worst),
            "guard": None
            if guard is None
            else {
                "bound": guard.bound,
                "retention": guard.retention,
                "raised": guard.raised,
                "lowered": guard.lowered,
            },
        }


def _is_here(item: Any) -> bool:
    """Whether a picture can be encoded again: not one in a transport buffer that is given back."""
    if item.has_cuda_ipc_proxy():
        return False
    return item.feature is not None or item.precomputed_embeddings is not None


def _bytes_of(item: Any) -> int:
    """What stays in memory with an item: of a view the whole tensor."""
    values = (item.feature, item.precomputed_embeddings, *item.model_specific_data.values())
    return sum(map(_nbytes, flatten_nested_list(list(values))))


def _nbytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return int(value.untyped_storage().nbytes())
    return int(getattr(value, "nbytes", 0))


def is_shadow(batch: Any) -> bool:
    """Whether a batch is a shadow's: it has one of its own."""
    return bool(batch.reqs) and isinstance(batch.reqs[0], ShadowReq)
