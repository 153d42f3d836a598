# SPDX-License-Identifier: Apache-2.0
"""What tensor-parallel ranks must agree on: they hold different KV heads of every layer."""

from __future__ import annotations

from typing import Any

import torch


class TensorParallelHeads:
    """The attention heads of a tensor-parallel group (SGLang's GroupCoordinator).

    With fewer KV heads than ranks SGLang replicates each head on consecutive ranks.
    """

    def __init__(self, group: Any, n_kv_heads: int) -> None:
        self._group = group
        self.ranks = int(group.world_size)
        self._replicas = max(1, self.ranks // n_kv_heads)

    def check_same(self, value: object) -> None:
        """Called once by every rank, at the start. Raises RuntimeError unless all bring one value.

        What is decided about a request follows from what the scheduler broadcasts and from this
        (`Compressor.decline`); on several machines each has flags of its own.
        """
        if self.ranks == 1:
            return
        found = [""] * self.ranks
        torch.distributed.all_gather_object(found, repr(value), group=self._group.cpu_group)
        if len(set(found)) > 1:
            raise RuntimeError(
                "--kv-policy needs the same settings on every tensor-parallel rank, got "
                + "; ".join(f"rank {rank}: {one}" for rank, one in enumerate(found))
            )

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mean over ranks of equally many heads each; an all-reduce leaves identical copies."""
        return tensor if self.ranks == 1 else self.total(tensor) / self.ranks

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks; a replicated head counts as often as it is held."""
        if self.ranks == 1:
            return tensor
        total = tensor.clone()
        torch.distributed.all_reduce(total, group=self._group.device_group)
        return total

    def first(self, n_local: int) -> int:
        """Which of the model's KV heads is this rank's first, where a rank holds `n_local`."""
        if self.ranks == 1:
            return 0
        return int(self._group.rank_in_group) // self._replicas * n_local

    def gather_heads(self, tensor: torch.Tensor) -> torch.Tensor:
        """[H_local, N] of each rank to [H_kv, N] on every rank."""
        if self.ranks == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.ranks)]
        torch.distributed.all_gather(parts, tensor.contiguous(), group=self._group.device_group)
        return torch.cat(parts[:: self._replicas])
