# SPDX-License-Identifier: Apache-2.0
"""What a pass looks at besides the pool, kept while the prefill runs: the queries, layer by layer.

A chunked prefill may split what belongs to one request; each chunk's forward keeps its own. No more
than QUERY_ROWS queries are kept at a time: the scheduler lets requests wait for the next batch
(`Compressor.admits`), and KV leaves room for so many.
"""

from __future__ import annotations

import dataclasses

import torch

from aircache_sglang.config import INSTRUCTION_LIMIT
from aircache_sglang.runtime.attention_sum import AttentionSum, SumWork
from aircache_sglang.runtime.choice import policy_of
from aircache_sglang.runtime.decide import Intent
from aircache_sglang.runtime.record import CompressionRecord
from aircache_sglang.runtime.spans import Chunk
from aircache_sglang.runtime.transfer import to_device

# Any one request's: an instruction and the longest window `visual-N`.
QUERY_ROWS = 2 * INSTRUCTION_LIMIT


def query_rows(intent: Intent) -> int:
    """Tokens of a request whose queries are kept, at most QUERY_ROWS."""
    lo, hi = intent.prompt.instruction
    return hi - lo + min(intent.prompt.n_visual, policy_of(intent.config).visual_window)


class BatchStash:
    """All queries that one forward keeps, in one buffer [L, n, H_q, D]: the ragged Q of `score`.

    One gather a layer and one copy of each query; n is at most QUERY_ROWS.
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
    """The queries of one request's positions [lo, hi), after RoPE."""

    def __init__(self, positions: tuple[int, int]) -> None:
        self.lo, self.hi = positions
        self._filled_to = self.lo
        self._own: list[torch.Tensor] = []
        self._current: tuple[BatchStash, slice] | None = None

    def claim(self, chunk: Chunk, batch: BatchStash) -> None:
        """Have `batch` keep the rows of this forward that belong here, if there are any."""
        part = chunk.within(self._filled_to, self.hi)
        if part is not None:
            self.detach()
            self._filled_to = part.end
            self._current = (batch, batch.add(part.rows))

    def detach(self) -> None:
        """After a forward that does not end the prefill: let go of what it keeps of others."""
        if self._current is not None:
            batch, place = self._current
            self._own.append(batch.rows(place).contiguous())
            self._current = None

    def queries(self) -> torch.Tensor:
        """All of them, [L, hi - lo, H_q, D]; a view where one forward computed them."""
        assert self._filled_to == self.hi, f"stash ends at {self._filled_to}, not {self.hi}"
        last = [] if self._current is None else [self._current[0].rows(self._current[1])]
        return joined([*self._own, *last])


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One request to compress, and what its policy looks at besides keys.

    q: [L, N_t, H_q, D], its instruction's queries.
    q_visual: [L, W, H_q, D], those of its last visual tokens; accumulated: float32
        [L, H_kv, N_v]; only for a policy that looks at them.
    """

    record: CompressionRecord
    q: torch.Tensor
    q_visual: torch.Tensor | None = None
    accumulated: torch.Tensor | None = None


class PrefillStash:
    """What one request's prefill leaves for its `Job`.

    Its visual queries are those from `Intent.first_query` on, without the text between pictures.
    """

    def __init__(self, intent: Intent) -> None:
        policy, prompt = policy_of(intent.config), intent.prompt
        self._instruction = QueryStash(prompt.instruction)
        self._visual: list[QueryStash] = []
        self._sum: AttentionSum | None = None
        if policy.visual_window:
            lo = intent.first_query
            self._visual = [QueryStash((max(a, lo), b)) for a, b in prompt.spans if b > lo]
        if policy.accumulates:
            self._sum = AttentionSum(prompt.start, prompt.length, prompt.visual_positions())

    def claim(self, chunk: Chunk, row: torch.Tensor, queries: BatchStash) -> SumWork | None:
        """Have `queries` keep what this forward computes of it; row: its entries of req_to_token.

        Returns what is to be summed up while the forward runs, if anything.
        """
        for stash in (self._instruction, *self._visual):
            stash.claim(chunk, queries)
        return None if self._sum is None else self._sum.claim(chunk, row)

    def detach(self) -> None:
        """After a forward that does not end the prefill."""
        for stash in (self._instruction, *self._visual):
            stash.detach()

    def job(self, record: CompressionRecord) -> Job:
        """The pass's work, once the prefill has ended."""
        q_visual = accumulated = None
        if self._visual:
            q_visual = torch.cat([stash.queries() for stash in self._visual], dim=1)
        if self._sum is not None:
            accumulated = self._sum.stacked()
        return Job(record, self._instruction.queries(), q_visual, accumulated)


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
