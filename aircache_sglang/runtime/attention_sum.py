# SPDX-License-Identifier: Apache-2.0
"""Attention that the visual tokens get from all queries, summed up while the prefill runs."""

from __future__ import annotations

import dataclasses

import torch

from aircache_sglang.policy import accumulate
from aircache_sglang.runtime.spans import Chunk
from aircache_sglang.runtime.transfer import to_device


class AttentionSum:
    """One request's sums, float32 [H_kv, N_v] a layer, whatever the number of queries.

    Queries before the first visual token see no picture and are skipped; so the prefill may find
    that much in the tree, and not more.
    """

    def __init__(self, start: int, length: int, visual: torch.Tensor) -> None:
        """start: the first visual position; length: of the prompt; visual: int64 [N_v], host."""
        self._filled_to, self._length, self._visual = start, length, visual
        self._layers: dict[int, torch.Tensor] = {}

    def claim(self, chunk: Chunk, row: torch.Tensor) -> SumWork | None:
        """Queries of this forward to look at; None where the chunk holds none.

        row: the request's entries in `req_to_token`.
        """
        part = chunk.within(self._filled_to, self._length)
        if part is None:
            return None
        self._filled_to = part.end
        return SumWork(self, part.rows, part.start, row[: part.end].long())

    def add(self, layer: int, q: torch.Tensor, k: torch.Tensor, first: int, scale: float) -> None:
        """q: [n, H_q, D] of the positions from `first` on; k: [T, H_kv, D] of all positions."""
        if self._visual.device != k.device:
            self._visual = to_device(self._visual.tolist(), k.device, torch.int64)
        total = self._layers.get(layer)
        if total is None:
            total = torch.zeros((k.shape[1], self._visual.numel()), device=k.device)
            self._layers[layer] = total
        accumulate(total, q, k, first, self._visual, scale)

    def stacked(self) -> torch.Tensor:
        """float32 [L, H_kv, N_v]."""
        assert self._filled_to == self._length, f"sums end at {self._filled_to}"
        return torch.stack([self._layers[layer] for layer in sorted(self._layers)])


@dataclasses.dataclass(frozen=True, slots=True)
class SumWork:
    """Add the attention of batch rows `source`, positions from `first` on, to `total`.

    slots: int64 [T], of the request's tokens up to the last of these queries.
    """

    total: AttentionSum
    source: slice
    first: int
    slots: torch.Tensor
