# SPDX-License-Identifier: Apache-2.0
"""Whether and how a request is compressed, decided before its prefill from host knowledge alone."""

from __future__ import annotations

import dataclasses
import zlib
from array import array
from collections.abc import Collection, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from aircache_sglang.config import MASS_LADDER, AirCacheConfig
from aircache_sglang.policy import columns
from aircache_sglang.runtime.choice import policy_of
from aircache_sglang.runtime.gate import CPU, Costs, pays_off
from aircache_sglang.runtime.pages import page_ceil, page_floor, whole_pages
from aircache_sglang.runtime.spans import (
    VisualPrompt,
    merge_spans,
    placeholder_runs,
    read_spans,
)


class Reason(StrEnum):
    """Why a request with pictures is left alone: `aircache_reason`, and the label of a metric."""

    # Its layout cannot be trusted (read_prompt).
    SPAN_MISMATCH = "span_mismatch"
    OVERLAPPING_SPANS = "overlapping_spans"
    TRUNCATED_PROMPT = "truncated_prompt"
    NO_INSTRUCTION = "no_instruction"
    # It asks for it, or cannot be served otherwise (decide).
    BAD_OVERRIDES = "bad_overrides"
    POLICY_NONE = "policy_none"
    FEW_VISUAL_TOKENS = "few_visual_tokens"
    KEEPS_ALL = "keeps_all"
    NO_WHOLE_PAGES = "no_whole_pages"
    NO_DECODE = "no_decode"
    UNSUPPORTED_REQUEST = "unsupported_request"
    POOL_TOO_SMALL = "pool_too_small"
    NO_GAIN = "no_gain"
    # Known only once its prefill runs, or it has ended.
    NO_FREE_SLOTS = "no_free_slots"
    MASS_NOT_REACHED = "mass_not_reached"
    NO_PRESSURE = "no_pressure"


class Rung(NamedTuple):
    """A size that a request may be packed to: a share of its visual KV, and m columns."""

    retention: float
    columns: int


