# SPDX-License-Identifier: Apache-2.0
"""What we keep on SGLang's requests, and what we read off them."""

from __future__ import annotations

import dataclasses
from typing import Any

from sglang.srt.managers.schedule_batch import MM_PAD_SHIFT_VALUE
from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS

from aircache_sglang.engine.disaggregation import Arrival
from aircache_sglang.runtime.decide import Asked, Intent, Reason
from aircache_sglang.runtime.record import CompressionRecord
from aircache_sglang.runtime.session import Chain
from aircache_sglang.runtime.spans import bare_spans
from aircache_sglang.runtime.stash import PrefillStash


@dataclasses.dataclass(slots=True)
class RequestState:
    """The attribute `aircache` of a request (managers/schedule_batch.py, Req).

    intent: how it is compressed, None for not at all; decided for a prompt of `decided_for` tokens,
        since an abort replaces the prompt by a stub (set_finish_with_abort).
    stash: what its prefill has left so far.
    whole: the record of a picture that may be packed later.
    next_turn: the record of a conversation with new pictures, and what becomes of the older ones,
        until the forward that ends its prefill.
    packs: the records of the rungs to which it has been packed since, in order.
    report, reason: for the answer, once known.
    max_new_tokens: of its answer, on a prefill server, which computes one token of it alone.
    promised: how the prefill server sends it; None for whole.
    arrived: how it reached the decode server; kept while it is retracted.
    captured: what a shadow will compare it with (engine/shadow.py, Captured).
    bare_spans: placeholders that a key of the tree needs in place of the prompt's own tokens.
    branch: how far full KV went when it was matched, of a hybrid beyond the last recurrent state.
    """

    decided_for: int | None = None
    intent: Intent | None = None
    stash: PrefillStash | None = None
    whole: CompressionRecord | None = None
    next_turn: tuple[CompressionRecord, Chain] | None = None
    packs: list[CompressionRecord] = dataclasses.field(default_factory=list)
    report: dict[str, Any] | None = None
    reason: Reason | None = None
    max_new_tokens: int | None = None
    promised: Intent | None = None
    arrived: Arrival | None = None
    captured: Any = None
    bare_spans: list[tuple[int, list[int]]] | None = None
    branch: int = 0
    _sent: dict[str, Any] = dataclasses.field(default_factory=dict)

    def decided(self, req: Any, intent: Intent | None) -> None:
        """Note the decision on the prompt that `req` has now."""
        self.decided_for, self.intent = len(req.origin_input_ids), intent

    def restart(self) -> None:
        """Forget what belongs to one life of a request; a retracted one decides anew."""
        self.decided_for = self.intent = self.stash = self.whole = self.next_turn = None
        self.packs = []

    def unsent(self, name: str) -> list[Any]:
        """[value] of `report` or `reason` once for each value, else nothing."""
        value = getattr(self, name)
        if value is None or value is self._sent.get(name):
            return []
        self._sent[name] = value
        return [value]


def state_of(req: Any) -> RequestState:
    """The request's state; a new one at the first call."""
    try:
        state: RequestState = req.aircache
    except AttributeError:
        state = req.aircache = RequestState()
    return state


def asked(req: Any, *, has_tree: bool = True) -> Asked | None:
    """What `decide` looks at; None for a request without multimodal inputs."""
    inputs, params = req.multimodal_inputs, req.sampling_params
    if inputs is None:
        return None
    answer = state_of(req).max_new_tokens or params.max_new_tokens
    # managers/schedule_policy.py, add_one_req; what an earlier life has said is prefilled again.
    n_said = len(req.output_ids)
    reserved = n_said + min(max(params.max_new_tokens - n_said, 0), CLIP_MAX_NEW_TOKENS)
    if params.ignore_eos and not has_tree:
        # add_one_req_ignore_eos: the whole answer has to fit.
        reserved = params.max_new_tokens
    return Asked(
        input_ids=req.origin_input_ids,
        mm_items=inputs.mm_items,
        bare_ids=frozenset({inputs.im_token_id, inputs.video_token_id} - {None}),
        expected=None if inputs.image_pad_len is None else sum(inputs.image_pad_len),
        custom_params=params.custom_params,
        max_new_tokens=answer,
        reserved=reserved,
        supported=(
            req.input_embeds is None
            and req.positional_embed_overrides is None
            and not req.skip_radix_cache_insert
            and req.beam_group is None
        ),
    )


def bare_spans_of(req: Any) -> list[tuple[int, list[int]]]:
    """Read once: SGLang drops the inputs of a finished request."""
    state = state_of(req)
    if state.bare_spans is None:
        inputs = req.multimodal_inputs
        state.bare_spans = []
        if inputs is not None:
            state.bare_spans = bare_spans(req.origin_input_ids, inputs.mm_items, MM_PAD_SHIFT_VALUE)
    return state.bare_spans
