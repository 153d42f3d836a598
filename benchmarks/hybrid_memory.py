# SPDX-License-Identifier: Apache-2.0
"""What compression can win on a hybrid, in bytes, by its configuration alone.

    python -m benchmarks.hybrid_memory

Qwen3.5 as Transformers' default configuration has it, beside a model of the same size whose layers
all attend. A request of N_v visual tokens, text of T tokens (its answer included) and m columns
holds

    states + (T + N_v) * kv   whole,    states + (T + m) * kv   packed,

where kv = L_attending * 2 * H_kv * D * 2 bytes (bfloat16 keys and values of the attending layers)
and states are the recurrent and convolution states of the others, whatever the length. A decode
step reads the weights once, and of each request its KV and its states, which it writes, too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import Qwen3_5TextConfig

from aircache_sglang.policy import columns
from benchmarks.report import table

VISUAL = (8192, 32768, 131072)
TEXT = 768  # an instruction and an answer
RETENTION = 0.1
BATCH = 8
WEIGHTS = 9e9 * 2  # bytes: nine billion parameters in bfloat16
KV_BYTES, STATE_BYTES, CONV_BYTES = 2, 4, 2  # SGLang's defaults: bfloat16, float32, bfloat16


@dataclass(frozen=True)
class Shape:
    """kv: bytes of a token in all attending layers; states: bytes of a request, at any length."""

    kv: int
    states: int

    def held(self, tokens: int) -> int:
        """Bytes of a request of so many tokens."""
        return self.states + tokens * self.kv

    def read(self, tokens: int) -> float:
        """Bytes that a decode step of BATCH such requests moves; states are written as well."""
        return WEIGHTS + BATCH * (2 * self.states + tokens * self.kv)


def shapes(config: Qwen3_5TextConfig) -> tuple[Shape, Shape]:
    """The hybrid, and the same model if all its layers attended."""
    kinds = config.layer_types
    layer = 2 * config.num_key_value_heads * config.head_dim * KV_BYTES
    recurrent = (
        config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    )
    channels = (
        2 * config.linear_num_key_heads * config.linear_key_head_dim
        + config.linear_num_value_heads * config.linear_value_head_dim
    )
    window = channels * (config.linear_conv_kernel_dim - 1)
    state = recurrent * STATE_BYTES + window * CONV_BYTES
    hybrid = Shape(layer * kinds.count("full_attention"), state * kinds.count("linear_attention"))
    return hybrid, Shape(layer * len(kinds), 0)


def report() -> str:
    """The table of docs/performance.md."""
    hybrid, plain = shapes(Qwen3_5TextConfig())
    lines = []
    for n_visual in VISUAL:
        whole, packed = TEXT + n_visual, TEXT + columns(RETENTION, n_visual)
        lines.append(
            [
                f"{n_visual:,}",
                *(f"{hybrid.held(n) / 2**20:.0f} MiB" for n in (whole, packed)),
                *(f"{shape.held(whole) / shape.held(packed):.1f}" for shape in (hybrid, plain)),
                *(f"{BATCH * n * hybrid.kv / hybrid.read(n):.0%}" for n in (whole, packed)),
                *(f"{shape.read(whole) / shape.read(packed):.2f}" for shape in (hybrid, plain)),
            ]
        )
    head = (
        *("visual tokens", "whole", f"at {RETENTION}", "held, x", "plain, x"),
        *("KV's share of a step, whole", f"at {RETENTION}", "step, x", "plain, x"),
    )
    states = f"{hybrid.states / 2**20:.1f} MiB, as the KV of {hybrid.states // hybrid.kv:,} tokens"
    return (
        f"KV of a token: {hybrid.kv // 1024} KiB, {plain.kv // 1024} if all layers attended; "
        f"states of a request: {states}.\n\n{table(list(head), lines)}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m benchmarks.hybrid_memory").parse_args(argv)
    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
