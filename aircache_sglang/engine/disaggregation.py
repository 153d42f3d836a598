# SPDX-License-Identifier: Apache-2.0
"""What a prefill server and a decode server have to agree on, and how a packed request travels.

A packed request has slots for its text and its m columns alone. They travel in the order of its row
on both sides: the text in front of the gap, the columns, the text behind it; no padding. Budgets
travel beside them, in one row of SGLang's metadata (disaggregation/utils.py, MetadataBuffers).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

from aircache_sglang.config import AirCacheConfig
from aircache_sglang.engine.kv_pool import LayerContiguousKVPool
from aircache_sglang.runtime.decide import Intent
from aircache_sglang.runtime.gate import Costs
from aircache_sglang.runtime.table import gap_end

MODES = ("prefill", "decode")
# The decode server decides whether an answer is worth its pass; to the prefill server all are.
FREE = Costs(fixed=0.0, scan=0.0, score=0.0, pack=0.0)
# What a transfer of metadata takes at least: 64 bytes (disaggregation/utils.py).
LEAST_WIDTH = 16
# Of a row of metadata: m, the visual mass in millionths, then a budget a layer.
HEADER = 2
MILLION = 1_000_000
# Each server's own affair.
_OWN = ("gate", "pin_text")


def slots_to_send(intent: Intent) -> int:
    """Text and columns."""
    return intent.prompt.length - intent.prompt.n_visual + intent.columns


def slots_saved(intent: Intent | None) -> int:
    """Slots of its prompt that a request neither sends nor has on the decode server."""
    return 0 if intent is None else intent.prompt.n_visual - intent.columns


def without_padding(intent: Intent, entries: torch.Tensor) -> torch.Tensor:
    """A packed row's entries [n] from position 0 on, less the padding of its gap."""
    prompt = intent.prompt
    head = entries[: prompt.start + intent.columns]
    return torch.cat([head, entries[gap_end(prompt) :]])


def with_padding(intent: Intent, slots: torch.Tensor) -> torch.Tensor:
    """Slots [n - N_v + m] as the entries of a packed row; the inverse of `without_padding`."""
    prompt = intent.prompt
    n_head = prompt.start + intent.columns
    padding = slots.new_zeros(slots_saved(intent))
    return torch.cat([slots[:n_head], padding, slots[n_head:]])


def originals_of(intent: Intent, entries: torch.Tensor) -> torch.Tensor:
    """int64 [prompt.end], slots by position of the prompt, of a row that arrived packed: the text
    has its own, pictures have none (0)."""
    prompt, between = intent.prompt, gap_end(intent.prompt)
    originals = torch.zeros(prompt.end, dtype=torch.int64, device=entries.device)
    originals[: prompt.start] = entries[: prompt.start]
    ends = [start for start, _ in prompt.spans[1:]]
    for (_, start), end in zip(prompt.spans, ends, strict=False):
        originals[start:end] = entries[between : between + end - start]
        between += end - start
    return originals


def metadata_width(n_layers: int) -> int:
    """Integers of a row of metadata."""
    return max(LEAST_WIDTH, HEADER + n_layers)


def metadata_row(intent: Intent, budgets: torch.Tensor, mass: torch.Tensor) -> list[int]:
    """What the decode server has to know; budgets, mass: on the host."""
    return [intent.columns, round(float(mass) * MILLION), *(int(n) for n in budgets.tolist())]


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    """How the prefill server has packed a request.

    columns: m, 0 for a request that was not packed. budgets: int64 [L] on the host; mass: float64
    [] on the host.
    """

    columns: int
    budgets: torch.Tensor
    mass: torch.Tensor

    @classmethod
    def of(cls, row: Sequence[int], n_layers: int) -> Arrival:
        """Read a row of metadata."""
        budgets = torch.tensor(row[HEADER : HEADER + n_layers], dtype=torch.int64)
        return cls(row[0], budgets, torch.tensor(row[1] / MILLION, dtype=torch.float64))

    def objection(self, intent: Intent | None) -> str | None:
        """Why it is not what was asked for; None if it is."""
        m = 0 if intent is None else intent.columns
        if self.columns != m:
            return (
                f"aircache: the prefill server packed this prompt into {self.columns} columns and "
                f"the decode server expected {m}; start both with the same version and flags"
            )
        cells, n_layers = int(self.budgets.sum()), len(self.budgets)
        most = 0 if intent is None else intent.prompt.n_visual
        if cells != n_layers * m or not all(0 <= n <= most for n in self.budgets.tolist()):
            return (
                f"aircache: the prefill server sent budgets of {cells} cells for {m} columns of "
                f"{n_layers} layers"
            )
        return None


def layout(config: AirCacheConfig, pool: LayerContiguousKVPool, n_kv_heads: int) -> str:
    """What both servers must have in common, a JSON object; n_kv_heads: of all ranks."""
    flags = {k: v for k, v in dataclasses.asdict(config).items() if k not in _OWN}
    shape = f"{pool.layer_num} layers of {n_kv_heads} heads of {pool.k_all.shape[-1]}"
    kv = f"{shape} in {str(pool.k_all.dtype).removeprefix('torch.')}"
    return json.dumps({"version": version("aircache-sglang"), "KV": kv, **flags}, sort_keys=True)


def difference(address: str, theirs: str | None, ours: str) -> str | None:
    """Why a decode server cannot work with a prefill server; None if it can.

    address: of the prefill server; theirs, ours: layouts, None of a server without a policy.
    """
    pair = f"aircache: the prefill server at {address}"
    try:
        other: Any = None if theirs is None else json.loads(theirs)
    except ValueError:
        other = None
    mine = json.loads(ours)
    if not isinstance(other, dict):
        return (
            f"{pair} has no --kv-policy and this decode server has --kv-policy {mine['policy']}; "
            "start both with the same flags"
        )
    for key in sorted({*mine, *other}):
        if mine.get(key) != other.get(key):
            return (
                f"{pair} has {key} {other.get(key)} and this decode server {mine.get(key)}; "
                "start both with the same version and flags"
            )
    return None
