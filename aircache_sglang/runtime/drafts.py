# SPDX-License-Identifier: Apache-2.0
"""What a step of speculative decoding looks at: a tree of drafts behind each request."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from aircache_sglang.runtime.record import CompressionRecord


@dataclasses.dataclass(frozen=True, slots=True)
class Drafts:
    """The drafts of B requests, n of each, which stand behind all that it has said.

    records: one a request, None for the uncompressed. rows: int64 [B] of `req_to_token`.
    seq_lens: integers [B], logical lengths, drafts included.
    tree: bool [B, n, n], whether draft i follows draft j, itself included. The first is the last
        token that is known, and all others follow it.
    """

    records: Sequence[CompressionRecord | None]
    rows: torch.Tensor
    seq_lens: torch.Tensor
    tree: torch.Tensor

    @classmethod
    def of(cls, forward_batch: Any, records: Sequence[CompressionRecord | None]) -> Drafts:
        """Those of a verify step (speculative/ngram_info.py, NgramVerifyInput)."""
        spec, lens = forward_batch.spec_info, forward_batch.seq_lens
        tree = tree_of(spec.custom_mask, lens, spec.draft_token_num)
        return cls(records, forward_batch.req_pool_indices, lens + spec.draft_token_num, tree)


def tree_of(mask: torch.Tensor, seq_lens: torch.Tensor, n: int) -> torch.Tensor:
    """The trees in SGLang's mask of a verify step, bool [B, n, n]; waits for nothing.

    mask: bool, request after request the n rows [seq_lens[b] + n] of what each of its drafts sees
    (speculative/ngram_worker.py, USE_FULL_MASK). seq_lens: integers [B], without the drafts.
    """
    known = seq_lens.long()
    width = known + n
    first = (width * n).cumsum(0) - width * n + known
    node = torch.arange(n, device=mask.device)
    return mask[first[:, None, None] + width[:, None, None] * node[:, None] + node]
