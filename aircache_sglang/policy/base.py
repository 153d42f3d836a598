# SPDX-License-Identifier: Apache-2.0
"""What the engine asks of a policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class States:
    """What a policy may look at: one request in L consecutive layers; all after RoPE.

    q_text: [L, N_t, H_q, D] queries of the instruction; k_text: [L, N_t, H_kv, D] its keys.
    k_visual: [L, N_v, H_kv, D] keys of the visual tokens.
    unified: k_visual are the keys of the whole prompt instead, in order, and the instruction's own
        are the last of them (paper, table 6).
    k_context: [L, N_c, H_kv, D] keys of all text before the instruction, for a policy that
        `reads_context`; None stands for none.
    v_visual: [L, N_v, H_kv, D] values of the visual tokens, for a policy that `reads_values`.
    q_visual: [L, W, H_q, D] queries of the last W visual tokens, W = min(N_v, `visual_window`).
    accumulated: float32 [L, H_kv, N_v], for a policy that `accumulates`; see `accumulate`.
    scale: the model's softmax scale, `D ** -0.5` for None.
    first_layer, first_head: where the layers and KV heads at hand stand in the model.
    salt: an integer that is the same for the same prompt.
    """

    q_text: Tensor
    k_text: Tensor
    k_visual: Tensor
    k_context: Tensor | None = None
    v_visual: Tensor | None = None
    q_visual: Tensor | None = None
    accumulated: Tensor | None = None
    unified: bool = False
    scale: float | None = None
    first_layer: int = 0
    first_head: int = 0
    salt: int = 0


class Policy(ABC):
    """Decides, per layer and KV head, which visual tokens of a prompt stay in the KV cache.

    The engine calls `score` and `statistics` a block of layers at a time, averages the statistics
    over tensor-parallel ranks, and calls `budgets` once a request, between the prefill and the
    first decode step; each layer and KV head keeps its highest scores. A policy holds options and
    no state of a request; its methods neither change their inputs nor wait for the device. One
    policy is one file: subclass, decorate with `register_policy`, import the file in the package's
    `__init__`. The budgets are uniform unless a policy says otherwise.

    reads_context: `score` or `statistics` looks at `States.k_context`.
    reads_values: it looks at `States.v_visual`.
    accumulates: it looks at `States.accumulated`.
    shares_selection: all KV heads of a layer keep the same tokens: the engine puts the mean over
        heads and ranks in the place of `score`'s result before anything else looks at it.
    visual_window: it looks at the queries of so many last visual tokens.
    global_budgets: budgets come from one threshold for all layers, heads and ranks: the engine puts
        `global_counts` of the L * H_kv * m highest scores, float64 [1, L], in the place of the
        statistics.
    """

    name: ClassVar[str]
    reads_context: ClassVar[bool] = False
    reads_values: ClassVar[bool] = False
    accumulates: ClassVar[bool] = False
    shares_selection: ClassVar[bool] = False

    @property
    def visual_window(self) -> int:
        return 0

    @property
    def global_budgets(self) -> bool:
        return False

    @abstractmethod
    def score(self, states: States) -> Tensor:
        """Scores of the visual tokens, float32 [L, H_kv, N_v]; the higher, the sooner kept."""

    def statistics(self, states: States, scores: Tensor) -> Tensor:
        """What the budgets depend on, float64 [S, L]: means over the KV heads of `scores`."""
        return torch.zeros((1, scores.shape[0]), dtype=torch.float64, device=scores.device)

    def budgets(self, statistics: Tensor, n_visual: int, m: int) -> Tensor:
        """Cells each layer keeps, int64 [L]: sum L * m, each between 1 and `n_visual`."""
        return torch.full_like(statistics[0], m, dtype=torch.int64)