@dataclasses.dataclass(frozen=True, slots=True)
class Intent:
    """The decision to compress a request, the same on every rank.

    columns: m, the slots that will hold the survivors of all layers. With `min_visual_mass` the
        most that they may be until the pass has chosen.
    retention: what the pass has chosen; None where it was asked for.
    salt: an integer drawn from the prompt.
    rungs: what it is packed to under pressure, one after the other, the last with the columns
        above; empty where it is packed at the end of its prefill.
    page_size: tokens of a page of the pool, by which slots change hands.
    """

    config: AirCacheConfig
    prompt: VisualPrompt
    columns: int
    retention: float | None = None
    salt: int = 0
    rungs: tuple[Rung, ...] = ()
    page_size: int = 1

    def at(self, rung: int) -> Intent:
        """The same, packed to one of its rungs."""
        retention, m = self.rungs[rung]
        return dataclasses.replace(self, columns=m, retention=retention)

    @property
    def reuses(self) -> bool:
        """Whether the request extends, and leaves, compressed replicas."""
        return self.config.reuse == "compressed"

    @property
    def replica_start(self) -> int:
        """The first position that a replica has a slot of its own for: a page boundary."""
        return page_floor(self.prompt.start, self.page_size)

    @property
    def replica_end(self) -> int:
        """One past the last; before `prompt.end` there is no replica."""
        return page_floor(self.prompt.length, self.page_size)

    @property
    def n_head_copies(self) -> int:
        """Copies of the text that shares its page with the first picture, for a replica."""
        return self.prompt.start - self.replica_start if self.reuses else 0

    @property
    def n_copies(self) -> int:
        """Copies of the text in a replica's region: it outlives the exact text it stood in."""
        return self.n_head_copies + self.prompt.n_between if self.reuses else 0

    @property
    def n_extra(self) -> int:
        """Slots to allocate for the columns and the copies, in whole pages."""
        return page_ceil(self.columns + self.n_copies, self.page_size)

    @property
    def given_up(self) -> tuple[tuple[int, int], ...]:
        """Half-open ranges of positions whose slots are given back once it is packed.

        A page with text in it stays with the text, unless that is copied.
        """
        if self.reuses:
            return whole_pages([(self.replica_start, self.prompt.end)], self.page_size)
        return whole_pages(self.prompt.spans, self.page_size)

    @property
    def n_given_up(self) -> int:
        """Slots of `given_up`."""
        return sum(end - start for start, end in self.given_up)

    @property
    def n_freed(self) -> int:
        """Slots that others may use once it is packed."""
        return self.n_given_up - self.n_extra

    @property
    def match_limit(self) -> int:
        """Tokens of the prompt that may be a hit in exact KV; the rest is computed anew.

        What is scored needs its queries in every request; a replica also owns all the text that
        follows the visual region.
        """
        last = self.prompt.end if self.reuses else self.prompt.instruction[0]
        return min(last, self.first_query)

    @property
    def published(self) -> int:
        """Tokens of the prompt that the tree is given in exact KV, in whole pages."""
        end = self.prompt.end if self.reuses else self.prompt.length
        return page_floor(end, self.page_size)

    @property
    def first_query(self) -> int:
        """The first position whose query the policy looks at."""
        policy = policy_of(self.config)
        if policy.accumulates:
            return self.prompt.start
        if policy.visual_window:
            return int(self.prompt.visual_positions()[-policy.visual_window :][0])
        return self.prompt.instruction[0]

    @property
    def n_queries(self) -> int:
        """Tokens whose queries score the picture."""
        if policy_of(self.config).accumulates:
            return self.prompt.length - self.prompt.start
        lo, hi = self.prompt.instruction
        text, visual = self.config.observed()
        return min(hi - lo, text) + min(self.prompt.n_visual, visual)


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """What a decision looks at in a request.

    input_ids: the padded prompt; mm_items, bare_ids, expected: see `read_prompt`.
    custom_params: of its sampling parameters; max_new_tokens: of its answer.
    reserved: tokens of the answer that admission sets slots aside for, at most max_new_tokens; with
        those that were said before a retraction.
    supported: whether it uses nothing that compression cannot serve.
    """

    input_ids: Sequence[int]
    mm_items: Sequence[Any]
    bare_ids: frozenset[int]
    expected: int | None
    custom_params: Any
    max_new_tokens: int
    reserved: int
    supported: bool


def read_prompt(
    input_ids: Sequence[int],
    mm_items: Sequence[Any],
    pad_floor: int,
    *,
    bare_ids: Collection[int] = (),
    expected: int | None = None,
) -> VisualPrompt | Reason | None:
    """Read the layout of a prompt.

    input_ids: the padded prompt; ids >= pad_floor are multimodal placeholders.
    bare_ids: the request's own image and video token ids, which SGLang's Transformers fallback
        leaves in the prompt (models/transformers.py, pad_input_ids).
    expected: visual tokens that SGLang counted while it padded the prompt, where it did.
    Returns None for a prompt without visual tokens, or the reason why its layout cannot be trusted:
    truncated prompts and items whose tokens are missing are served whole rather than wrongly.
    """
    visual = [item for item in mm_items if item.is_image() or item.is_video()]
    if not visual:
        return None
    spans = read_spans(visual)
    if all(item.offsets is None for item in visual):
        # The LLaVA family's own processor leaves them out (multimodal/processors/llava.py); with
        # audio beside the pictures, placeholders would not say whose they are.
        if len(visual) < len(mm_items):
            return Reason.SPAN_MISMATCH
        spans = placeholder_runs(input_ids, pad_floor)
        if expected is not None and sum(end - start for start, end in spans) != expected:
            return Reason.SPAN_MISMATCH
    if not spans:
        return Reason.SPAN_MISMATCH
    merged = merge_spans(spans)
    if merged is None or any(end <= start for start, end in spans):
        return Reason.OVERLAPPING_SPANS
    length = len(input_ids)
    if merged[0][0] < 0 or merged[-1][1] > length:
        return Reason.TRUNCATED_PROMPT
    for start, end in merged:
        if any(token < pad_floor and token not in bare_ids for token in input_ids[start:end]):
            return Reason.SPAN_MISMATCH
    if merged[-1][1] == length:
        return Reason.NO_INSTRUCTION
    n_visual = sum(end - start for start, end in merged)
    return VisualPrompt(spans=merged, length=length, n_visual=n_visual)


