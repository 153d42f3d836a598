# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode on different servers: what is sent, where it goes, and who refuses whom."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import torch
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.utils import MetadataBuffers, prepare_abort
from sglang.srt.managers.schedule_batch import FINISH_ABORT

from aircache_patches import process
from aircache_sglang.engine import disaggregation_decode as decode
from aircache_sglang.engine import disaggregation_prefill as prefill
from aircache_sglang.engine.disaggregation import difference, metadata_width, slots_saved
from aircache_sglang.engine.request import state_of


class AirCacheMetadataBuffers(MetadataBuffers):
    """SGLang's metadata of a request, and behind it how it was packed.

    aircache: int32 [requests, width], on the host; see `metadata_row`.
    """

    def __init__(self, size: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(size, *args, **kwargs)
        width = metadata_width(process.compressor().pool.layer_num)
        self.aircache = torch.zeros((size, width), dtype=torch.int32)

    def get_buf_infos(self) -> Any:
        """Ours is named twice: by that a prefill server knows a decode server of ours."""
        pointers, lengths, item_lengths = super().get_buf_infos()
        ours = self.aircache
        return (
            [*pointers, *[ours.data_ptr()] * 2],
            [*lengths, *[ours.nbytes] * 2],
            [*item_lengths, *[ours[0].nbytes] * 2],
        )

    def set_buf(self, req: Any) -> None:
        super().set_buf(req)
        values = prefill.metadata_of(process.compressor(), req)
        row = self.aircache[req.metadata_buffer_index]
        row.zero_()
        row[: len(values)] = torch.tensor(values, dtype=torch.int32)

    def clear_slot(self, idx: int) -> None:
        super().clear_slot(idx)
        self.aircache[idx] = 0


# The prefill server


def get_pd_kv_layout(original: Callable[[Any], str | None], pool: Any) -> str | None:
    """AROUND get_pd_kv_layout: what a decode server will compare with its own."""
    assert original(pool) is None, "our pool has one byte layout"
    return process.compressor().layout


def process_req(original: Callable[..., None], queue: Any, req: Any) -> None:
    """AROUND PrefillBootstrapQueue._process_req, which cuts the answer to one token; no more of it
    has to fit here."""
    prefill.asked_for(req)
    original(queue, req)
    process.compressor().intent(req)


def finalize_bootstrap(original: Callable[..., bool], queue: Any, req: Any) -> bool:
    """AROUND PrefillBootstrapQueue.finalize_bootstrap: the decode server's decision is known."""
    manager = queue.kv_manager
    objection = prefill.settle(process.compressor(), req, manager)
    if objection is None:
        return original(queue, req)
    prefill.fail(manager, req, objection)
    return False


def num_pages_to_send(original: Callable[..., int], queue: Any, req: Any, prefix_len: int) -> int:
    """AROUND PrefillBootstrapQueue._num_pages_to_send; a page is one token."""
    saved = slots_saved(state_of(req).promised)
    return original(queue, req, prefix_len) - saved


def send_kv_chunk(
    original: Callable[..., None],
    scheduler: Any,
    req: Any,
    last_chunk: bool = False,
    end_idx: int | None = None,
) -> None:
    """AROUND SchedulerDisaggregationPrefillMixin.send_kv_chunk: no picture travels."""
    prefill.send_chunk(process.compressor(), scheduler, req, last_chunk, end_idx, original)


# The decode server


def ensure_prefill_info(
    original: Callable[..., Any], queue: Any, by_address: dict[str, list[Any]]
) -> Any:
    """AROUND DecodePreallocQueue._ensure_prefill_info: a prefill server that does not fit fails its
    requests; where SGLang finds that out itself, it ends the scheduler."""
    ready: dict[str, list[Any]] = {}
    waiting: list[Any] = []
    manager, ours = queue.kv_manager, process.compressor().layout
    for address, requests in by_address.items():
        objection: str | None
        try:
            now, later = original(queue, {address: requests})
        except RuntimeError as error:
            now, later, objection = {}, [], str(error)
        else:
            info = manager.prefill_info_table.get(address)
            objection = None if info is None else difference(address, info.kv_layout, ours)
        if objection is None:
            ready |= now
            waiting += later
            continue
        # Asked again for the next request: it may have been started anew.
        manager.prefill_info_table.pop(address, None)
        queue._ensure_last_attempt_time.pop(address, None)
        for request in requests:
            if request.kv_receiver is not None:
                manager.record_failure(request.req.bootstrap_room, objection)
                manager.update_status(request.req.bootstrap_room, KVPoll.Failed)
                request.kv_receiver.conclude_state = KVPoll.Failed
    return ready, waiting


def required_admission_tokens(
    original: Callable[..., int],
    queue: Any,
    req: Any,
    allocated_tokens: int,
    prefix_len: int,
    retractable_tokens: int,
) -> int:
    """AROUND DecodePreallocQueue._required_admission_tokens: text, columns and answer."""
    compressor = process.compressor()
    saved = decode.saved(compressor, req)
    running = decode.saved_by_all(compressor, queue.scheduler.running_batch.reqs)
    return original(
        queue,
        req,
        allocated_tokens - saved,
        prefix_len + saved,
        retractable_tokens - running,
    )


def need_space_for_single_req(
    original: Callable[..., int], queue: Any, retractable_tokens: int | None = None
) -> int:
    """AROUND DecodePreallocQueue._need_space_for_single_req: what retracting the others frees."""
    if retractable_tokens is not None:
        running = queue.scheduler.running_batch.reqs
        retractable_tokens -= decode.saved_by_all(process.compressor(), running)
    return original(queue, retractable_tokens)


def prealloc_required_tokens(
    original: Callable[..., tuple[int, int]], queue: Any, req: Any
) -> tuple[int, int]:
    """AROUND DecodePreallocQueue._prealloc_required_tokens: of a request that comes back."""
    saved = decode.saved(process.compressor(), req)
    full, window = original(queue, req)
    return full - saved, window - saved


def alloc_for_decode_prealloc(
    original: Callable[..., Any], queue: Any, allocator: Any, **given: Any
) -> Any:
    """AROUND DecodePreallocQueue._alloc_for_decode_prealloc: text + m slots, as a packed row."""
    return decode.allocate(
        process.compressor(),
        given["req"],
        given["delta_len"],
        lambda slots: original(queue, allocator, **{**given, "delta_len": slots}),
    )


def pre_alloc(original: Callable[..., Any], queue: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND DecodePreallocQueue._pre_alloc: a request has its row."""
    result = original(queue, req, *args, **kwargs)
    decode.open_record(process.compressor(), req)
    return result


def transfer_page_indices(
    original: Callable[..., Any], queue: Any, decode_req: Any, kv_indices: Any, page_size: int
) -> Any:
    """AROUND DecodePreallocQueue._transfer_page_indices: padding receives nothing."""
    wanted = decode.to_receive(process.compressor(), decode_req.req, kv_indices)
    return original(queue, decode_req, wanted, page_size)


def commit_transfer_to_req(original: Callable[..., None], queue: Any, decode_req: Any) -> None:
    """AROUND DecodeTransferQueue._commit_transfer_to_req: budgets and report."""
    req, row = decode_req.req, queue.metadata_buffers.aircache[decode_req.metadata_buffer_index]
    original(queue, decode_req)
    if isinstance(req.finished_reason, FINISH_ABORT):
        return
    objection = decode.commit(process.compressor(), req, row.tolist())
    if objection is not None:
        prepare_abort(req, objection, status_code=HTTPStatus.INTERNAL_SERVER_ERROR)
