# SPDX-License-Identifier: Apache-2.0
"""The way of one request down its ladder, on the forward stream, before its next decode."""

from __future__ import annotations

import dataclasses

import torch

from aircache_sglang.runtime.compress import PassInputs, pack
from aircache_sglang.runtime.record import CompressionRecord, Selected
from aircache_sglang.runtime.rungs import Ladder, repack


@dataclasses.dataclass(frozen=True, slots=True)
class Descent:
    """A request that the host has decided to pack to the rung of its `record`.

    above: the rung that `columns`, int64 [m] slots, hold, of which the record has kept the first;
        None where the picture is whole, in the record's originals.
    """

    record: CompressionRecord
    above: int | None
    columns: torch.Tensor


def descend(inputs: PassInputs, descent: Descent) -> None:
    """Copy the cells that stay, and enter the row and the table; no host sync.

    What the request has given up may be another's by now: all that writes there comes behind this
    on the stream. Descents of one moment run in the order in which they were decided, since a
    later one's columns may be slots that an earlier one gives up.
    """
    ladder = _copy_cells(inputs, descent)
    record, rung = descent.record, descent.record.rung
    inputs.enter(record, ladder.budgets[rung])
    if record.intent.config.return_selection:
        record.selected = Selected.of(inputs.heads.gather_heads(ladder.selected(rung)))


def fill(inputs: PassInputs, descent: Descent) -> None:
    """Copy what the replica of a request holds that has given its row back since; no host sync."""
    _copy_cells(inputs, descent)
    inputs.copy_text(descent.record)


def _copy_cells(inputs: PassInputs, descent: Descent) -> Ladder:
    record, k_all, v_all = descent.record, inputs.k_all, inputs.v_all
    ladder, rung = record.ladder, record.rung
    assert ladder is not None, "only what was ranked is packed later"
    if descent.above is None:
        visual, budgets = inputs.visual_slots(record), ladder.budgets[rung]
        pack(k_all, v_all, visual, record.columns, ladder.selected(rung), budgets)
    else:
        repack(k_all, v_all, descent.columns, ladder.cells(descent.above, rung))
    return ladder
