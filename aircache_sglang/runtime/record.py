# SPDX-License-Identifier: Apache-2.0
"""The host's side of one compressed request: what was intended, what it owns, what it reports."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Hashable
from typing import Any

import torch

from aircache_sglang.config import AirCacheConfig
from aircache_sglang.runtime.choice import policy_of
from aircache_sglang.runtime.spans import VisualPrompt


@dataclasses.dataclass(frozen=True, slots=True)
class Intent:
    """The decision to compress a request, made before its prefill from host knowledge alone.

    columns: m, the slots that will hold the survivors of all layers, the same on every rank. With
        `min_visual_mass` the most that they may be until the pass has chosen.
    retention: what the pass has chosen; None where it was asked for.
    salt: an integer drawn from the prompt.
    """

    config: AirCacheConfig
    prompt: VisualPrompt
    columns: int
    retention: float | None = None
    salt: int = 0

    @property
    def reuses(self) -> bool:
        """Whether the request extends, and leaves, compressed replicas."""
        return self.config.reuse == "compressed"

    @property
    def n_copies(self) -> int:
        """Copies of the text between pictures: a replica outlives the exact text it stood in."""
        return self.prompt.n_between if self.reuses else 0

    @property
    def n_extra(self) -> int:
        """Slots to allocate for the columns and the copies."""
        return self.columns + self.n_copies

    @property
    def match_limit(self) -> int:
        """Tokens of the prompt that may be a hit in exact KV; the rest is computed anew.

        What is scored needs its queries in every request; a replica also owns all the text that
        follows the visual region.
        """
        last = self.prompt.end if self.reuses else self.prompt.instruction[0]
        return min(last, self.first_query)

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
class Replica:
    """A compressed visual region and the instruction that it was scored with, in the radix tree.

    variant: what was asked for, so that replicas of one picture live side by side.
    slots: int64, owned by the tree: columns, copies of the text between pictures, then the text
        from `prompt.end` to `prompt.length`.
    budgets, mass, selected: of the record that packed it; `selected` only if that request asked
        for it.
    """

    variant: tuple[Hashable, ...]
    intent: Intent
    slots: torch.Tensor
    budgets: torch.Tensor
    mass: torch.Tensor | None
    selected: torch.Tensor | None

    def row_slots(self, slots: torch.Tensor) -> torch.Tensor:
        """The entries [prompt.start, prompt.length) of a row that extends this replica.

        As after the pass (compress.py, write_gap): columns, the padding slot, then text.
        """
        m = self.intent.columns
        padding = slots.new_zeros(self.intent.prompt.n_visual - m)
        return torch.cat([slots[:m], padding, slots[m:]])


class Stage(enum.Enum):
    """Who owns the request's original slots.

    PREFILLED: the request, as in stock SGLang. RELEASED: with a tree, the exact prompt, as far as
    it is published, belongs to the tree; without one the visual slots are free and the text is the
    request's.
    """

    PREFILLED = enum.auto()
    RELEASED = enum.auto()


@dataclasses.dataclass(slots=True)
class CompressionRecord:
    """State from the allocation of the columns to the release of the row.

    row: the request's index in `req_to_token`.
    originals: int64 [prompt.end], the slots in which the prefill wrote, or found, the prompt;
        empty if a replica was extended.
    extra: int64 [n_extra], first the columns, then the copies of the text between pictures. Owned
        by the request until its row is released, or by the tree if `shared`.
    released: row entries from `cache_protected_len` on whose slots the request no longer owns.
    reused: the columns are those of a replica that an earlier turn left.
    exact_tail: text beyond the prompt was computed beside the full picture (a retracted request),
        and fits neither namespace.
    budgets: integers [L] on the host, set by the pass.
    mass: float64 [] on the host, set by the pass; see `visual_mass`.
    selected: integers [H_kv, L * m], ordinals of the kept visual tokens in the order of the cells,
        of all tensor-parallel ranks; only if the request wants its selection reported.
    surplus: int64, slots that the pass turned out not to need, until the engine takes them.
    seconds: of the host in the pass; on a GPU that is launching it.
    """

    intent: Intent
    row: int
    originals: torch.Tensor
    extra: torch.Tensor
    stage: Stage = Stage.PREFILLED
    shared: bool = False
    reused: bool = False
    exact_tail: bool = False
    released: int = 0
    budgets: torch.Tensor | None = None
    mass: torch.Tensor | None = None
    selected: torch.Tensor | None = None
    surplus: torch.Tensor | None = None
    seconds: float = 0.0
    # Absolute rows of the packed cells, one int64 [n_l] a layer; runtime/decode.py fills them in.
    cell_rows: list[torch.Tensor] | None = None

    @property
    def columns(self) -> torch.Tensor:
        """int64 [m] slots of the packed columns."""
        return self.extra[: self.intent.columns]

    @property
    def copies(self) -> torch.Tensor:
        """int64 [n_between] slots of the copied text."""
        return self.extra[self.intent.columns :]

    def settle(self, m: int, retention: float) -> None:
        """Keep m of the columns; with m = 0 none of the extra slots."""
        copies = self.copies if m else self.extra[:0]
        self.surplus = self.extra[m : self.intent.columns if m else None]
        self.extra = torch.cat([self.extra[:m], copies])
        self.intent = dataclasses.replace(self.intent, columns=m, retention=retention)

    def private_tokens(self, stock: int) -> int:
        """Slots this request owns outside the tree, given what stock SGLang would count."""
        return stock - self.released + (0 if self.shared else self.extra.numel())

    @property
    def text_from(self) -> int:
        """First row entry past the gap that holds text of the request's own or of the tree.

        Without copies the text between pictures stays in its original slots.
        """
        prompt = self.intent.prompt
        return prompt.end if self.intent.n_copies else prompt.start + prompt.n_visual

    def report(self) -> dict[str, Any]:
        """The request's `meta_info["aircache"]`. Waits for the device if the pass still runs."""
        assert self.budgets is not None and self.mass is not None, "a report needs a finished pass"
        budgets = self.budgets.tolist()
        prompt, config = self.intent.prompt, self.intent.config
        lo, hi = prompt.instruction
        info: dict[str, Any] = {
            "policy": config.policy,
            "retention": self.intent.retention or config.retention,
            "visual_tokens": prompt.n_visual,
            "columns": self.intent.columns,
            "slots_freed": prompt.n_visual - self.intent.columns,
            "layer_budgets": budgets,
            "instruction_tokens": min(hi - lo, config.observed()[0]),
            "visual_mass": round(float(self.mass), 6),
            "reused": self.reused,
        }
        if prompt.is_unified:
            info["audience"] = "all"
        if self.selected is not None:
            info["selection"] = [
                heads.sort(dim=-1).values.tolist()
                for heads in self.selected.cpu().split(budgets, dim=1)
            ]
        return info
