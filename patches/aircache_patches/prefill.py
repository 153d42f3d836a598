# SPDX-License-Identifier: Apache-2.0
"""Admission and allocation of a prefill: the columns are counted and allocated with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.managers.schedule_policy import AddReqResult

from aircache_patches import process
from aircache_patches.pressure import launch


def get_new_batch_prefill(original: Callable[..., Any], scheduler: Any, running_batch: Any) -> Any:
    """AROUND Scheduler.get_new_batch_prefill: a packed request makes room without leaving.

    SGLang stops looking for requests to admit when one does not fit, until a running one leaves.
    """
    compressor = process.compressor()
    # A load from host memory, on its own stream, may be given slots that packing has still to read.
    launch(scheduler)
    if compressor.made_room():
        running_batch.batch_is_full = False
    compressor.begin_batch(scheduler.chunked_req, running_batch.reqs, lambda: launch(scheduler))
    return original(scheduler, running_batch)


def request_slot_reserve_for_req(
    original: Callable[..., int], adder: Any, req: Any, *, extend_input_len: int | None = None
) -> int:
    """AROUND PrefillAdder._request_slot_reserve_for_req: the columns exist beside the full prompt
    until the prefill's result is processed."""
    stock = original(adder, req, extend_input_len=extend_input_len)
    return stock + process.compressor().slots_to_reserve(req, extend_input_len)


def add_one_req(
    original: Callable[..., Any], adder: Any, req: Any, *args: Any, **kwargs: Any
) -> Any:
    """AROUND PrefillAdder.add_one_req: a batch ends where it would keep too many queries, and is
    empty while a chunk waits for its columns: SGLang counts it into every batch that there is."""
    compressor = process.compressor()
    compressor.pressure.recount()
    if not compressor.admits(req, adder.can_run_list):
        return AddReqResult.OTHER
    if kwargs.get("has_chunked_req"):
        return original(adder, req, *args, **kwargs)
    return _end_chunk(adder, req, lambda: original(adder, req, *args, **kwargs))


def add_chunked_req(original: Callable[..., Any], adder: Any, req: Any) -> Any:
    """AROUND PrefillAdder.add_chunked_req: as for a first chunk."""
    return _end_chunk(adder, req, lambda: original(adder, req))


def _end_chunk(adder: Any, req: Any, add: Callable[[], Any]) -> Any:
    """Add a request to a batch up to where the tree wants its chunk to end.

    The batch ends with it: SGLang keeps one request between two chunks, not more.
    """
    room, end = adder.rem_chunk_tokens, adder.tree_cache.chunk_end(req)
    if room is None or end is None or end - req.prefix_len >= room:
        return add()
    n_admitted = len(adder.can_run_list)
    adder.rem_chunk_tokens = end - req.prefix_len
    result = add()
    if len(adder.can_run_list) == n_admitted:
        adder.rem_chunk_tokens = room
    return result


def prepare_for_extend(original: Callable[..., None], batch: Any) -> None:
    """AROUND ScheduleBatch.prepare_for_extend, which allocates the prompts' own slots: requests are
    packed to have them, and the columns are allocated beside them."""
    compressor = process.compressor()
    compressor.make_room(batch.tree_cache, batch.reqs)
    original(batch)
    compressor.allocate_columns(batch)
