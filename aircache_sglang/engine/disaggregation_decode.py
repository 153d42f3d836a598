# SPDX-License-Identifier: Apache-2.0
"""The decode server of a pair: it decides, sets text + m slots aside, and takes what arrives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from aircache_sglang.engine.compressor import Compressor
from aircache_sglang.engine.disaggregation import (
    Arrival,
    originals_of,
    slots_saved,
    with_padding,
    without_padding,
)
from aircache_sglang.engine.request import state_of
from aircache_sglang.runtime.record import CompressionRecord, Stage


def saved(compressor: Compressor, req: Any) -> int:
    """Slots that a request needs less than its prompt has tokens."""
    return slots_saved(compressor.intent(req))


def saved_by_all(compressor: Compressor, reqs: Iterable[Any]) -> int:
    """Of running requests: what SGLang overestimates that retracting them would free."""
    return sum(saved(compressor, req) for req in reqs)


def allocate(
    compressor: Compressor, req: Any, length: int, alloc: Callable[[int], torch.Tensor | None]
) -> torch.Tensor | None:
    """The entries of a row of `length` tokens; None without as many slots.

    alloc: takes a number of slots.
    """
    intent = compressor.intent(req)
    slots = alloc(length - slots_saved(intent))
    return slots if slots is None or intent is None else with_padding(intent, slots)


def open_record(compressor: Compressor, req: Any) -> None:
    """A request has its row: what it owns is known from now on, whatever becomes of it.

    One that was retracted has its budgets already.
    """
    row, intent, state = req.kv.req_pool_idx, compressor.intent(req), state_of(req)
    compressor.arriving[row] = None
    if intent is None:
        return
    assert row not in compressor.records, f"row {row} is still compressed"
    entries, start = compressor.table.req_to_token[row], intent.prompt.start
    record = CompressionRecord(
        intent=intent,
        row=row,
        originals=originals_of(intent, entries),
        extra=entries[start : start + intent.columns].to(torch.int64, copy=True),
        stage=Stage.RELEASED,
        released=intent.prompt.n_visual,
    )
    compressor.records[row] = record
    if state.arrived is not None:
        _take(compressor, req, record, state.arrived)
        compressor.metrics.back(record)


def to_receive(compressor: Compressor, req: Any, entries: torch.Tensor) -> torch.Tensor:
    """The slots that are written from outside; entries: of the row, from position 0 on."""
    intent = compressor.intent(req)
    return entries if intent is None else without_padding(intent, entries)


def commit(compressor: Compressor, req: Any, row: list[int]) -> str | None:
    """All of a request has arrived; row: its metadata. Returns why it cannot be used, or None."""
    record = compressor.records.get(req.kv.req_pool_idx)
    arrival = Arrival.of(row, compressor.pool.layer_num)
    objection = arrival.objection(None if record is None else record.intent)
    if objection is None and record is not None:
        state_of(req).arrived = arrival
        _take(compressor, req, record, arrival)
        compressor.metrics.compressed(record)
    return objection


def _take(compressor: Compressor, req: Any, record: CompressionRecord, arrival: Arrival) -> None:
    record.packed(arrival.budgets, arrival.mass, None)
    compressor.arriving[record.row] = record
    state_of(req).report = record.report()
