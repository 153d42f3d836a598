# SPDX-License-Identifier: Apache-2.0
"""MixKV (Liu et al., arXiv 2510.20707): importance mixed with diversity, head by head.

Taken, from the paper and `headwisemixkv` in `mixkv_utils.py` of github.com/xuyang-liu16/MixKV:
importance is the pooled vote of SnapKV plus the norm of the value; diversity is how unlike a key is
to the mean direction of its head's keys; norm and unlikeness are spread over 0 to 1 and brought to
the mean of the votes; a head takes as much of the diversity as its keys are alike, that is their
mean cosine over all pairs. Different: likeness is that of the request's own visual keys, as the
paper writes it, where the authors' code reads an average per head from a file; means and ranges are
those of the visual tokens, since no other is evicted; a head whose keys point away from each other
on the mean takes no diversity; SnapKV differs as its own file says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from aircache_sglang.policy.base import States
from aircache_sglang.policy.registry import register_policy
from aircache_sglang.policy.snapkv import SnapKV
from aircache_sglang.policy.validation import compute_dtype

EPSILON = 1e-8  # the authors'


@register_policy
@dataclass(frozen=True)
class MixKV(SnapKV):
    """The votes of `SnapKV`, the norms of values, and unlike keys where a head's keys are alike."""

    name: ClassVar[str] = "mixkv"
    reads_values: ClassVar[bool] = True

    def score(self, states: States) -> Tensor:
        assert states.v_visual is not None, "the policy asked for the values of visual tokens"
        dtype = compute_dtype(states.k_visual, states.v_visual)
        votes = super().score(states).to(dtype)  # [L, H_kv, N_v]
        norms = states.v_visual.to(dtype).norm(dim=-1).transpose(1, 2)
        keys = torch.nn.functional.normalize(states.k_visual.to(dtype), dim=-1)
        n_visual = keys.shape[1]
        middle = keys.mean(dim=1)  # [L, H_kv, D]
        unlike = -torch.einsum("lnhd,lhd->lhn", keys, middle)
        pairs = n_visual * middle.square().sum(dim=-1, keepdim=True) - 1
        alike = (pairs / max(1, n_visual - 1)).clamp(0.0, 1.0)
        importance = votes + levelled(norms, votes)
        mixed = alike * levelled(unlike, votes) + (1 - alike) * importance
        return mixed.to(torch.float32)


def levelled(scores: Tensor, votes: Tensor) -> Tensor:
    """`scores` spread over 0 to 1 per head, times what makes their mean that of the votes."""
    low, high = scores.amin(dim=-1, keepdim=True), scores.amax(dim=-1, keepdim=True)
    spread = (scores - low) / (high - low + EPSILON)
    return spread * votes.mean(dim=-1, keepdim=True) / (spread.mean(dim=-1, keepdim=True) + EPSILON)
