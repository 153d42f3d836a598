# SPDX-License-Identifier: Apache-2.0
"""Whether compressing a request is worth its pass; from host knowledge alone.

Costs and gains are counted in reads: what decode attention spends, per step, on the KV of one
visual token in all layers. docs/performance.md has the rows that the constants are taken from. A
query of a policy that sums attention up during the prefill (`Policy.accumulates`) counts like any
other, though its rows run over the text too and the prefill shares the machine with them.
"""

from __future__ import annotations

# Cost of the pass (benchmarks/compression_pass.py), rounded up: per visual token, per visual token
# and token whose query scores it, and per column packed.
SCAN_READS = 2.0
SCORE_READS = 0.04
PACK_READS = 3.0


def pass_reads(n_visual: int, n_columns: int, n_queries: int) -> float:
    """What scoring, selecting and packing cost, in reads."""
    return n_visual * (SCAN_READS + SCORE_READS * n_queries) + n_columns * PACK_READS


def saved_reads(n_visual: int, n_columns: int, max_new_tokens: int) -> int:
    """What an answer of its greatest length saves; its first token comes from the prefill."""
    return (n_visual - n_columns) * (max_new_tokens - 1)


def pays_off(n_visual: int, n_columns: int, n_queries: int, max_new_tokens: int) -> bool:
    """Whether the answer can save what the pass costs.

    n_columns: the slots that stay; n_queries: tokens whose queries score the picture.
    """
    return saved_reads(n_visual, n_columns, max_new_tokens) >= pass_reads(
        n_visual, n_columns, n_queries
    )
