# SPDX-License-Identifier: Apache-2.0
"""Requests that keep their pictures whole until the KV pool needs the slots.

The host decides between two forwards, from counts of slots (runtime/pressure.py). What is decided
rides on the next forward: it runs before it, on the forward stream (runtime/descend.py). Slots are
given back at once, since all that is written into them comes behind that.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.common import evict_from_tree_cache

from aircache_sglang.engine.metrics import Metrics
from aircache_sglang.engine.request import state_of
from aircache_sglang.engine.tree import Kind
from aircache_sglang.runtime.compress import PassInputs
from aircache_sglang.runtime.decide import Intent, Reason
from aircache_sglang.runtime.descend import Descent, descend, fill
from aircache_sglang.runtime.pages import page_ceil
from aircache_sglang.runtime.pressure import Candidate, Whole, next_to_pack, packable, together
from aircache_sglang.runtime.record import CompressionRecord

# Why a request is packed: a decode step, or a prefill, would not get its slots; or there would soon
# be no room for the columns of the next one.
DECODE, ADMISSION, LOW_WATER = "decode", "admission", "low_water"


class Pressure:
    """The requests of one scheduler that could be packed, or packed further.

    records: the compressor's, by row.
    """

    def __init__(
        self, inputs: PassInputs, records: dict[int, CompressionRecord], metrics: Metrics
    ) -> None:
        self._inputs, self._records, self._metrics = inputs, records, metrics
        # By row, in the order in which the results of their prefills came.
        self._requests: dict[int, Any] = {}
        # Those, and those whose results are not known yet.
        self._alive = 0
        # All columns that they may need while their pictures are still there.
        self._columns = 0
        # Without a request where it has gone, and its replica has not.
        self._decided: list[tuple[Any | None, Descent]] = []
        self._promised: int | None = None

    # A request's life

    def open(self, req: Any, record: CompressionRecord) -> None:
        """A prefill ends in the batch that is about to run, and its picture may be packed later."""
        state_of(req).whole = record
        self._alive += 1

    def enlist(self, req: Any) -> bool:
        """The result of a prefill is known; whether it left a picture that can be packed later."""
        state, row = state_of(req), req.kv.req_pool_idx
        if state.whole is None or req.finished() or row in self._requests:
            return False
        self._requests[row] = req
        intent = state.whole.intent
        self._columns += intent.at(0).n_extra
        state.report = state.whole.report_whole()
        self._metrics.at_rung(None, 1)
        return True

    def forget(self, req: Any) -> None:
        """A request gives its row back; a finished one reports what has become of it."""
        state, row = state_of(req), req.kv.req_pool_idx
        if state.whole is None:
            return
        self._alive -= 1
        self._decided = [
            (None if other is req else other, descent)
            for other, descent in self._decided
            if other is not req or descent.record.shared
        ]
        if self._requests.pop(row, None) is not None:
            self._metrics.at_rung(self._records.get(row), -1)
            self._columns -= state.whole.intent.at(0).n_extra
        if req.finished():
            # What came with a step behind the last token has touched no token of the answer.
            packs = [each for each in state.packs if each.packed_at < len(req.output_ids)]
            if packs:
                state.report = report_of(packs)
            else:
                # Not what an earlier life had said, nor nothing where the first token was the last.
                state.report, state.reason = state.whole.report_whole(), Reason.NO_PRESSURE
                self._metrics.left_alone(Reason.NO_PRESSURE)
        state.whole, state.packs = None, []

    def has_decided(self) -> bool:
        """Whether anything waits for the next forward."""
        return bool(self._decided)

    def launch(self) -> None:
        """Pack what was decided, on the current stream; before each forward."""
        decided, self._decided = self._decided, []
        for req, descent in decided:
            if req is None:
                fill(self._inputs, descent)
                continue
            state = state_of(req)
            state.packs.append(descent.record)
            # Before its selection, which only a finished request waits for.
            state.report = report_of(state.packs[-1:])
            descend(self._inputs, descent)

    # Decisions, on the scheduler's side

    def recount(self) -> None:
        """Admission looks at the next batch, or at the next request for it."""
        self._promised = None

    def promised(self, tree: Any) -> int:
        """Slots that packing would win: to admission they are available."""
        if self._promised is None:
            candidates = list(self._candidates(tree))
            self._promised = packable(candidates, free_slots(tree)) if candidates else 0
        return self._promised

    def for_prefill(self, tree: Any, need: int, running: Sequence[Any]) -> None:
        """Make room for `need` slots that admission has promised to a batch.

        need: for all that is left of its prompts. A later chunk takes its slots without asking
            (schedule_policy.py, add_chunked_req), and by then the columns might not fit.
        running: the requests that will decode beside it, and those of the batch.
        """
        if self._requests:
            self._make_room(tree, need, ADMISSION)
            self._keep_room_for_columns(tree, need, running)

    def is_far(self, tree: Any, batch: Any) -> bool:
        """Whether the next decode step and all columns would fit: nothing is to be decided."""
        if not self._alive:
            return True
        return free_slots(tree) - batch.new_tokens_required_next_decode() >= self._columns

    def for_decode(self, tree: Any, need: int, running: Sequence[Any]) -> bool:
        """Make room for the `need` slots of the next decode step; False if it should wait.

        It waits where slots are short, and the result of a prefill that has been launched will name
        a request that can be packed.
        """
        if free_slots(tree) < need and self._make_room(tree, need, DECODE):
            self._metrics.retraction_avoided()
        self._keep_room_for_columns(tree, need, running)
        return free_slots(tree) >= need or not any(self._is_coming(req) for req in running)

    def _is_coming(self, req: Any) -> bool:
        """Whether a prefill whose result is not known yet leaves a picture that can be packed."""
        return state_of(req).whole is not None and req.kv.req_pool_idx not in self._requests

    def _make_room(self, tree: Any, need: int, cause: str) -> bool:
        """Pack until `need` slots are free; whether they are."""
        while (free := free_slots(tree)) < need:
            chosen = next_to_pack(self._candidates(tree), free)
            if chosen is None:
                return False
            self._pack(tree, *chosen, cause)
        return True

    def _keep_room_for_columns(self, tree: Any, need: int, running: Sequence[Any]) -> None:
        """Pack while there is room for the columns, if there would not be after `need`.

        Not where `running` can take no more slots than are free, whatever they answer.
        """
        page = tree.token_to_kv_pool_allocator.page_size
        most = need + sum(page_ceil(remaining_tokens(req), page) for req in running)
        while need <= (free := free_slots(tree)) < most:
            chosen = next_to_pack(self._candidates(tree), free)
            if chosen is None or not chosen[0].is_whole:
                return
            if free - need >= chosen[0].columns[0]:
                return
            self._pack(tree, *chosen, LOW_WATER)

    def _candidates(self, tree: Any) -> Iterator[Candidate]:
        whole: list[Whole] = []
        for row, req in self._requests.items():
            intent, record = whole_of(req).intent, self._records.get(row)
            if record is None:
                columns = tuple(intent.at(r).n_extra for r in range(len(intent.rungs)))
                whole.append(Whole(row, columns, parts_of(tree, req, intent)))
            elif record.rung + 1 < len(intent.rungs):
                rungs = range(record.rung + 1, len(intent.rungs))
                below = tuple(intent.at(rung).n_extra for rung in rungs)
                yield Candidate((row,), record.rung + 1, below, record.extra.numel(), False)
        yield from together(whole)

    def _pack(self, tree: Any, candidate: Candidate, rung: int, cause: str) -> None:
        """Decide that requests are packed to a rung, and give their slots back."""
        self._promised = None
        for row in candidate.keys:
            last = len(whole_of(self._requests[row]).intent.rungs) - 1
            self._pack_one(tree, row, min(rung, last))
        won = candidate.gain(rung - candidate.rung)
        self._metrics.packed_for(cause, len(candidate.keys), won)

    def _pack_one(self, tree: Any, row: int, rung: int) -> None:
        req, before = self._requests[row], self._records.get(row)
        whole = whole_of(req)
        intent = whole.intent.at(rung)
        allocator = tree.token_to_kv_pool_allocator
        if before is None:
            evict_from_tree_cache(tree, intent.n_extra)
            extra = allocator.alloc(intent.n_extra)
            assert extra is not None, "no room for columns that were counted"
            extra = extra.to(torch.int64, copy=True)
            row_now = self._inputs.table.req_to_token[row, : intent.prompt.end]
            originals = row_now.to(torch.int64, copy=True)
        else:
            extra, originals = before.extra[: intent.n_extra], before.originals
        record = (before or whole).at(
            rung,
            originals=originals,
            extra=extra,
            # That of the next decode step, whatever is still on its way.
            packed_at=req.kv.kv_committed_len - len(req.origin_input_ids) + 1,
        )
        self._records[row] = record
        if before is None:
            self._decided.append((req, Descent(record, None, record.columns)))
            tree.give_up_picture(req, record)
        else:
            self._decided.append((req, Descent(record, before.rung, before.columns)))
            allocator.free_segment(before.extra[intent.n_extra :], start_pos=intent.n_extra)
        self._metrics.packed(before, record)


def free_slots(tree: Any) -> int:
    """Slots that an allocation can have: unlocked cache in the tree goes first."""
    return int(tree.token_to_kv_pool_allocator.available_size() + tree.evictable_size())


def whole_of(req: Any) -> CompressionRecord:
    """The record of a listed request's picture, with the ladder that its pass has left."""
    whole = state_of(req).whole
    assert whole is not None, "only requests that may be packed are listed"
    return whole


def parts_of(tree: Any, req: Any, intent: Intent) -> dict[Hashable, tuple[int, int]]:
    """What holds a request's pictures: by node of the tree, its slots and all that lock it."""
    if tree.disable:
        return {req.kv.req_pool_idx: (intent.n_given_up, 1)}
    node, parts = req.last_node, {}
    while node is not tree.root_node:
        if node.kind is Kind.VISUAL:
            parts[node.id] = (node.size, node.lock_ref)
        node = node.parent
    return parts


def remaining_tokens(req: Any) -> int:
    """The most that a request may still answer, all of its beams together."""
    n_beams = 1 if req.beam_group is None else req.beam_group.beam_width
    return n_beams * max(0, int(req.sampling_params.max_new_tokens) - len(req.output_ids))


def report_of(packs: Sequence[CompressionRecord]) -> dict[str, Any]:
    """The report of a request that was packed to one rung after the other."""
    reports = [record.report() for record in packs]
    keys = ("rung", "retention", "columns", "packed_at", "layer_budgets", "selection")
    steps = [{key: each[key] for key in keys if key in each} for each in reports]
    return reports[-1] | {"packs": steps}
