# SPDX-License-Identifier: Apache-2.0
"""What one forward computes of a request."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """Positions [start, end) of a request, in the batch's rows from `first_row` on."""

    start: int
    end: int
    first_row: int

    @property
    def rows(self) -> slice:
        """The batch's rows."""
        return slice(self.first_row, self.first_row + self.end - self.start)

    def within(self, lo: int, hi: int) -> Chunk | None:
        """The part in [lo, hi), where all before `lo` has been seen; None where there is none."""
        start, end = max(lo, self.start), min(hi, self.end)
        if start >= end:
            return None
        # A gap means that tokens were matched in the tree; their queries are lost.
        assert start == lo, f"queries skip from {lo} to {start}"
        return Chunk(start, end, self.first_row + start - self.start)
