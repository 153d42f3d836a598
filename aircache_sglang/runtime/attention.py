# SPDX-License-Identifier: Apache-2.0
"""What decode and extend attention are, whichever implementation serves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from aircache_sglang.runtime.drafts import Drafts
from aircache_sglang.runtime.extend import ExtendJob
from aircache_sglang.runtime.record import CompressionRecord


class Decoder(Protocol):
    """Decode attention of a batch in which some requests are compressed."""

    def plan(self, forward_batch: Any, records: Sequence[CompressionRecord | None]) -> None:
        """Prepare one eager step; records: one a request, None for the uncompressed."""

    def attend(self, q: torch.Tensor, layer: Any, forward_batch: Any) -> torch.Tensor:
        """Attention of one layer; q: [bs, H_q, D], returns the same shape."""


class Extender(Protocol):
    """Attention of several new tokens of a request: what extends a replica, and drafts."""

    def plan(self, jobs: Sequence[ExtendJob]) -> None:
        """Prepare one prefill; jobs: at least one, entered in the compression table."""

    def plan_drafts(self, drafts: Drafts) -> None:
        """Prepare one verify step, all requests of it."""

    def attend(self, q: torch.Tensor, out: torch.Tensor, layer: Any) -> None:
        """Overwrite what was planned in one layer's output; q, out: [tokens, H_q, D]."""
