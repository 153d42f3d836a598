# SPDX-License-Identifier: Apache-2.0
"""The queries that a pass looks at, kept per layer while the prefill runs."""

from __future__ import annotations

import torch

from aircache_sglang.runtime.transfer import to_device


class BatchStash:
    """All queries that one forward keeps, in one buffer [L, n, H_q, D]: the ragged Q of `score`.

    One gather a layer and one copy of each query; n is at most the sum of the instructions, 512
    tokens each (other policies add the visual queries that they look at).
    """

    def __init__(self, n_layers: int) -> None:
        self._n_layers = n_layers
        self._sources: list[int] = []
        self._index: torch.Tensor | None = None
        self._buffer: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self._sources)

    def add(self, source: slice) -> slice:
        """Keep batch rows `source`; their place in the buffer."""
        first = len(self._sources)
        self._sources.extend(range(source.start, source.stop))
        return slice(first, len(self._sources))

    def write(self, layer: int, q: torch.Tensor) -> None:
        """Keep the rows that were added, of one layer; q: [tokens, H_q, D], after RoPE."""
        if self._buffer is None or self._index is None:
            self._index = to_device(self._sources, q.device, torch.int64)
            self._buffer = q.new_empty((self._n_layers, len(self._sources), *q.shape[1:]))
        torch.index_select(q, 0, self._index, out=self._buffer[layer])

    def rows(self, place: slice) -> torch.Tensor:
        """A view [L, n, H_q, D] of what `add` placed there, once all layers are written."""
        assert self._buffer is not None, "no layer has written its queries"
        return self._buffer[:, place]


class QueryStash:
    """The queries of one request's positions [lo, hi), after RoPE.

    A chunked prefill may split them; each chunk's forward keeps its own.
    """

    def __init__(self, positions: tuple[int, int]) -> None:
        self.lo, self.hi = positions
        self._filled_to = self.lo
        self._parts: list[tuple[BatchStash, slice]] = []

    def claim(self, extend_start: int, extend_end: int, first_row: int, batch: BatchStash) -> None:
        """Have `batch` keep the rows of this forward that belong here, if there are any.

        extend_start, extend_end: positions computed now; first_row: their first row in the batch.
        """
        lo, hi = max(self.lo, extend_start), min(self.hi, extend_end)
        if lo >= hi:
            return
        # A gap means that cached tokens were matched; their queries are lost.
        assert lo == self._filled_to, f"queries skip from {self._filled_to} to {lo}"
        self._filled_to = hi
        row = first_row + lo - extend_start
        self._parts.append((batch, batch.add(slice(row, row + hi - lo))))

    def queries(self) -> torch.Tensor:
        """All of them, [L, hi - lo, H_q, D]; a view where one forward computed them."""
        assert self._filled_to == self.hi, f"stash ends at {self._filled_to}, not {self.hi}"
        return joined([batch.rows(place) for batch, place in self._parts])


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """[L, n_i, H_q, D] one behind the other along dim 1; a view if they lie so in one buffer."""
    first = parts[0]
    end = first.data_ptr()
    for part in parts:
        if part.stride() != first.stride() or part.data_ptr() != end:
            return torch.cat(parts, dim=1)
        end += part.shape[1] * part.stride(1) * part.element_size()
    n_layers, _, *heads = first.shape
    total = sum(part.shape[1] for part in parts)
    return first.as_strided((n_layers, total, *heads), first.stride())
