# SPDX-License-Identifier: Apache-2.0
"""The page says what the configuration says."""

from __future__ import annotations

from pathlib import Path

from transformers import Qwen3_5TextConfig

from benchmarks import hybrid_memory

PAGE = Path(__file__).parents[3] / "docs" / "performance.md"


def test_the_page_has_the_table() -> None:
    assert hybrid_memory.report() in PAGE.read_text()


def test_a_quarter_of_the_layers_has_kv() -> None:
    config = Qwen3_5TextConfig(num_hidden_layers=8, num_key_value_heads=2, head_dim=64)
    hybrid, plain = hybrid_memory.shapes(config)
    assert plain.kv == 8 * 2 * 2 * 64 * 2 == 4 * hybrid.kv
    # 32 heads of a 128 x 128 state, and 3 columns of 8,192 channels, in six layers.
    assert hybrid.states == 6 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)
    assert plain.states == 0
