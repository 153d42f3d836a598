# SPDX-License-Identifier: Apache-2.0
"""The gate's model: when a compression pass is worth it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aircache_sglang.config import AirCacheConfig
from aircache_sglang.runtime.decide import Intent
from aircache_sglang.runtime.gate import CPU, pays_off, saved_reads
from aircache_sglang.runtime.spans import VisualPrompt

VISUAL = st.integers(64, 100_000)
SHARE = st.floats(0.001, 0.999)
TEXT = st.integers(1, 512)
TOKENS = st.integers(2, 4096)


def break_even(n_visual: int, n_columns: int, n_text: int) -> int:
    """The shortest answer that pays."""
    return next(n for n in range(2, 10**6) if pays_off(n_visual, n_columns, n_text, n))


def test_known_cases() -> None:
    # 8192 visual tokens, retention 0.1, 64 instruction tokens: 4.86 reads a visual token to win
    # 0.9 a step.
    assert break_even(8192, 819, 64) == 7
    assert break_even(8192, 4096, 64) == 14
    # As long an instruction as is ever scored.
    assert break_even(8192, 819, 512) == 27
    assert not pays_off(100, 99, 1, 64)


@given(VISUAL, SHARE, TEXT, TOKENS)
def test_longer_answers_and_shorter_instructions_only_help(
    n_visual: int, share: float, n_text: int, tokens: int
) -> None:
    m = max(1, int(share * n_visual))
    if pays_off(n_visual, m, n_text, tokens):
        assert pays_off(n_visual, m, n_text, tokens + 1)
        assert pays_off(n_visual, m, max(1, n_text - 1), tokens)
        assert pays_off(n_visual, max(1, m - 1), n_text, tokens)


@given(VISUAL, TEXT)
def test_nothing_saved_never_pays(n_visual: int, n_text: int) -> None:
    assert not pays_off(n_visual, n_visual, n_text, 10**9)
    assert not pays_off(n_visual, 1, n_text, 1)


def test_reads_are_those_of_the_docstring() -> None:
    assert saved_reads(1000, 100, 11) == 9000
    assert CPU.of_pass(1000, 100, 50) == 1000 * (2.0 + 0.04 * 50) + 300


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ({}, 20),
        ({"window": "last-5"}, 5),
        ({"window": "visual-12"}, 12),
        ({"policy": "pyramidkv"}, 8),
        *(({"policy": name}, 46) for name in ("h2o", "elastic", "prefixkv")),
    ],
    ids=str,
)
def test_the_queries_that_count(overrides: dict[str, Any], wanted: int) -> None:
    """4 tokens of text, two pictures of 10 with 6 tokens between them, 20 of instruction."""
    prompt = VisualPrompt(((4, 14), (20, 30)), 50, 20)
    config = AirCacheConfig().with_overrides({"aircache": overrides})
    assert Intent(config, prompt, 2).n_queries == wanted
