# SPDX-License-Identifier: Apache-2.0
"""The prefill server of a pair: what a packed request sends, and when.

No visual slot is ever sent. The text in front of the first picture goes out chunk by chunk as in
stock SGLang; columns and the rest go with the last chunk, behind the pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.mem_cache.common import kv_to_page_indices

from aircache_sglang.engine.compressor import Compressor
from aircache_sglang.engine.disaggregation import (
    metadata_row,
    slots_to_send,
    without_padding,
)
from aircache_sglang.engine.request import state_of
from aircache_sglang.runtime.decide import Reason
from aircache_sglang.runtime.record import Stage


def asked_for(req: Any) -> None:
    """A request has come, and SGLang is about to ask for one token of it alone."""
    state = state_of(req)
    if state.max_new_tokens is None:
        state.max_new_tokens = req.sampling_params.max_new_tokens


def expected_slots(manager: Any, room: int) -> int | None:
    """Slots that the decode server has set aside for a prompt; None if nobody waits for it."""
    infos = manager.transfer_infos.get(room) if hasattr(manager, "transfer_infos") else None
    # Another thread adds to them.
    lengths = [len(i.dst_kv_indices) for i in list((infos or {}).values()) if not i.is_dummy]
    return max(lengths, default=None)


def foreign_peer(manager: Any, room: int) -> bool:
    """Whether the decode server has other metadata than ours, as one without a policy does."""
    ours = len(manager.kv_args.aux_data_ptrs)
    for info in list(manager.transfer_infos.get(room, {}).values()):
        peer = manager.decode_kv_args_table.get(info.mooncake_session_id)
        if info.is_dummy or peer is None:
            continue
        pointers = peer.dst_aux_ptrs
        # A flag of stock SGLang makes as many buffers, and never names one twice.
        if len(pointers) != ours or pointers[-1] != pointers[-2]:
            return True
    return False


def settle(compressor: Compressor, req: Any, manager: Any) -> str | None:
    """Follow the decode server's decision. Returns why that cannot be done, or None."""
    state, n_tokens = state_of(req), len(req.origin_input_ids)
    intent = compressor.intent(req)
    expected = expected_slots(manager, req.bootstrap_room)
    if expected is not None and foreign_peer(manager, req.bootstrap_room):
        return (
            f"aircache: this prefill server has --kv-policy {compressor.config.policy} and the "
            "decode server has none, or other metadata; start both with the same flags"
        )
    if expected is None or expected == n_tokens:
        if intent is not None:
            compressor.decline(req, Reason.NO_GAIN)
        state.promised = None
    elif intent is not None and expected == slots_to_send(intent):
        state.promised = intent
    else:
        ours = n_tokens if intent is None else slots_to_send(intent)
        why = f" ({state.reason})" if intent is None and state.reason else ""
        return (
            f"aircache: the decode server expects {expected} slots of a prompt of {n_tokens} "
            f"tokens and this prefill server would send {ours}{why}; start both with the same "
            "version and flags, and the prefill server with a larger pool"
        )
    return None


def fail(manager: Any, req: Any, sentence: str) -> None:
    """End one request at both servers; the next poll here finds that it has failed."""
    # Mooncake's messages have a frame for the reason, which SGLang leaves out.
    manager.kv_status_msg_carries_reason = True
    manager.conclude_failure(bootstrap_room=req.bootstrap_room, failure_reason=sentence)


def send_chunk(
    compressor: Compressor,
    scheduler: Any,
    req: Any,
    last_chunk: bool,
    end: int | None,
    stock: Callable[..., None],
) -> None:
    """In place of `send_kv_chunk`; stock: SGLang's own."""
    intent = state_of(req).promised
    if intent is None:
        stock(scheduler, req, last_chunk, end)
        return
    if not last_chunk:
        end = min(req.extend_end, len(req.origin_input_ids)) if end is None else end
        stock(scheduler, req, False, min(end, intent.prompt.start))
        return
    record, sender = compressor.records.get(req.kv.req_pool_idx), req.disagg_kv_sender
    scheduler.disagg_prefill_pending_chunk_rids.discard(req.rid)
    if record is None or record.stage is not Stage.RELEASED:
        reason = state_of(req).reason
        fail(
            sender.kv_mgr,
            req,
            f"aircache: the prefill server could not pack this prompt ({reason}); "
            "send the request again",
        )
        return
    n_tokens = len(req.origin_input_ids)
    row = scheduler.req_to_token_pool.req_to_token[req.kv.req_pool_idx, :n_tokens]
    slots = without_padding(intent, row)[req.start_send_idx :]
    scheduler.disagg_metadata_buffers.set_buf(req)
    sender.send(kv_to_page_indices(slots, 1), [], num_kv_tokens=len(slots))
    req.start_send_idx = n_tokens


def metadata_of(compressor: Compressor, req: Any) -> list[int]:
    """The row of metadata of a request whose prefill has ended; empty if it was not packed."""
    record = compressor.records.get(req.kv.req_pool_idx)
    if state_of(req).promised is None or record is None:
        return []
    assert record.budgets is not None and record.mass is not None, "a prefill ends with its pass"
    return metadata_row(record.intent, record.budgets, record.mass)
