# SPDX-License-Identifier: Apache-2.0
"""Whether compressing a request is worth its pass; from host knowledge alone.

Costs and gains are counted in reads: what decode attention spends, per step, on the KV of one
visual token in all layers. A query of a policy that sums attention up during the prefill
(`Policy.accumulates`) counts like any other, though its rows run over the text too and the prefill
shares the machine with them.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Costs:
    """What a pass costs on a device, in reads.

    fixed: once; scan: per visual token; score: per visual token and token whose query scores it;
    pack: per column.
    """

    fixed: float
    scan: float
    score: float
    pack: float

    def of_pass(self, n_visual: int, n_columns: int, n_queries: int) -> float:
        """What scoring, selecting and packing cost."""
        scored = n_visual * (self.scan + self.score * n_queries)
        return self.fixed + scored + n_columns * self.pack


# Rounded up from benchmarks/compression_pass.py; docs/performance.md has the rows.
CPU = Costs(fixed=0.0, scan=2.0, score=0.04, pack=3.0)


def saved_reads(n_visual: int, n_columns: int, max_new_tokens: int) -> int:
    """What an answer of its greatest length saves; its first token comes from the prefill."""
    return (n_visual - n_columns) * (max_new_tokens - 1)


def pays_off(
    n_visual: int, n_columns: int, n_queries: int, max_new_tokens: int, costs: Costs = CPU
) -> bool:
    """Whether the answer can save what the pass costs.

    n_columns: the slots that stay; n_queries: tokens whose queries score the picture.
    """
    saved = saved_reads(n_visual, n_columns, max_new_tokens)
    return saved >= costs.of_pass(n_visual, n_columns, n_queries)
