# SPDX-License-Identifier: Apache-2.0
"""The queries of the instruction, kept per layer while the prefill runs."""

from __future__ import annotations

import dataclasses

import torch


class QueryStash:
    """Instruction queries of one request, after RoPE.

    A chunked prefill may split the instruction; each chunk adds its own rows.
    """

    def __init__(self, instruction: tuple[int, int]) -> None:
        self.lo, self.hi = instruction
        self._filled_to = self.lo
        self._rows: dict[int, list[torch.Tensor]] = {}

    def claim(self, extend_start: int, extend_end: int, first_row: int) -> StashWork | None:
        """Rows of this forward to keep; None where the chunk holds no instruction token.

        extend_start, extend_end: positions computed now; first_row: their first row in the batch.
        """
        lo, hi = max(self.lo, extend_start), min(self.hi, extend_end)
        if lo >= hi:
            return None
        # A gap means that cached instruction tokens were matched; their queries are lost.
        assert lo == self._filled_to, f"instruction queries skip from {self._filled_to} to {lo}"
        self._filled_to = hi
        row = first_row + lo - extend_start
        return StashWork(self, slice(row, row + hi - lo))

    def write(self, layer: int, q: torch.Tensor) -> None:
        """Keep a copy of q [n, H_q, D], the rows that `claim` named, of one layer."""
        self._rows.setdefault(layer, []).append(q.clone())

    def stacked(self, n_layers: int) -> torch.Tensor:
        """All queries, [L, N_t, H_q, D]."""
        assert self._filled_to == self.hi, f"stash ends at {self._filled_to}, not {self.hi}"
        return torch.stack([torch.cat(self._rows[layer]) for layer in range(n_layers)])


@dataclasses.dataclass(frozen=True, slots=True)
class StashWork:
    """Keep batch rows `source` of every layer's queries in `stash`."""

    stash: QueryStash
    source: slice
