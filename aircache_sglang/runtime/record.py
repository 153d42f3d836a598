# SPDX-License-Identifier: Apache-2.0
"""The host's side of one compressed request: what it owns, what has happened to it, its report."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Hashable, Sequence
from typing import Any

import torch

from aircache_sglang.runtime.decide import Intent
from aircache_sglang.runtime.rungs import Ladder
from aircache_sglang.runtime.table import gap_entries


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """The pictures of one turn of a bounded conversation (runtime/session.py).

    n_visual: their tokens. rung: how far down they are. columns: m, what they keep.
    budgets: integers [L] on the host, sum L * m, in a layer behind those of older segments.
    """

    n_visual: int
    rung: int
    columns: int
    budgets: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Selected:
    """Ordinals of the kept visual tokens in the order of the cells, integers [H_kv, L * m], of all
    tensor-parallel ranks: for a later turn on the device, and for a report on the host, where they
    are with the result of the forward that they were launched with."""

    on_device: torch.Tensor
    on_host: torch.Tensor

    @classmethod
    def of(cls, ordinals: torch.Tensor) -> Selected:
        """Sends them to pinned host memory. No host synchronisation."""
        return cls(ordinals, ordinals.to("cpu", non_blocking=True))


@dataclasses.dataclass(frozen=True, slots=True)
class Replica:
    """A compressed visual region and the instruction that it was scored with, in the radix tree.

    variant: what was asked for, so that replicas of one picture live side by side.
    slots: int64, owned by the tree: the request's `extra`, then those of the positions from the
        start of the page of `prompt.end` to `replica_end`.
    rest: the prompt's tokens behind `replica_end`: less than a page of the instruction, which who
        extends the replica must have too.
    budgets, mass, selected: of the record that packed it; `selected` only if that request asked
        for it.
    segments: the turns whose pictures it holds, the oldest first.
    """

    variant: tuple[Hashable, ...]
    intent: Intent
    slots: torch.Tensor
    budgets: torch.Tensor
    mass: torch.Tensor | None
    selected: Selected | None
    segments: tuple[Segment, ...]
    rest: tuple[int, ...] = ()

    def is_followed_by(self, token_ids: Sequence[int], end: int) -> bool:
        """Whether the prompt goes on as this one's did; end: where the replica ends in it."""
        return tuple(token_ids[end : end + len(self.rest)]) == self.rest

    def row_slots(self, slots: torch.Tensor) -> torch.Tensor:
        """The entries [replica_start, replica_end) of a row that extends this replica."""
        intent, prompt = self.intent, self.intent.prompt
        m, n_head = intent.columns, intent.n_head_copies
        head, between = slots[m : m + n_head], slots[m + n_head : m + intent.n_copies]
        tail = slots[intent.n_extra + prompt.end % intent.page_size :]
        return torch.cat([head, gap_entries(prompt, slots[:m], torch.cat([between, tail]))])


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
    extra: int64 [n_extra], first the columns, then the copies of the text in front of the first
        picture and between pictures, and what is left of the last page. Owned by the request until
        its row is released, or by the tree if `shared`.
    released: row entries from `cache_protected_len` on whose slots the request no longer owns.
    reused: the columns are those of a replica that an earlier turn left.
    exact_tail: text beyond the prompt was computed beside the full picture (a retracted request, or
        one that was packed later), and fits neither namespace.
    budgets: integers [L] on the host; mass: float64 [] on the host, see `visual_mass`.
    selected: only if the request wants its selection reported.
    surplus: int64, slots that the pass turned out not to need.
    seconds: of the host in the pass; on a GPU that is launching it.
    ladder: what packing it to further rungs needs; None where it is packed once.
    rung: which of its rungs it is packed to. packed_at: index of the first answer token that was
        decoded so.
    segments: of a conversation whose older turns brought pictures too.
    cell_rows: absolute rows of the packed cells, one int64 [n_l] a layer; for attention in torch.
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
    selected: Selected | None = None
    surplus: torch.Tensor | None = None
    seconds: float = 0.0
    ladder: Ladder | None = None
    rung: int = 0
    packed_at: int = 1
    segments: tuple[Segment, ...] = ()
    cell_rows: list[torch.Tensor] | None = None

    @classmethod
    def of_replica(cls, replica: Replica, row: int, *, own: Intent) -> CompressionRecord:
        """A request, with an intent of its `own`, that extends a replica of the tree's."""
        return cls(
            intent=dataclasses.replace(replica.intent, config=own.config),
            row=row,
            originals=replica.slots[:0],
            extra=replica.slots[: replica.intent.n_extra],
            stage=Stage.RELEASED,
            shared=True,
            reused=True,
            budgets=replica.budgets,
            mass=replica.mass,
            segments=replica.segments if len(replica.segments) > 1 else (),
            selected=replica.selected if own.config.return_selection else None,
        )

    @property
    def columns(self) -> torch.Tensor:
        """int64 [m] slots of the packed columns."""
        return self.extra[: self.intent.columns]

    @property
    def copies(self) -> torch.Tensor:
        """int64 [n_copies] slots of the copied text."""
        m = self.intent.columns
        return self.extra[m : m + self.intent.n_copies]

    @property
    def head_copies(self) -> torch.Tensor:
        """int64 [n_head_copies], those of the text in front of the first picture."""
        return self.copies[: self.intent.n_head_copies]

    def private_tokens(self, stock: int) -> int:
        """Slots this request owns outside the tree, given what stock SGLang would count."""
        return stock - self.released + (0 if self.shared else self.extra.numel())

    # What happens to it, in this order.

    def settle(self, m: int, retention: float) -> None:
        """The pass has chosen its size: keep m of the columns; with m = 0 no extra slot."""
        self.intent = dataclasses.replace(self.intent, columns=m, retention=retention)
        needed = self.intent.n_extra if m else 0
        self.extra, self.surplus = self.extra[:needed], self.extra[needed:]

    def packed(self, budgets: torch.Tensor, mass: torch.Tensor, selected: Selected | None) -> None:
        """The pass has been launched; what goes to the host may still be on its way there."""
        self.budgets, self.mass, self.selected = budgets, mass, selected

    def replica(self, text: torch.Tensor, rest: tuple[int, ...] = ()) -> Replica:
        """What it leaves in the tree; text: int64, see `Replica.slots`; rest: see there."""
        assert self.budgets is not None, "a replica of a request whose pass has not run"
        slots = torch.cat([self.extra, text])
        variant = self.intent.config.variant()
        prompt, m = self.intent.prompt, self.intent.columns
        segments = self.segments or (Segment(prompt.n_visual, 0, m, self.budgets),)
        return Replica(
            *(variant, self.intent, slots, self.budgets, self.mass, self.selected, segments),
            rest=rest,
        )

    def at(
        self, rung: int, *, originals: torch.Tensor, extra: torch.Tensor, packed_at: int
    ) -> CompressionRecord:
        """The record of this request once it is packed to a rung of its ladder; see `__init__`."""
        assert self.ladder is not None, "only what was ranked is packed later"
        budgets, mass = self.ladder.reported
        return dataclasses.replace(
            self,
            intent=self.intent.at(rung),
            originals=originals,
            extra=extra,
            rung=rung,
            budgets=budgets[rung],
            mass=mass[rung],
            packed_at=packed_at,
            exact_tail=self.exact_tail or packed_at > 1,
            selected=None,
            cell_rows=None,
        )

    def release(self, *, freed: int = 0, shared: bool = False) -> None:
        """The prefill's result is known, and the originals are given back.

        freed: row entries behind `cache_protected_len` without a slot now; shared: the tree has
        taken the columns and the copies.
        """
        assert self.stage is Stage.PREFILLED, "released twice"
        self.stage, self.released, self.shared = Stage.RELEASED, freed, shared

    def report_whole(self) -> dict[str, Any]:
        """`meta_info["aircache"]` of a request that may be packed later, and has not been."""
        assert self.ladder is not None, "what is not packed later is packed"
        n_visual, n_layers = self.intent.prompt.n_visual, self.ladder.budgets.shape[1]
        return self._described() | {
            "retention": 1.0,
            "columns": 0,
            "slots_freed": 0,
            "layer_budgets": [n_visual] * n_layers,
            "visual_mass": 1.0,
            "rung": None,
            "packed_at": None,
        }

    def report(self) -> dict[str, Any]:
        """Its `meta_info["aircache"]`, once the result of the forward with the pass is known."""
        assert self.budgets is not None and self.mass is not None, "a report needs a finished pass"
        budgets = self.budgets.tolist()
        info = self._described() | {
            "retention": self.intent.retention or self.intent.config.retention,
            "columns": self.intent.columns,
            "slots_freed": self.intent.n_freed,
            "layer_budgets": budgets,
            "visual_mass": round(float(self.mass), 6),
            "rung": self.rung,
            "packed_at": self.packed_at,
        }
        if self.segments:
            info["session"] = [
                {"visual_tokens": segment.n_visual, "columns": segment.columns}
                for segment in self.segments
            ]
        if self.selected is not None:
            info["selection"] = [
                heads.sort(dim=-1).values.tolist()
                for heads in self.selected.on_host.split(budgets, dim=1)
            ]
        return info

    def _described(self) -> dict[str, Any]:
        """What a report says of the request, whatever has become of it."""
        prompt, config = self.intent.prompt, self.intent.config
        lo, hi = prompt.instruction
        info: dict[str, Any] = {
            "policy": config.policy,
            "visual_tokens": prompt.n_visual,
            "instruction_tokens": min(hi - lo, config.observed()[0]),
            "reused": self.reused,
            "when": config.when,
        }
        if prompt.is_unified:
            info["audience"] = "all"
        return info
