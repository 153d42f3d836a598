# SPDX-License-Identifier: Apache-2.0
"""The way of one request down its ladder, on the forward stream, before its next decode."""

from __future__ import annotations

import dataclasses

import torch

from aircache_sglang.runtime.compress import PassInputs, pack
from aircache_sglang.runtime.record import CompressionRecord
from aircache_sglang.runtime.rungs import repack


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
    record, k_all, v_all = descent.record, inputs.k_all, inputs.v_all
    ladder, rung = record.ladder, record.rung
    assert ladder is not None, "only what was ranked is packed later"
    budgets = ladder.budgets[rung]
    if descent.above is None:
        visual = inputs.visual_slots(record)
        pack(k_all, v_all, visual, record.columns, ladder.selected(rung), budgets)
    else:
        repack(k_all, v_all, descent.columns, ladder.cells(descent.above, rung))
    inputs.enter(record, budgets)
    if record.intent.config.return_selection:
        record.selected = inputs.heads.gather_heads(ladder.selected(rung))
