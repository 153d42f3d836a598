# SPDX-License-Identifier: Apache-2.0
"""The host's side of one compressed request: what was intended, what it owns, what it reports."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import torch

from aircache_sglang.config import AirCacheConfig
from aircache_sglang.runtime.spans import VisualPrompt


@dataclasses.dataclass(frozen=True, slots=True)
class Intent:
    """The decision to compress a request, made before its prefill from host knowledge alone.

    columns: m, the slots that will hold the survivors of all layers, the same on every rank.
    """

    config: AirCacheConfig
    prompt: VisualPrompt
    columns: int

    @property
    def n_extra(self) -> int:
        """Slots to allocate: the columns, and private copies of the text between pictures."""
        return self.columns + self.prompt.n_between


class Stage(enum.Enum):
    """Who owns the request's original slots below `prompt.end`.

    PREFILLED: the request, as in stock SGLang. RELEASED: the head [0, start) belongs to the tree
    (or to the request, without a tree), all between start and end to the tree or the free pool.
    """

    PREFILLED = enum.auto()
    RELEASED = enum.auto()


@dataclasses.dataclass(slots=True)
class CompressionRecord:
    """State from the allocation of the columns to the release of the row.

    row: the request's index in `req_to_token`.
    originals: int64 [prompt.end], the slots in which the prefill wrote, or found, the prompt.
    extra: int64 [n_extra], owned by the request until its row is released: first the columns, then
        the copies of the text between pictures.
    budgets: integers [L] on the host, set by the pass.
    selected: integers [H_kv, L * m], ordinals of the kept visual tokens in the order of the cells,
        of all tensor-parallel ranks; only if the request wants its selection reported.
    """

    intent: Intent
    row: int
    originals: torch.Tensor
    extra: torch.Tensor
    stage: Stage = Stage.PREFILLED
    budgets: torch.Tensor | None = None
    selected: torch.Tensor | None = None
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

    def private_tokens(self, stock: int) -> int:
        """Slots this request owns outside the tree, given what stock SGLang would count."""
        prompt = self.intent.prompt
        released = prompt.end - prompt.start if self.stage is Stage.RELEASED else 0
        return stock - released + self.extra.numel()

    def report(self, policy: str) -> dict[str, Any]:
        """The request's `meta_info["aircache"]`. Waits for the device if the pass still runs."""
        assert self.budgets is not None, "a report needs a finished pass"
        budgets = self.budgets.tolist()
        prompt, config = self.intent.prompt, self.intent.config
        lo, hi = prompt.instruction
        info: dict[str, Any] = {
            "policy": policy,
            "retention": config.retention,
            "visual_tokens": prompt.n_visual,
            "columns": self.intent.columns,
            "slots_freed": prompt.n_visual - self.intent.columns,
            "layer_budgets": budgets,
            "instruction_tokens": min(hi - lo, config.scoring_window()[0]),
        }
        if self.selected is not None:
            info["selection"] = [
                heads.sort(dim=-1).values.tolist()
                for heads in self.selected.cpu().split(budgets, dim=1)
            ]
        return info
