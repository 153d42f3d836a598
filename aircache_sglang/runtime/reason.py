# SPDX-License-Identifier: Apache-2.0
"""Why a request with pictures is left alone: the values of `meta_info["aircache_reason"]`."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Also a label of the metric `sglang:aircache_requests_left_alone`."""

    # Its layout cannot be trusted (spans.py).
    SPAN_MISMATCH = "span_mismatch"
    OVERLAPPING_SPANS = "overlapping_spans"
    TRUNCATED_PROMPT = "truncated_prompt"
    NO_INSTRUCTION = "no_instruction"
    # It asks for it, or cannot be served otherwise (decide.py).
    BAD_OVERRIDES = "bad_overrides"
    POLICY_NONE = "policy_none"
    FEW_VISUAL_TOKENS = "few_visual_tokens"
    KEEPS_ALL = "keeps_all"
    NO_DECODE = "no_decode"
    UNSUPPORTED_REQUEST = "unsupported_request"
    POOL_TOO_SMALL = "pool_too_small"
    NO_GAIN = "no_gain"
    # Known only once its prefill runs.
    NO_FREE_SLOTS = "no_free_slots"
    MASS_NOT_REACHED = "mass_not_reached"