def rungs_of(intent: Intent) -> tuple[Rung, ...]:
    """The rungs of a request, each with fewer slots than the one before."""
    rungs: list[Rung] = []
    held = 0
    for retention in reversed(intent.config.ladder()):
        m = columns(retention, intent.prompt.n_visual)
        at = dataclasses.replace(intent, columns=m)
        if held < at.n_extra < intent.n_given_up:
            held = at.n_extra
            rungs.append(Rung(retention, m))
    return tuple(reversed(rungs))


def decide(
    asked: Asked,
    config: AirCacheConfig,
    *,
    room: int,
    pad_floor: int,
    costs: Costs = CPU,
    page_size: int = 1,
    disaggregated: bool = False,
    keeps_replicas: bool = True,
) -> Intent | Reason | None:
    """An intent, a reason to leave a request with pictures alone, or None without pictures.

    config: the server's; room: slots of the pool that one request may fill; pad_floor: see
    `read_prompt`; costs: of a pass on this device; page_size: of the pool;
    disaggregated: whether prefill and decode are on different servers; keeps_replicas: whether a
    radix cache could extend one.
    """
    prompt = read_prompt(
        asked.input_ids,
        asked.mm_items,
        pad_floor,
        bare_ids=asked.bare_ids,
        expected=asked.expected,
    )
    if prompt is None or isinstance(prompt, Reason):
        return prompt
    try:
        config = config.with_overrides(asked.custom_params)
    except ValueError:
        # They are answered with HTTP 400; one that came another way must not end the scheduler.
        return Reason.BAD_OVERRIDES
    if config.policy == "none":
        return Reason.POLICY_NONE
    if prompt.n_visual < config.min_visual_tokens:
        return Reason.FEW_VISUAL_TOKENS
    if config.ablation.audience == "all":
        prompt = prompt.unified()
    retention = config.retention if config.min_visual_mass is None else MASS_LADDER[-1]
    m = columns(retention, prompt.n_visual)
    if m >= prompt.n_visual:
        return Reason.KEEPS_ALL
    if config.session_columns is not None:
        retention = config.session_rungs()[0]
        m = columns(retention, prompt.n_visual)
        m = min(m, config.session_columns, prompt.n_visual - 1)
    if asked.max_new_tokens <= 1:
        return Reason.NO_DECODE
    if (
        not asked.supported
        or (page_size > 1 and config.needs_single_tokens())
        or (disaggregated and config.needs_one_server())
        or (not keeps_replicas and config.needs_tree())
    ):
        return Reason.UNSUPPORTED_REQUEST
    intent = Intent(
        *(config, prompt, m),
        salt=zlib.crc32(array("q", asked.input_ids).tobytes()),
        retention=retention if config.session_columns is not None else None,
        page_size=page_size,
    )
    if intent.n_freed <= 0:
        return Reason.NO_WHOLE_PAGES
    if config.when == "pressure":
        intent = dataclasses.replace(intent, rungs=rungs_of(intent))
    # A request that only fits an empty pool without its columns would wait for ever.
    if prompt.length + asked.reserved + intent.n_extra >= room:
        return Reason.POOL_TOO_SMALL
    # A replica serves later turns too, whose answers nobody knows.
    if (
        config.gate == "auto"
        and not intent.reuses
        and not pays_off(prompt.n_visual, m, intent.n_queries, asked.max_new_tokens, costs)
    ):
        return Reason.NO_GAIN
    return intent
