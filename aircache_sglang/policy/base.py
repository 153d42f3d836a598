# SPDX-License-Identifier: Apache-2.0
"""What the engine asks of a policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from aircache_sglang.policy.selection import select_padded


class Policy(ABC):
    """Decides, per layer and KV head, which visual tokens of a prompt stay in the KV cache.

    The engine calls `score`, `statistics`, (averages them over tensor-parallel ranks), `budgets`
    and `order`, once a request, between the prefill and the first decode step. A policy holds
    options and no state of a request; its methods neither change their inputs nor wait for the
    device. One policy is one file: subclass, decorate with `register_policy`, import the file in
    the package's `__init__`.
    """

    name: ClassVar[str]

    @abstractmethod
    def score(
        self, q_text: Tensor, k_text: Tensor, k_visual: Tensor, *, scale: float | None = None
    ) -> Tensor:
        """Scores of the visual tokens, float32 [L, H_kv, N_v]; the higher, the sooner kept.

        Args:
            q_text: [L, N_t, H_q, D] queries of the instruction, after RoPE.
            k_text: [L, N_t, H_kv, D] its keys.
            k_visual: [L, N_v, H_kv, D] keys of the visual tokens.
            scale: the model's softmax scale, `D ** -0.5` for None.
        """

    @abstractmethod
    def statistics(self, scores: Tensor) -> Tensor:
        """What the budgets depend on, float64 [S, L]: means over the KV heads of `scores`."""

    @abstractmethod
    def budgets(self, statistics: Tensor, n_visual: int, m: int) -> Tensor:
        """Cells each layer keeps, int64 [L]: sum L * m, each between 1 and `n_visual`."""

    def order(self, scores: Tensor, budgets: Tensor) -> Tensor:
        """Visual tokens, the kept ones first, int64 [L, H_kv, N_v]; see `select_padded`."""
        return select_padded(scores, budgets)
